"""What leader and member of a round share: the durable record, votes, known directives, and the
rules of voting.

The rules (architecture section 5, Agree) live here once: a vote is cast only for a value that
passes every check, only in an attempt not below the promise, at most once per attempt, and the
record is persisted before the vote leaves.
"""

from dataclasses import replace
from typing import Any

from google.protobuf.message import DecodeError

from peer.swarm.accusations import Accusations
from peer.swarm.latecomers import MAX_LATE_ATTEMPTS
from peer.swarm.round_types import (
    Acked,
    Behind,
    ContributionRefused,
    Effect,
    OwnContribution,
    PeersLate,
    Persist,
    PhaseChanged,
    Proposal,
    ReduceFailed,
    RoundChecks,
    RoundPhase,
    RoundRecord,
    RoundSetup,
    RoundTiming,
    Send,
)
from peer.swarm.round_votes import VoteBox
from protos.contract.certificate import contributions_digest
from protos.muster.v1 import common_pb2, rounds_pb2

_MAX_ATTEMPTS_AHEAD = 1000
_LAST_ATTEMPT = 2**31
"""Attempts are uint32 on the wire; far below its end nothing is listened to any more."""
_MOST_FIRST_TO_FAIL = 4
MAX_REASON_CHARS = 2000
"""Of what is shown to people, or told to others; members say what they like."""


