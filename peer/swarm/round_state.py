"""The round machine of one member for one (incarnation, outer step): a pure consensus on one value.

Attempts are ballots. Phases of an attempt: FORM (join the leader's group), REDUCE (average), AGREE
(vote until a quorum of equal votes is a certificate). An attempt that fails changes nothing; the
next one begins with an exchange, and a value that may have been decided is proposed again
unchanged. Events and the time come in, effects go out in order; `peer/swarm/replica.py` is the
shell. `tests/peer/swarm/test_round_safety.py` is the model that checks the rules.
"""

from google.protobuf.message import DecodeError

from peer.swarm.pace import reduce_deadline_seconds
from peer.swarm.reduce_slices import expected_seconds
from peer.swarm.round_agree import AgreeSide
from peer.swarm.round_core import MAX_REASON_CHARS, RoundCore, backoff_seconds, shortened
from peer.swarm.round_leader import LeaderSide, own_join, problem_with_group, proposal_from
from peer.swarm.round_proposer import contributors_of, links_of, members_of
from peer.swarm.round_types import (
    AbortReduce,
    Acked,
    AttemptDiscarded,
    Behind,
    BytesFetched,
    CertificateKnown,
    Contributed,
    ContributionRefused,
    CoordinatorExchanged,
    CoordinatorVoted,
    DirectiveKnown,
    Effect,
    Event,
    PeersLate,
    PeerUnreachable,
    Proposal,
    Received,
    ReduceDone,
    ReduceFailed,
    ReduceMoved,
    RoundChecks,
    RoundPhase,
    RoundRecord,
    RoundSetup,
    RoundTiming,
    StartReduce,
    TimingLearnt,
)
from protos.muster.v1 import common_pb2, rounds_pb2

_NEVER = float("inf")
_FAILED = rounds_pb2.REFUSAL_KIND_ATTEMPT_FAILED
_SUPERSEDED = rounds_pb2.REFUSAL_KIND_SUPERSEDED


