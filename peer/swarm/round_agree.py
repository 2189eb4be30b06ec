"""The agreeing side of a round: proposals, votes, the coordinator's half, the certificate.

Votes of every attempt are kept, and any certificate ends the step. The rules of casting a vote are
in round_core.py.
"""

from dataclasses import replace
from typing import Protocol

from peer.swarm.round_core import RoundCore, backoff_seconds
from peer.swarm.round_types import (
    Behind,
    Commit,
    FetchBytes,
    Proposal,
    RoundPhase,
    SubmitVotes,
)
from protos.contract.ids import COORDINATOR_VOTER
from protos.muster.v1 import rounds_pb2


class Host(Protocol):
    """What the agreeing side needs to know of the attempt under way."""

    is_reducing: bool
    now_seconds: float
    attempt_begin_seconds: float

    @property
    def leader_peer_id(self) -> str:
        """Leader of the current attempt."""

    def enter_agree(self, reason: str) -> None:
        """The attempt has got as far as voting."""


class AgreeSide:
    """Votes and proposals of one member in one step."""

    def __init__(self, core: RoundCore, host: Host) -> None:
        self._core, self._host = core, host
        self._next_submit_seconds = 0.0
        self.deadline_seconds = 0.0
        """When the votes should be there, if everybody has averaged."""
        self.failed: set[str] = set()
        """Members that say that they cannot average in this attempt."""
        self._lost_since_seconds: float | None = None
        """Since when a member whose vote is missing cannot be reached; None if all can."""
        self._proposal_by_digest: dict[bytes, Proposal] = {}
        self._held_digests: set[bytes] = set()

    def begin(self, reason: str) -> None:
        """The attempt has got as far as voting."""
        core = self._core
        core.phase, self.failed = RoundPhase.AGREE, set()
        self._lost_since_seconds = None
        wait_seconds = core.timing.agree_wait_seconds + backoff_seconds(core.attempt)
        self.deadline_seconds = self._host.now_seconds + wait_seconds
        core.show(RoundPhase.AGREE, reason)

    def patience_seconds(self, bytes_deadline_seconds: float) -> float:
        """When an attempt is given up that this member has voted in, or fetches bytes for.

        Whoever is first waits as long as the others' bytes may take: an exchange would cut them off
        before their votes, and the next attempt would go the same way. No longer than votes take if
        a member has failed, or if those that can be reached or have voted are no quorum; not at all
        if the rest could make none, either (but the leader lets the failed fetch its bytes). And
        while a member cannot be reached that has not voted, only for a moment: others may wait for
        its bytes, and can fetch ours instead. So too while nobody can be reached who holds bytes to
        fetch.
        """
        core, host = self._core, self._host
        vote, own = core.record.highest_vote, core.setup.own_peer_id
        voted = core.votes.voters((vote.attempt, vote.value)) if vote is not None else set()
        can_vote = set(core.entry_by_peer) - core.unreachable
        rest = (can_vote - self.failed) | voted | {own, COORDINATOR_VOTER}
        if self.failed and host.leader_peer_id != own and not core.votes.is_quorum(rest):
            return host.now_seconds
        is_hopeless = bool(self.failed) or not core.votes.is_quorum(can_vote | voted)
        if is_hopeless or bytes_deadline_seconds == float("inf"):
            return self.deadline_seconds
        gone = core.last_members & core.votes.half_votes.keys() - can_vote - voted
        holders = self._awaited_holders()
        is_lost = holders <= core.unreachable if holders else vote is not None and bool(gone)
        if not is_lost:
            self._lost_since_seconds = None
        elif self._lost_since_seconds is None:
            self._lost_since_seconds = host.now_seconds
        if self._lost_since_seconds is not None:
            spent_seconds = host.now_seconds - host.attempt_begin_seconds
            moment_seconds = max(2.0 * core.timing.resend_seconds, 0.1 * spent_seconds)
            lost_seconds = self._lost_since_seconds + moment_seconds
            bytes_deadline_seconds = min(bytes_deadline_seconds, lost_seconds)
        return max(self.deadline_seconds, bytes_deadline_seconds)

    def _awaited_holders(self) -> set[str]:
        """Who holds bytes that this member still fetches for a vote."""
        return {
            holder
            for digest, proposal in self._proposal_by_digest.items()
            if digest not in self._held_digests and self._core.may_vote(proposal.attempt)
            for holder in proposal.holders
        }

    def hold(self, averaged_digest: bytes) -> None:
        """These averaged bytes are held already."""
        self._held_digests.add(averaged_digest)

    def consider(self, proposal: Proposal) -> None:
        """Vote for a proposal once its bytes are here, if every check passes."""
        core = self._core
        value = rounds_pb2.RoundValue.FromString(proposal.value)
        problem = core.check_proposal(proposal) or self._problem_with_rival(proposal)
        if problem:
            core.refused_proposal = f"proposal of attempt {proposal.attempt} refused: {problem}"
            core.show(core.phase, "no vote")
            if value.previous_state_digest != core.setup.previous_state_digest:
                setup = core.setup
                core.emit(
                    Behind(self._host.leader_peer_id, setup.incarnation, setup.outer_step, problem)
                )
            return
        known = dict.fromkeys(h for h in proposal.holders if h in core.entry_by_peer)
        proposal = replace(proposal, holders=tuple(known))
        self.remember_contributions(proposal.value, proposal.contributions)
        self._proposal_by_digest[value.averaged_digest] = proposal
        if value.averaged_digest in self._held_digests:
            self.on_bytes(value.averaged_digest)
        else:
            if core.phase is RoundPhase.FORM:
                self._host.enter_agree(f"fetching the bytes of attempt {proposal.attempt}")
            core.emit(FetchBytes(value.averaged_digest, tuple(proposal.holders)))

    def _problem_with_rival(self, proposal: Proposal) -> str:
        """A leader proposes one value in its attempt: else it could have us fetch without end."""
        is_rival = any(
            other.attempt == proposal.attempt and other.value != proposal.value
            for other in self._proposal_by_digest.values()
        )
        return "another value was proposed in this attempt before" if is_rival else ""

    def fetch_pending(self) -> None:
        """Ask again for bytes of proposals that could still be voted for."""
        for digest, proposal in self._proposal_by_digest.items():
            if digest not in self._held_digests and self._core.may_vote(proposal.attempt):
                self._core.emit(FetchBytes(digest, tuple(proposal.holders)))

    def on_bytes(self, averaged_digest: bytes) -> None:
        """Bytes are here: vote for the proposal that waits for them."""
        self._held_digests.add(averaged_digest)
        proposal = self._proposal_by_digest.get(averaged_digest)
        if proposal is None or not self._core.cast_vote(proposal):
            return
        if proposal.attempt == self._core.attempt and not self._host.is_reducing:
            self._host.enter_agree(f"voted in attempt {proposal.attempt}")
        self.check_certificate((proposal.attempt, proposal.value))

    def on_vote(self, vote: rounds_pb2.Vote) -> None:
        """Keep a valid vote for this step, of whatever attempt."""
        core = self._core
        if vote.attempt > core.max_attempt or not core.names_this_round(vote.value):
            return
        if core.checks.is_valid_vote(vote):
            self.check_certificate(core.votes.add(vote, current_attempt=core.attempt))

    def on_certificate(self, certificate: rounds_pb2.Certificate) -> None:
        """A certificate of this step ends it, of whatever attempt."""
        core = self._core
        value = rounds_pb2.RoundValue.FromString(certificate.value)
        place = (value.incarnation, value.outer_step)
        if place != (core.setup.incarnation, core.setup.outer_step):
            core.is_from_later("a certificate", *place)
        elif not core.checks.check_certificate(certificate):
            if value.previous_state_digest != core.setup.previous_state_digest:
                reason = "the certificate of this step continues another state than ours"
                core.emit(Behind(certificate.votes[0].voter, *place, reason))
            else:
                self._commit(certificate)

    def on_coordinator(
        self,
        response: rounds_pb2.CoordinatorExchangeResponse | rounds_pb2.SubmitVotesResponse | None,
    ) -> None:
        """The coordinator may answer with a certificate, whatever it was asked."""
        if response is not None and response.HasField("certificate"):
            self.on_certificate(response.certificate)

    def check_certificate(self, ballot: tuple[int, bytes]) -> None:
        """Bundle and spread a certificate once the ballot has its quorum."""
        core = self._core
        contributions = self._contributions_of(ballot[1])
        if contributions is None or core.phase is RoundPhase.DONE:
            return
        certificate = core.votes.certificate(ballot, contributions)
        if certificate is not None:
            core.send(core.others, attempt=ballot[0], certificate=certificate)
            self._commit(certificate)

    def maybe_submit(self) -> None:
        """Ask for the coordinator's half only if members' votes that will come make no quorum."""
        core, now = self._core, self._host.now_seconds
        vote = core.record.highest_vote
        if vote is None or core.phase is RoundPhase.DONE or now < self._next_submit_seconds:
            return
        ballot = (vote.attempt, vote.value)
        contributions = self._contributions_of(vote.value)
        if contributions is None or not core.votes.needs_coordinator(core.votes.voters(ballot)):
            return
        will_vote = core.votes.voters(ballot) | (set(core.entry_by_peer) - core.unreachable)
        is_early = now < self.deadline_seconds - core.timing.agree_wait_seconds / 2
        if core.votes.is_quorum(will_vote) and is_early and core.phase is RoundPhase.AGREE:
            return
        self._next_submit_seconds = now + core.timing.resend_seconds
        core.emit(SubmitVotes(core.votes.votes(ballot), contributions))

    def remember_contributions(self, value: bytes, contributions: bytes) -> None:
        """Keep the contributions that a value names; a certificate carries them."""
        digest = rounds_pb2.RoundValue.FromString(value).contributions_digest
        self._core.contributions_by_digest[digest] = contributions

    def _contributions_of(self, value: bytes) -> bytes | None:
        digest = rounds_pb2.RoundValue.FromString(value).contributions_digest
        return self._core.contributions_by_digest.get(digest)

    def _commit(self, certificate: rounds_pb2.Certificate) -> None:
        core = self._core
        value = rounds_pb2.RoundValue.FromString(certificate.value)
        contributions = rounds_pb2.Contributions.FromString(certificate.contributions)
        own = core.own
        is_own_included = own is not None and any(
            found == own.contribution for found in contributions.contributions
        )
        holders = tuple(v.voter for v in certificate.votes if v.voter != COORDINATOR_VOTER)
        core.phase = RoundPhase.DONE
        core.show(RoundPhase.DONE, f"certified in attempt {certificate.attempt}")
        directive = core.directive_by_number.get(value.next_directive_number)
        core.emit(Commit(certificate, directive, holders, certificate.attempt, is_own_included))