class RoundCore:
    """State shared by the two roles of one member in one outer step."""

    def __init__(
        self,
        *,
        setup: RoundSetup,
        checks: RoundChecks,
        timing: RoundTiming,
        record: RoundRecord,
        newest_directive: common_pb2.Signed,
    ) -> None:
        self.setup = setup
        self.checks = checks
        self.timing = timing
        vote = record.highest_vote
        self.record = record
        if vote is not None and not self.names_this_round(vote.value):
            self.record = RoundRecord(incarnation=setup.incarnation, outer_step=setup.outer_step)
        self.roster = list(setup.directive.roster)
        self.entry_by_peer = {entry.peer_id: entry for entry in self.roster}
        self.others = tuple(p for p in self.entry_by_peer if p != setup.own_peer_id)
        self.votes = VoteBox(self.roster)
        self.own: OwnContribution | None = None
        self.attempt = 0
        self.phase = RoundPhase.FORM
        self.unreachable: set[str] = set()
        self._first_to_fail: dict[int, str] = {}
        """By attempt of this step, who ended it or held it up, and proved nobody's fault."""
        self.accusations = Accusations(num_members=len(self.roster))
        self.last_contributors: frozenset[str] = frozenset()
        """Members that brought something into the last group that was averaged here."""
        self.last_members: frozenset[str] = frozenset()
        """All of that group, as long as its bytes come from its reducers."""
        self.num_failed_reductions = 0
        self._late_attempts_by_peer: dict[str, set[int]] = {}
        self.at_step: set[str] = set()
        """Members whose last answer shows that they hold the previous state of this step."""
        self.contributions_by_digest: dict[bytes, bytes] = {}
        self.newest_directive = newest_directive
        self.newest_number = setup.directive.directive_number
        self.is_paused = setup.directive.is_paused
        self.directive_by_number: dict[int, common_pb2.Signed] = {}
        self.learn_directive(newest_directive)
        self._effects: list[Effect] = []
        self.refused_proposal = ""
        """Why the last proposal got no vote; said along with what happens next, until a vote is
        cast.
        """
        self._shown = (RoundPhase.FORM, "")

    # Effects ----------------------------------------------------------------------------------

    def emit(self, effect: Effect) -> None:
        """Ask the shell for something."""
        self._effects.append(effect)

    def take_effects(self) -> list[Effect]:
        """Hand over what was asked for since the last call."""
        effects, self._effects = self._effects, []
        return effects

    def send(self, peer_ids: tuple[str, ...], *, attempt: int, **body: Any) -> None:
        """Send one message body to some members."""
        if peer_ids:
            message = rounds_pb2.RoundMessage(
                incarnation=self.setup.incarnation,
                outer_step=self.setup.outer_step,
                attempt=attempt,
                **body,
            )
            self.emit(Send(peer_ids, message))

    def refuse(
        self,
        *peer_ids: str,
        attempt: int,
        kind: int,
        reason: str,
        to_attempt: int = 0,
        accused: str = "",
    ) -> None:
        """Tell senders that their message, or an attempt, cannot be used."""
        refusal = rounds_pb2.RoundRefusal(
            reason=reason[:MAX_REASON_CHARS],
            kind=kind,  # type: ignore[arg-type]
            attempt=to_attempt,
            accused_peer_id=accused,
        )
        self.send(peer_ids, attempt=attempt, refusal=refusal)

    def persist(self, **changes: Any) -> None:
        """Change the record and write it before anything that follows."""
        self.record = replace(self.record, **changes)
        self.emit(Persist(self.record))

    def show(self, phase: RoundPhase, reason: str) -> None:
        """Tell people, when the phase or its reason changes."""
        if self.refused_proposal and phase is not RoundPhase.DONE:
            reason = f"{reason}; {self.refused_proposal}"
        reason = reason[:MAX_REASON_CHARS]
        if (phase, reason) != self._shown:
            self._shown = (phase, reason)
            self.emit(PhaseChanged(phase, reason))

    # Directives -------------------------------------------------------------------------------

    def learn_directive(self, signed: common_pb2.Signed) -> common_pb2.Directive | None:
        """Keep a valid directive's content; the newest is proposed by whoever leads."""
        directive = self.checks.check_directive(signed)
        if directive is None or directive.directive_number < self.setup.directive.directive_number:
            return None
        self.directive_by_number[directive.directive_number] = signed
        if directive.directive_number >= self.newest_number:
            self.newest_number = directive.directive_number
            self.newest_directive = signed
            self.is_paused = directive.is_paused
        return directive

    # Attempts ---------------------------------------------------------------------------------

    def note_late(self, attempt: int, peer_ids: frozenset[str]) -> None:
        """A reduction failed because of these members."""
        for peer_id in peer_ids:
            self._late_attempts_by_peer.setdefault(peer_id, set()).add(attempt)

    def hear_late(self, event: PeersLate) -> None:
        """A reduction was given up that has waited for members."""
        self.note_late(event.attempt, event.peer_ids)
        if event.only_waiting and event.attempt not in self._first_to_fail:
            self._note_first_to_fail(event.attempt, event.only_waiting)

    @property
    def late(self) -> frozenset[str]:
        """Members that were late in so many attempts of this step that they are left out of it."""
        return frozenset(
            peer_id
            for peer_id, attempts in self._late_attempts_by_peer.items()
            if len(attempts) >= (1 if peer_id in self.setup.on_trial else MAX_LATE_ATTEMPTS)
        )

    @property
    def left_out(self) -> frozenset[str]:
        """Members that this one does not ask when it leads, as long as others have work."""
        return self.setup.left_out | self.late

    @property
    def not_awaited(self) -> frozenset[str]:
        """Members that no group waits for, and no attempt follows."""
        return self.accusations.left_out | self.unreachable

    def hear_ack(self, event: Acked) -> None:
        """A member lives, and says which state it holds."""
        self.unreachable.discard(event.sender)
        place = (event.ack.incarnation, event.ack.outer_step + 1)
        self.is_from_later(event.sender, *place)
        if place == (self.setup.incarnation, self.setup.outer_step):
            self.at_step.add(event.sender)

    def hear_accusation(self, accuser: str, accused: str, reason: str) -> None:
        """A member says whose bytes ended an attempt; if it is us, what we bring is dropped."""
        if accused in self.entry_by_peer:
            self.accusations.add(accuser, accused, reason, group=self.last_contributors)
        self.drop_refused_own()

    def hear_failure(
        self, sender: str, attempt: int, refusal: rounds_pb2.RoundRefusal, *, is_first: bool
    ) -> None:
        """A member has given an attempt up; `is_first` if we have not."""
        self.hear_accusation(sender, refusal.accused_peer_id, refusal.reason)
        if is_first and attempt == self.attempt and not refusal.accused_peer_id:
            self._note_first_to_fail(attempt, sender)

    def _note_first_to_fail(self, attempt: int, peer_id: str) -> None:
        """Whoever ends attempts again and again, or says in them that it waits for others until
        they are over, and proves nobody's fault, counts as late: it may be its own.
        """
        self._first_to_fail[attempt] = peer_id
        if list(self._first_to_fail.values()).count(peer_id) >= _MOST_FIRST_TO_FAIL:
            self.note_late(attempt, frozenset((peer_id,)))

    def judge_failure(self, event: ReduceFailed) -> str:
        """Draw the conclusions from a reduction that failed here; returns whom to accuse."""
        if event.told_by:
            self._note_first_to_fail(event.attempt, event.told_by)
        if not event.peer_id:
            return ""
        if event.is_down:
            self.unreachable.add(event.peer_id)
        if not event.is_invalid:
            self.note_late(event.attempt, frozenset((event.peer_id,)))
            return ""
        self.hear_accusation(self.setup.own_peer_id, event.peer_id, event.reason)
        return event.peer_id

    def drop_refused_own(self) -> None:
        """Bring nothing into a step that leaves us out."""
        reason = self.accusations.reason_against(self.setup.own_peer_id)
        if reason and self.own is not None and self.own.contribution.ranges:
            self.own = None
            self.emit(ContributionRefused(reason))

    @property
    def max_attempt(self) -> int:
        """Highest attempt listened to: nobody may run the numbers out."""
        record = self.record
        known = max(self.attempt, record.promised_attempt, record.led_attempt)
        return min(known + _MAX_ATTEMPTS_AHEAD, _LAST_ATTEMPT)

    # Voting -----------------------------------------------------------------------------------

    def names_this_round(self, value: bytes) -> bool:
        """True if a serialised value belongs to this run, incarnation and step."""
        setup = self.setup
        try:
            found = rounds_pb2.RoundValue.FromString(value)
        except DecodeError:
            return False
        place = (found.run_id, found.incarnation, found.outer_step)
        return place == (setup.run_id, setup.incarnation, setup.outer_step)

    @property
    def has_own_vote(self) -> bool:
        """True if this member votes under the directive in force."""
        return bool(self.entry_by_peer[self.setup.own_peer_id].has_vote)

    def value_of_group(self, group: rounds_pb2.FormGroup, averaged_digest: bytes) -> Proposal:
        """Value that a reduction in this attempt proves, as every member computes it."""
        contributions = rounds_pb2.Contributions(
            contributions=[member.contribution for member in group.members]
        ).SerializeToString()
        directive = common_pb2.Directive.FromString(group.next_directive.payload)
        value = rounds_pb2.RoundValue(
            run_id=self.setup.run_id,
            incarnation=self.setup.incarnation,
            outer_step=self.setup.outer_step,
            roster_directive_number=self.setup.directive.directive_number,
            averaged_digest=averaged_digest,
            contributions_digest=contributions_digest(contributions),
            previous_state_digest=self.setup.previous_state_digest,
            next_directive_number=directive.directive_number,
        )
        return Proposal(
            value=value.SerializeToString(),
            attempt=self.attempt,
            contributions=contributions,
            next_directive=group.next_directive,
            holders=(self.setup.own_peer_id,),
        )

    def check_proposal(self, proposal: Proposal) -> str:
        """Empty if a vote for the value would be right, else why not."""
        value, setup = rounds_pb2.RoundValue.FromString(proposal.value), self.setup
        found = (value.run_id, value.incarnation, value.outer_step, value.roster_directive_number)
        wanted = (
            setup.run_id,
            setup.incarnation,
            setup.outer_step,
            setup.directive.directive_number,
        )
        if found != wanted:
            return f"value is for {found}, this round is {wanted}"
        if value.previous_state_digest != setup.previous_state_digest:
            return "value continues another state than ours"
        if contributions_digest(proposal.contributions) != value.contributions_digest:
            return "contributions do not match the value's digest"
        directive = self.learn_directive(proposal.next_directive)
        if directive is None or directive.directive_number != value.next_directive_number:
            return f"no valid content of directive {value.next_directive_number}"
        contributions = rounds_pb2.Contributions.FromString(proposal.contributions).contributions
        return self.check_contributions(list(contributions))

    def check_contributions(self, contributions: list[rounds_pb2.Contribution]) -> str:
        """Empty if these members' contributions may be averaged together."""
        peers = [contribution.peer_id for contribution in contributions]
        if peers != sorted(set(peers)):
            return "contributions are not ordered by distinct peer_id"
        num_tokens = 0
        for contribution in contributions:
            if contribution.peer_id not in self.entry_by_peer:
                return f"{contribution.peer_id} is not in roster {wanted_number(self.setup)}"
            verdict = self.checks.check_contribution(contribution)
            if verdict.reason:
                return f"contribution of {contribution.peer_id}: {verdict.reason}"
            num_tokens += verdict.num_tokens
        return "" if num_tokens > 0 else "contributions hold no tokens"

    def may_vote(self, attempt: int) -> bool:
        """The rule that keeps two quorums from different values."""
        voted = self.record.highest_vote
        return (
            self.has_own_vote
            and attempt >= self.record.promised_attempt
            and (voted is None or voted.attempt < attempt)
        )

    def cast_vote(self, proposal: Proposal) -> bool:
        """Vote for a checked proposal whose bytes are held, durably first; False if the rule
        forbids.
        """
        if not self.may_vote(proposal.attempt):
            return False
        vote = self.checks.sign_vote(proposal.value, proposal.attempt)
        self.persist(
            promised_attempt=proposal.attempt,
            highest_vote=vote,
            contributions=proposal.contributions,
            next_directive=proposal.next_directive,
        )
        self.votes.add(vote, current_attempt=self.attempt)
        self.refused_proposal = ""
        self.send_own_vote(self.others)
        return True

    def send_own_vote(self, peer_ids: tuple[str, ...]) -> None:
        """Send (again) the highest vote cast."""
        vote = self.record.highest_vote
        if vote is not None:
            self.send(peer_ids, attempt=vote.attempt, vote=vote)

    def exchange_answer(self) -> rounds_pb2.ExchangeAnswer:
        """What an exchange learns from this member."""
        return rounds_pb2.ExchangeAnswer(
            highest_vote=self.record.highest_vote,
            contributions=self.record.contributions,
            newest_directive=self.newest_directive,
            previous_state_digest=self.setup.previous_state_digest,
            next_directive=self.record.next_directive,
        )

    def is_from_later(self, peer_id: str, incarnation: int, outer_step: int) -> bool:
        """True, and `Behind` emitted, if somebody has gone past this step (`outer_step` = its
        next).
        """
        ahead = (incarnation, outer_step) > (self.setup.incarnation, self.setup.outer_step)
        if ahead:
            reason = (
                f"{peer_id} is at outer step {outer_step} of incarnation {incarnation}, "
                f"we at {self.setup.outer_step} of {self.setup.incarnation}"
            )
            self.emit(Behind(peer_id, incarnation, outer_step, reason))
        return ahead


def shortened(refusal: rounds_pb2.RoundRefusal) -> rounds_pb2.RoundRefusal:
    """The same with a reason that may be kept and told to others."""
    short = rounds_pb2.RoundRefusal()
    short.CopyFrom(refusal)
    short.reason = refusal.reason[:MAX_REASON_CHARS]
    return short


def wanted_number(setup: RoundSetup) -> int:
    """Number of the directive in force."""
    return setup.directive.directive_number


def backoff_seconds(attempt: int) -> float:
    """Extra patience of later attempts, so that rival leaders drift apart: 0, 0, 0.25 ... 20 s."""
    return 0.0 if attempt < 2 else float(min(20.0, 0.25 * 1.6 ** (min(attempt, 20) - 2)))