class RoundMachine:
    """One member's part in one outer step; `handle` is its only door."""

    def __init__(
        self,
        *,
        setup: RoundSetup,
        checks: RoundChecks,
        timing: RoundTiming,
        record: RoundRecord,
        newest_directive: common_pb2.Signed,
        now_seconds: float,
    ) -> None:
        self._core = RoundCore(
            setup=setup,
            checks=checks,
            timing=timing,
            record=record,
            newest_directive=newest_directive,
        )
        self.now_seconds = now_seconds
        self._agree = AgreeSide(self._core, self)
        self._leader = LeaderSide(self._core, self)
        self._first_due_seconds = _NEVER
        self.attempt_begin_seconds = now_seconds
        self.phase_deadline_seconds = _NEVER
        self._next_resend_seconds = now_seconds
        self._group: rounds_pb2.FormGroup | None = None
        self.is_reducing = False
        self._is_in_group_before = False
        record = self._core.record
        vote = record.highest_vote
        self._core.attempt = max(record.promised_attempt, record.led_attempt + 1)
        if vote is not None:
            self._core.votes.add(vote, current_attempt=self._core.attempt)
            self._agree.remember_contributions(vote.value, record.contributions)
            if vote.attempt == self._core.attempt:
                self.enter_agree("voted before a restart")
            self._agree.check_certificate((vote.attempt, vote.value))
        self._leader.enter(now_seconds)

    # The door ---------------------------------------------------------------------------------

    @property
    def setup(self) -> RoundSetup:
        """What the round is about."""
        return self._core.setup

    @property
    def attempt(self) -> int:
        """Current attempt."""
        return self._core.attempt

    @property
    def phase(self) -> RoundPhase:
        """Current phase."""
        return self._core.phase

    @property
    def leader_peer_id(self) -> str:
        """Leader of the current attempt."""
        return self._leader.leader(self._core.attempt)

    @property
    def num_failed_reductions(self) -> int:
        """Of this step so far."""
        return self._core.num_failed_reductions

    @property
    def late(self) -> frozenset[str]:
        """Members that were left out because they were late in this step."""
        return self._core.late

    def handle(self, event: Event, *, now_seconds: float) -> list[Effect]:
        """Take one event (a Tick is time alone); returns effects to carry out in order. Nothing
        happens after `Commit`.
        """
        if self._core.phase is RoundPhase.DONE:
            return self._core.take_effects()
        self.now_seconds = now_seconds
        match event:
            case Received():
                self._on_message(event.sender, event.message)
            case Acked():
                self._core.hear_ack(event)
            case TimingLearnt():
                self._core.timing = event.timing
            case Contributed():
                self._core.own = event.own
                self._core.drop_refused_own()
                self._leader.join_own()
                self._send_join()
            case ReduceDone():
                self._on_reduce_done(event)
            case ReduceFailed():
                self._on_reduce_failed(event)
            case ReduceMoved() if self._core.timing.is_guessed and event.attempt == self.attempt:
                self._allow_bytes(0.0)
            case BytesFetched():
                self._agree.on_bytes(event.averaged_digest)
            case PeerUnreachable():
                self._core.unreachable.add(event.peer_id)
            case PeersLate():
                self._core.hear_late(event)
            case CoordinatorExchanged():
                self._on_coordinator_exchanged(event)
            case CoordinatorVoted():
                self._agree.on_coordinator(event.response)
                if event.response is not None and event.response.reason:
                    self._core.show(RoundPhase.NO_QUORUM, f"coordinator: {event.response.reason}")
            case DirectiveKnown():
                self._core.learn_directive(event.directive)
            case CertificateKnown():
                self._agree.on_certificate(event.certificate)
        self._work()
        return self._core.take_effects()

    def hold_bytes(self, averaged_digest: bytes) -> None:
        """The shell holds these averaged bytes already."""
        self._agree.hold(averaged_digest)

    # Time -------------------------------------------------------------------------------------

    def _work(self) -> None:
        """Whatever is due now: forming, giving up, repeating."""
        core, now = self._core, self.now_seconds
        if core.phase is RoundPhase.DONE:
            return
        if self._first_due_seconds == _NEVER and (self._has_own_work() or self._leader.has_work()):
            self._first_due_seconds = now
            self._next_resend_seconds = now
        is_resend = now >= self._next_resend_seconds
        if is_resend:
            self._next_resend_seconds = now + core.timing.resend_seconds
        if core.phase is RoundPhase.FORM:
            self._work_form(is_resend)
        elif now >= self._deadline_seconds():
            reason = f"{core.phase} took longer than allowed"
            if core.phase is RoundPhase.AGREE and core.record.highest_vote is not None:
                vote = core.record.highest_vote
                reason += "; " + core.votes.explain(core.votes.voters((vote.attempt, vote.value)))
                core.show(RoundPhase.NO_QUORUM, reason)
            self.supersede(core.attempt + 1, reason)
        if is_resend and core.phase is RoundPhase.AGREE:
            core.send_own_vote(core.others)
            self._agree.fetch_pending()
        if is_resend:
            self._leader.ask_again(now)
        self._agree.maybe_submit()

    def _deadline_seconds(self) -> float:
        """When the phase after forming is given up."""
        deadline_seconds = self.phase_deadline_seconds
        is_agree = self._core.phase is RoundPhase.AGREE
        return self._agree.patience_seconds(deadline_seconds) if is_agree else deadline_seconds

    def _work_form(self, is_resend: bool) -> None:
        core, now = self._core, self.now_seconds
        if self._leader.proposer is not None:
            missing = self._leader.try_form(now, self._form_deadline_seconds())
            if is_resend and self._leader.has_work():
                core.send(missing, attempt=core.attempt, nudge=rounds_pb2.Nudge())
            return
        if not self._is_pushing():
            return
        leader = self.leader_peer_id
        if self._leader.is_passed_over(core.attempt):
            self.supersede(core.attempt + 1, f"leader {leader} cannot be reached or is too slow")
        elif now >= self._patience_seconds():
            self.supersede(core.attempt + 1, f"leader {leader} formed no group in time")
        elif is_resend:
            self._send_join()

    def _form_deadline_seconds(self) -> float:
        """When the leader stops waiting for the missing."""
        timing = self._core.timing
        deadline = self._first_due_seconds + timing.form_wait_seconds
        if self._core.attempt > 0:
            rejoin = self.attempt_begin_seconds + timing.rejoin_wait_seconds
            return rejoin if self._is_in_group_before else max(deadline, rejoin)
        return deadline

    def _patience_seconds(self) -> float:
        """When a member stops waiting for the leader."""
        core = self._core
        due = self.attempt_begin_seconds if core.attempt else self._first_due_seconds
        due = self.attempt_begin_seconds if due == _NEVER else due
        wait = core.timing.grace_seconds + backoff_seconds(core.attempt)
        if core.attempt > 0:
            wait += core.timing.exchange_wait_seconds + core.timing.rejoin_wait_seconds
        if not self._is_in_group_before:
            wait += core.timing.form_wait_seconds
        return due + wait

    def _has_own_work(self) -> bool:
        return (own := self._core.own) is not None and len(own.contribution.ranges) > 0

    def _is_pushing(self) -> bool:
        """Members with work or with a vote in flight keep the round going; idle ones follow."""
        return self._has_own_work() or self._core.record.highest_vote is not None

    # Attempts ---------------------------------------------------------------------------------

    def supersede(self, attempt: int, reason: str) -> None:
        """Give the current attempt up and go on to a later one; skips leaders that nobody waits
        for.
        """
        core = self._core
        if attempt <= core.attempt or core.phase is RoundPhase.DONE:
            return
        for _ in core.roster:
            if not self._leader.is_passed_over(attempt):
                break
            attempt += 1
        if self.is_reducing:
            self.is_reducing = False
            core.num_failed_reductions += 1
            core.emit(AbortReduce(core.attempt, reason))
        core.emit(AttemptDiscarded(core.attempt, reason[:MAX_REASON_CHARS]))
        core.attempt, core.phase, self._group = attempt, RoundPhase.FORM, None
        self.attempt_begin_seconds = self.now_seconds
        self.phase_deadline_seconds = _NEVER
        core.show(RoundPhase.FORM, f"attempt {attempt}: {reason}")
        self._leader.enter(self.now_seconds)
        self._leader.join_own()
        self._send_join()

    def follow(self, sender: str, attempt: int, reason: str) -> None:
        """Go on to an attempt that a member asks for; while we average only if we have no measured
        patience of our own, and it was in the group, so that it has given the group up.
        """
        core = self._core
        has_left = core.timing.is_guessed and sender in core.last_members
        if core.phase is RoundPhase.FORM or (has_left and core.phase is RoundPhase.REDUCE):
            self.supersede(attempt, reason)

    def _send_join(self) -> None:
        """Ask the leader in; without anything to bring, only make it begin."""
        core = self._core
        leader = self.leader_peer_id
        if leader == core.setup.own_peer_id or core.phase is not RoundPhase.FORM:
            return
        if leader in core.unreachable:  # and so are the others: any of them may be back
            others = tuple(core.unreachable - {leader})
            core.send(others, attempt=core.attempt, nudge=rounds_pb2.Nudge())
        if core.own is not None:
            core.send((leader,), attempt=core.attempt, join_group=own_join(core))
        elif core.attempt > 0:
            core.send((leader,), attempt=core.attempt, nudge=rounds_pb2.Nudge())

    # Messages ---------------------------------------------------------------------------------

    def _on_message(self, sender: str, message: rounds_pb2.RoundMessage) -> None:
        core = self._core
        if sender not in core.entry_by_peer:
            return
        core.unreachable.discard(sender)
        place = (message.incarnation, message.outer_step)
        if place != (core.setup.incarnation, core.setup.outer_step):
            core.is_from_later(sender, *place)
            return
        if message.attempt > core.max_attempt and message.WhichOneof("body") != "certificate":
            core.show(
                core.phase,
                f"message of {sender} refused: attempt {message.attempt}; at most "
                f"{core.max_attempt}",
            )
            return
        try:
            self._on_body(sender, message.attempt, message)
        except DecodeError as error:
            core.show(core.phase, f"message of {sender} dropped: {error}")

    def _on_body(self, sender: str, attempt: int, message: rounds_pb2.RoundMessage) -> None:
        body = message.WhichOneof("body")
        is_leader = self._leader.hear(sender, attempt, body)
        match body:
            case "join_group":
                self._leader.on_join(sender, attempt, message.join_group)
            case "form_group" if is_leader:
                self.accept_group(attempt, message.form_group)
            case "vote":
                self._agree.on_vote(message.vote)
            case "exchange_request" if is_leader:
                self._on_exchange_request(sender, attempt)
            case "exchange_answer":
                self._leader.on_exchange_answer(sender, attempt, message.exchange_answer)
            case "repropose" if is_leader:
                self._on_repropose(sender, attempt, message.repropose)
            case "certificate":
                self._agree.on_certificate(message.certificate)
            case "refusal":
                self._on_refusal(sender, attempt, shortened(message.refusal))
            case "nudge":
                self._on_nudge(sender, attempt)

    def _on_nudge(self, sender: str, attempt: int) -> None:
        core = self._core
        if attempt > core.attempt and self._leader.is_own(attempt):
            self.follow(sender, attempt, f"{sender} asks for attempt {attempt}")
        elif attempt > core.attempt and sender == self._leader.leader(attempt):
            self.follow(sender, attempt, f"{sender} leads attempt {attempt}")
        elif attempt == core.attempt and core.own is not None:
            self._send_join()

    def _on_exchange_request(self, sender: str, attempt: int) -> None:
        """Answering is a promise: written first, never to vote in a lower attempt."""
        core = self._core
        if attempt < (later := core.record.promised_attempt):
            reason = f"attempt {later} is promised"
            core.refuse(sender, attempt=attempt, kind=_SUPERSEDED, reason=reason, to_attempt=later)
            return
        if not core.has_own_vote:
            return
        if attempt > core.record.promised_attempt:
            core.persist(promised_attempt=attempt)
        core.send((sender,), attempt=attempt, exchange_answer=core.exchange_answer())
        self.supersede(attempt, f"{sender} leads attempt {attempt}")

    def _on_refusal(self, sender: str, attempt: int, refusal: rounds_pb2.RoundRefusal) -> None:
        core, kind = self._core, refusal.kind
        if kind in (rounds_pb2.REFUSAL_KIND_RESYNC, rounds_pb2.REFUSAL_KIND_NOT_A_MEMBER):
            setup = core.setup
            core.emit(Behind(sender, setup.incarnation, setup.outer_step, refusal.reason))
        elif kind == _SUPERSEDED and self._leader.may_supersede(sender, attempt):
            self.supersede(min(refusal.attempt, core.max_attempt), f"{sender}: {refusal.reason}")
        elif kind == rounds_pb2.REFUSAL_KIND_INVALID:
            if sender == self._leader.leader(attempt) and core.own is not None:
                core.own = None
                core.emit(ContributionRefused(f"{sender}: {refusal.reason}"))
        elif kind == _FAILED:
            core.hear_failure(sender, attempt, refusal, is_first=self.is_reducing)
            is_outside = self._group is not None and sender not in members_of(self._group)
            if attempt != core.attempt or is_outside:
                return
            if core.phase is RoundPhase.AGREE:
                self._agree.failed.add(sender)
                self._leader.repropose_to(sender)
            elif self._group is not None or sender == self.leader_peer_id:
                self._is_in_group_before = True
                self.supersede(attempt + 1, f"{sender}: {refusal.reason}")

    # Reduce -----------------------------------------------------------------------------------

    def accept_group(self, attempt: int, group: rounds_pb2.FormGroup) -> None:
        """Average with the leader's group, if it is the first one of this attempt and keeps the
        rules.
        """
        core = self._core
        if attempt < core.attempt or attempt < core.record.promised_attempt:
            return
        self.supersede(attempt, f"group of attempt {attempt} has formed")
        if core.attempt != attempt or core.phase is not RoundPhase.FORM or self._group is not None:
            return
        problem, accused = problem_with_group(core, group, leader=self._leader.leader(attempt))
        if problem:
            tell = core.others if accused else (self._leader.leader(attempt),)
            core.hear_accusation(core.setup.own_peer_id, accused, problem)
            tell = tuple(peer for peer in tell if peer != core.setup.own_peer_id)
            self._fail_attempt(f"group refused: {problem}", tell, accused)
            return
        members = members_of(group)
        if core.setup.own_peer_id not in members:
            return
        self._group, core.phase, self.is_reducing = group, RoundPhase.REDUCE, True
        core.last_members, core.last_contributors = members, contributors_of(group)
        self._is_in_group_before, self.attempt_begin_seconds = True, self.now_seconds
        links, size = links_of(group.members, core.entry_by_peer), core.setup.vector_bytes
        self._allow_bytes(expected_seconds(links, group.reducer_piece_ends, vector_bytes=size))
        core.show(RoundPhase.REDUCE, f"averaging with {len(members)} members, attempt {attempt}")
        core.emit(StartReduce(attempt, group))

    def _allow_bytes(self, seconds: float) -> None:
        """The averaged bytes of the attempt may take so long, or what past rounds let expect."""
        core = self._core
        self.phase_deadline_seconds = self.now_seconds + reduce_deadline_seconds(
            core.timing, expected_seconds=seconds, num_failed=core.num_failed_reductions
        )

    def _on_reduce_done(self, event: ReduceDone) -> None:
        core = self._core
        self._agree.hold(event.averaged_digest)
        if event.attempt != core.attempt or not self.is_reducing or self._group is None:
            return
        self.is_reducing = False
        proposal = core.value_of_group(self._group, event.averaged_digest)
        self._agree.remember_contributions(proposal.value, proposal.contributions)
        self.enter_agree(f"averaged, attempt {event.attempt}")
        core.cast_vote(proposal)
        self._agree.check_certificate((proposal.attempt, proposal.value))
        members = members_of(self._group)
        outside = tuple(p for p in core.others if p not in members)
        if self._leader.is_own(event.attempt) and not core.votes.is_quorum(members):
            for peer_id in outside:
                self._leader.repropose_to(peer_id)

    def _on_reduce_failed(self, event: ReduceFailed) -> None:
        core, group = self._core, self._group
        if event.attempt == core.attempt and self.is_reducing:
            accused = core.judge_failure(event)
            members = members_of(group) if group else frozenset()
            tell = tuple(p for p in core.others if p in members)
            self._fail_attempt(event.reason, tell, accused)
        elif event.is_invalid:  # whoever broke the attempt was the first to end it
            core.refuse(
                *core.others,
                attempt=event.attempt,
                kind=_FAILED,
                reason=event.reason,
                accused=core.judge_failure(event),
            )

    def _fail_attempt(self, reason: str, tell: tuple[str, ...], accused: str = "") -> None:
        attempt = self._core.attempt
        self._core.refuse(*tell, attempt=attempt, kind=_FAILED, reason=reason, accused=accused)
        self.supersede(attempt + 1, reason)

    # Agree ------------------------------------------------------------------------------------

    def enter_agree(self, reason: str) -> None:
        """The attempt has got as far as voting."""
        self._agree.begin(reason)

    def consider(self, proposal: Proposal) -> None:
        """A proposal made again: some may have to fetch its bytes, so all wait as for averaging."""
        if self._core.phase is not RoundPhase.REDUCE and self.phase_deadline_seconds == _NEVER:
            self._allow_bytes(0.0)
        self._core.last_members = frozenset()  # bytes come from holders, not from reducers
        self._agree.consider(proposal)

    def _on_repropose(self, sender: str, attempt: int, repropose: rounds_pb2.Repropose) -> None:
        core = self._core
        if attempt < (later := core.record.promised_attempt):
            reason = f"attempt {later} is promised"
            core.refuse(sender, attempt=attempt, kind=_SUPERSEDED, reason=reason, to_attempt=later)
            return
        voted = core.record.highest_vote
        if voted is not None and (voted.attempt, voted.value) == (attempt, repropose.value):
            core.send_own_vote((sender,))
            return
        if core.phase is not RoundPhase.REDUCE:
            self.supersede(attempt, f"{sender} proposes again in attempt {attempt}")
        self.consider(proposal_from(repropose, attempt))

    def _on_coordinator_exchanged(self, event: CoordinatorExchanged) -> None:
        self._agree.on_coordinator(event.response)
        self._leader.on_coordinator(event.attempt, event.response)
