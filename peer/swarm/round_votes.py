"""Votes of one outer step, and when they are a certificate.

Weights are counted in halves (protos/contract/certificate.py): a member two, the coordinator one; a quorum is more than
half of all. Votes are kept for every attempt, because any certificate ends the step, also one of an attempt given up.
"""

from collections.abc import Iterable

from protos.contract.certificate import certificate_from_votes, half_votes_by_voter, is_quorum
from protos.contract.ids import COORDINATOR_VOTER
from protos.muster.v1 import common_pb2, rounds_pb2

_MAX_BALLOTS = 64
"""Ballots remembered; honest members make one per attempt."""


class VoteBox:
    """Valid votes by ballot = (attempt, value)."""

    def __init__(self, roster: Iterable[common_pb2.RosterEntry]) -> None:
        self.half_votes = half_votes_by_voter(roster)
        self._votes: dict[tuple[int, bytes], dict[str, rounds_pb2.Vote]] = {}

    def add(self, vote: rounds_pb2.Vote) -> tuple[int, bytes]:
        """Keep a checked vote; returns its ballot. The oldest ballot goes when there are too many."""
        ballot = (vote.attempt, vote.value)
        self._votes.setdefault(ballot, {})[vote.voter] = vote
        if len(self._votes) > _MAX_BALLOTS:
            del self._votes[min(self._votes)]
        return ballot

    def voters(self, ballot: tuple[int, bytes]) -> set[str]:
        """Who has voted in a ballot."""
        return set(self._votes.get(ballot, {}))

    def votes(self, ballot: tuple[int, bytes]) -> tuple[rounds_pb2.Vote, ...]:
        """Votes of a ballot, ordered by voter."""
        found = self._votes.get(ballot, {})
        return tuple(found[voter] for voter in sorted(found))

    def is_quorum(self, voters: Iterable[str]) -> bool:
        """True if these voters are more than half of all votes."""
        return is_quorum(voters, self.half_votes)

    def needs_coordinator(self, voters: Iterable[str]) -> bool:
        """True if these member votes are no quorum but would be with the coordinator's half."""
        present = set(voters) - {COORDINATOR_VOTER}
        return not self.is_quorum(present) and self.is_quorum(present | {COORDINATOR_VOTER})

    def explain(self, voters: Iterable[str]) -> str:
        """Sentence with the numbers behind a quorum that is missing."""
        have = sum(self.half_votes.get(voter, 0) for voter in set(voters))
        return f"{have / 2:g} of {sum(self.half_votes.values()) / 2:g} votes; more than half are needed"

    def certificate(
        self, ballot: tuple[int, bytes], contributions: bytes
    ) -> rounds_pb2.Certificate | None:
        """Certificate of a ballot if its votes are a quorum."""
        if not self.is_quorum(self.voters(ballot)):
            return None
        return certificate_from_votes(self.votes(ballot), contributions)
