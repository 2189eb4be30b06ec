"""Votes of one outer step, and when they are a certificate.

Weights are counted in halves (protos/contract/certificate.py): a member two, the coordinator one; a
quorum is more than half of all. Votes are kept for every attempt, because any certificate ends the
step, also one of an attempt given up.
"""

from collections.abc import Iterable

from protos.contract.certificate import certificate_from_votes, half_votes_by_voter, is_quorum
from protos.contract.ids import COORDINATOR_VOTER
from protos.muster.v1 import common_pb2, rounds_pb2

_MAX_BALLOTS_PER_VOTER = 16
"""Ballots remembered of each voter, its highest attempts; honest members make one per attempt."""
_MAX_VALUES_PER_ATTEMPT = 2
"""Values of one voter in one attempt: one is a vote, two prove a double vote, more say nothing new.
"""


class VoteBox:
    """Valid votes by ballot = (attempt, value)."""

    def __init__(self, roster: Iterable[common_pb2.RosterEntry]) -> None:
        self.half_votes = half_votes_by_voter(roster)
        self._votes: dict[tuple[int, bytes], dict[str, rounds_pb2.Vote]] = {}
        self._ballots_by_voter: dict[str, set[tuple[int, bytes]]] = {}

    def add(self, vote: rounds_pb2.Vote, *, current_attempt: int) -> tuple[int, bytes]:
        """Keep a checked vote; returns its ballot.

        Room is bounded per voter, so that nobody pushes out another's votes; the lowest attempts go
        first, those of the current attempt never.
        """
        ballot = (vote.attempt, vote.value)
        own = self._ballots_by_voter.setdefault(vote.voter, set())
        if ballot not in own:
            if sum(attempt == vote.attempt for attempt, _ in own) >= _MAX_VALUES_PER_ATTEMPT:
                return ballot
            own.add(ballot)
        self._votes.setdefault(ballot, {})[vote.voter] = vote
        droppable = [b for b in own if b[0] != current_attempt]
        if len(droppable) > _MAX_BALLOTS_PER_VOTER:
            self._drop(vote.voter, min(droppable))
        return ballot

    def _drop(self, voter: str, ballot: tuple[int, bytes]) -> None:
        self._ballots_by_voter[voter].discard(ballot)
        del self._votes[ballot][voter]
        if not self._votes[ballot]:
            del self._votes[ballot]

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
        return (
            f"{have / 2:g} of {sum(self.half_votes.values()) / 2:g} votes; more than half are "
            "needed"
        )

    def certificate(
        self, ballot: tuple[int, bytes], contributions: bytes
    ) -> rounds_pb2.Certificate | None:
        """Certificate of a ballot if its votes are a quorum."""
        if not self.is_quorum(self.voters(ballot)):
            return None
        return certificate_from_votes(self.votes(ballot), contributions)
