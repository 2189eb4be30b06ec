"""The session machine: what this peer does, why, and what happens next. Pure: events and time in,
state and actions out.

The state is not stored but derived, after every event, from a few facts (session_state.py), so it
can never contradict them; each state comes with a sentence. Three kinds of decisions live here:

- leases: hold about two rounds of work; when nothing is granted, back off and tell the trainer to
  make do with what it has;
- time: when to send the next heartbeat, when 30 minutes without the coordinator end training (not
  membership);
- faults: what a dead trainer or swarm process, a lost lease, a new incarnation or a discarded round
  means for the others.

The trainer is told of a new state only when it matches an outcome it waits for: a round's outcome
is held back until the swarm process has announced the state that belongs to it.
"""

from dataclasses import dataclass, replace

from peer import session_events as ev
from peer.lease_holdings import LeaseHoldings
from peer.session_link import CoordinatorLink
from peer.session_state import OpenDuty, Position, SessionFacts, derive_state
from protos.contract.errors import CorruptDataError, MachineError, RunFailedError, UsageError
from protos.contract.telemetry import RoundOutcome, RoundPhase, SessionState

MAX_DEATHS = 3
"""Deaths of one child within DEATH_WINDOW_SECONDS that are answered by starting it again."""
UNFIT_EXIT_CODES = (UsageError.exit_code, MachineError.exit_code, CorruptDataError.exit_code)
"""A child that ends with one of them before it was ever ready would do so again."""
DEATH_WINDOW_SECONDS = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What a peer is in after an event, why, and what is to be done, in order."""

    state: SessionState
    reason: str
    actions: tuple[ev.Action, ...]


class SessionMachine:
    """One peer's session. `now_seconds` is any clock that never goes back."""

    def __init__(self) -> None:
        self._facts = SessionFacts()
        self._link = CoordinatorLink()
        self._has_told_no_more = False
        self.leases = LeaseHoldings()
        self._actions: list[ev.Action] = []
        self._now_seconds = 0.0

    def handle(self, event: ev.Event, *, now_seconds: float) -> Decision:
        """Take in an event; returns the state after it, why, and what is to be done."""
        self._now_seconds = now_seconds
        self._actions = []
        if self._facts.left_reason is None:
            self._take_in(event)
            self._tell_trainer()
            if isinstance(event, ev.Tick) and self._facts.drain_reason is None:
                self._plan_heartbeat(event.jitter_ratio)
            self._plan_leases()
            self._plan_duty()
        state, reason = derive_state(self._facts, self._link, self.leases, now_seconds=now_seconds)
        return Decision(state=state, reason=reason, actions=tuple(self._actions))

    # Events.

    def _take_in(self, event: ev.Event) -> None:
        facts, link = self._facts, self._link
        match event:
            case ev.JoinBegun():
                facts.join_reason = event.reason
            case ev.Joined():
                self._on_joined(event)
            case ev.CoordinatorReachable():
                self._on_reachable(event)
            case ev.DatasetReady():
                facts.is_dataset_ready = True
            case ev.ChildReady():
                self._on_child_ready(event)
            case ev.ChildDied():
                self._on_child_died(event)
            case ev.StateReached():
                self._on_state(event)
            case ev.PhaseChanged():
                facts.phase, facts.phase_reason = event.phase, event.reason
            case ev.RoundEnded():
                self._on_round_ended(event)
            case ev.TrainingProgressed():
                facts.contribution_tokens = event.contribution_tokens
            case ev.TrainerIdle():
                facts.is_trainer_idle = event.is_idle
                self._tell_swarm_idle(event.is_idle)
            case ev.ContributionReady():
                self._on_contribution(event)
            case ev.CertificatesAcknowledged():
                self.leases.acknowledge(event.outer_step)
                link.take_grant(self._now_seconds)  # what was held is credited: there may be more
            case ev.HeartbeatAnswered() | ev.HeartbeatFailed():
                self._on_heartbeat(event)
            case ev.SessionRefused():
                link.is_heartbeat_under_way = link.is_acquiring = False
                if not link.is_rejoining and facts.drain_reason is None:
                    link.is_rejoining = True
                    self._do(ev.Rejoin(reason=event.reason))
            case ev.DutyOffered():
                self._on_duty_offered(event)
            case ev.DutyEnded():
                facts.last_duty = (event.duty_id, event.fence)
                if facts.duty is not None and facts.duty.event.duty_id == event.duty_id:
                    facts.duty = None
            case ev.StopRequested():
                self._begin_drain(event.reason, event.exit_code)
            case ev.Left():
                facts.left_reason = event.reason
            case ev.Tick():
                self._set_trainer_pause()
            case _:
                self._on_lease_event(event)

    def _on_joined(self, event: ev.Joined) -> None:
        self._facts.is_joined = True
        link = self._link
        link.join(
            heartbeat_interval_seconds=event.heartbeat_interval_seconds,
            now_seconds=self._now_seconds,
        )
        if event.has_lost_leases:
            self._lose_all_leases()

    def _on_reachable(self, event: ev.CoordinatorReachable) -> None:
        if self._link.set_reachable(
            event.is_reachable, event.reason, now_seconds=self._now_seconds
        ):
            self._do(ev.TellSwarmCoordinator(is_reachable=event.is_reachable))
            self._set_trainer_pause()

    def _on_child_ready(self, event: ev.ChildReady) -> None:
        self._facts.proven_children.add(event.child)
        if event.child is ev.ChildName.SWARM:
            self._facts.is_swarm_ready = True
            self._do(ev.TellSwarmCoordinator(is_reachable=self._link.is_reachable))
            self._do(ev.TellSwarmIdle(is_idle=self._facts.is_swarm_told_idle))
        else:
            self._facts.is_trainer_ready = True
            self._facts.micro_batch_sequences = event.micro_batch_sequences
            self._facts.can_save_memory = event.can_save_memory
            self._set_trainer_pause()
            self._send_leases()

    def _on_child_died(self, event: ev.ChildDied) -> None:
        facts = self._facts
        if facts.drain_reason is not None:
            return
        was_training = facts.is_trainer_ready
        if event.child is ev.ChildName.SWARM:
            facts.is_swarm_ready = False
            facts.position = None
            facts.phase, facts.phase_reason = RoundPhase.SYNC, event.reason
            if facts.is_contributing:
                self._discard_contribution(event.reason)
        else:
            facts.is_trainer_ready = facts.is_trainer_paused = facts.is_trainer_idle = False
            facts.trainer_position = None
            facts.outcome = None
            if event.has_lost_device or event.is_out_of_memory:
                self.leases.take_back()
            else:
                self._release(self.leases.take_begun(facts.contribution_tokens), event.reason)
            facts.contribution_tokens = 0
            self._has_told_no_more = False
            if not facts.is_contributing:
                self._tell_swarm_idle(True)
            if facts.duty is not None and facts.duty.event.kind is ev.DutyKind.EVALUATE:
                facts.duty.is_begun = False
        if event.is_out_of_memory and event.child is ev.ChildName.TRAINER:
            self._on_out_of_memory(
                event, sequences=max(1, facts.micro_batch_sequences * was_training)
            )
            return
        code = event.exit_code
        is_unfit = code in UNFIT_EXIT_CODES and event.child not in facts.proven_children
        if code is not None and (is_unfit or code == RunFailedError.exit_code):
            self._begin_drain(event.reason, exit_code=code)  # the next would end as this one
            return
        deaths = facts.deaths_by_child.setdefault(event.child, [])
        deaths[:] = [at for at in deaths if self._now_seconds - at < DEATH_WINDOW_SECONDS]
        deaths.append(self._now_seconds)
        if len(deaths) > MAX_DEATHS:
            minutes = DEATH_WINDOW_SECONDS / 60
            reason = (
                f"the {event.child} process died {len(deaths)} times in {minutes:.0f} minutes: "
                f"{event.reason}"
            )
            self._begin_drain(reason, exit_code=RunFailedError.exit_code)
        else:
            if event.child is ev.ChildName.TRAINER:
                facts.proven_children.discard(event.child)  # it is planned for what is left
            self._do(ev.Respawn(child=event.child, reason=event.reason))

    def _on_out_of_memory(self, event: ev.ChildDied, *, sequences: int) -> None:
        """Half the micro-batch takes about half the memory. A trainer that never got ready has
        probed single windows only. Halving ends by itself, so it does not count as a death.
        """
        if sequences > 1:
            half = sequences // 2
            reason = f"{event.reason}; micro-batches of {half} windows from now on, not {sequences}"
            action = ev.Respawn(child=event.child, reason=reason, max_micro_batch_sequences=half)
            self._do(action)
            return
        if self._facts.can_save_memory:
            self._facts.can_save_memory = False
            reason = f"{event.reason}; activations are recomputed from now on"
            self._do(ev.Respawn(child=event.child, reason=reason, saves_memory=True))
            return
        error = MachineError(
            f"the trainer is out of memory with one window at a time: {event.reason}",
            allowed="a model whose training step with one window fits this machine's memory",
            remedy="free memory, lend a larger machine, or join a run with a smaller model",
        )
        self._begin_drain(str(error), exit_code=error.exit_code)

    def _on_state(self, event: ev.StateReached) -> None:
        facts = self._facts
        old = facts.position or facts.trainer_position
        place = (event.incarnation, event.outer_step)
        facts.position = Position(*place, event.round_tokens, event.state_digest)
        if event.incarnation > 0 and not event.round_tokens and facts.trainer_position is None:
            self._tell_swarm_idle(True)
        facts.coming_tokens = event.coming_tokens
        facts.is_run_paused = event.is_paused
        if old is not None and old.incarnation != event.incarnation:
            facts.is_contributing = False
            facts.outcome = None
            self._lose_all_leases()
        if old is None or old.incarnation != event.incarnation or event.round_tokens == 0:
            self._link.hasten_heartbeat(self._now_seconds)
        self._set_trainer_pause()

    def _on_round_ended(self, event: ev.RoundEnded) -> None:
        facts = self._facts
        if not facts.is_contributing or event.offer_number != facts.offer_number:
            return  # a round without this peer's work: the new state alone matters (_tell_trainer)
        if event.outcome is RoundOutcome.COMMITTED:
            facts.is_contributing = False
            self.leases.commit(event.outer_step)
            facts.outcome = event
        else:
            self._discard_contribution(event.reason, event)

    def _discard_contribution(self, reason: str, event: ev.RoundEnded | None = None) -> None:
        """The contribution under way came to nothing: its leases go back, the trainer drops its
        work.
        """
        facts = self._facts
        facts.is_contributing = False
        self.leases.forget(numbers := self.leases.discard_contribution())
        self._release(numbers, reason)
        facts.outcome = event or facts.lost_offer(reason)

    def _on_contribution(self, event: ev.ContributionReady) -> None:
        facts = self._facts
        facts.contribution_tokens = 0
        self.leases.contribute(event.ranges)
        facts.is_contributing, facts.offer_number = True, event.offer_number
        position = facts.position
        if not facts.is_swarm_ready or position is None:
            self._discard_contribution(facts.phase_reason)
        elif (event.incarnation, event.outer_step) != (position.incarnation, position.outer_step):
            self._discard_contribution(
                f"made for step {event.outer_step} of incarnation {event.incarnation}, "
                f"the state is step {position.outer_step} of incarnation {position.incarnation}"
            )
        else:
            self._do(ev.PassContribution())

    def _on_heartbeat(self, event: ev.HeartbeatAnswered | ev.HeartbeatFailed) -> None:
        link = self._link
        link.is_heartbeat_under_way = False
        if isinstance(event, ev.HeartbeatFailed):
            return
        link.heartbeat_interval_seconds = event.heartbeat_interval_seconds
        lost = self.leases.forget(event.lost_lease_numbers)
        if lost and self._facts.is_trainer_ready:
            self._do(ev.TellLostLeases(lease_numbers=lost))
        if event.is_run_over:
            self._begin_drain(event.run_reason, exit_code=0)

    def _on_duty_offered(self, event: ev.DutyOffered) -> None:
        """Take it, also in place of one that was not begun: the coordinator knows that one to be
        lost when it offers another, or the same one under a newer fence.
        """
        facts = self._facts
        if facts.last_duty == (event.duty_id, event.fence):
            return
        if facts.duty is None or not facts.duty.is_begun:
            facts.duty = OpenDuty(event)

    def _on_lease_event(self, event: ev.Event) -> None:
        facts, link = self._facts, self._link
        match event:
            case ev.LeasesGranted():
                self._on_granted(event)
            case ev.LeasesNotGranted():
                link.is_acquiring = False
                self._back_off(event.reason)
            case ev.LeasesNeeded():
                link.hasten_leases(self._now_seconds)
                if link.backoff_seconds > 0:
                    self._has_told_no_more = False
                    self._tell_no_more()
            case ev.LeaseFetched():
                self.leases.mark_fetched(event.lease_number)
                if facts.is_trainer_ready:
                    self._send_leases()
            case ev.LeaseUnusable():
                self._release(self.leases.forget([event.lease_number]), event.reason)
                self._back_off(event.reason)
                self._send_leases()
            case ev.LeasesReleasedByTrainer():
                self._release(self.leases.forget(event.lease_numbers), event.reason)
                facts.contribution_tokens = 0
            case _:
                raise AssertionError(f"event without a rule: {event}")

    def _on_granted(self, event: ev.LeasesGranted) -> None:
        link, position = self._link, self._facts.position
        link.is_acquiring = False
        link.is_exhausted = event.is_budget_exhausted
        if position is None or position.incarnation != event.incarnation:
            return  # another incarnation began and freed them
        if not event.leases:
            self._back_off(event.reason)
            return
        link.take_grant(self._now_seconds)
        self.leases.grant(event.leases)
        self._do(ev.FetchChunks(lease_numbers=tuple(lease.lease_number for lease in event.leases)))

    # Decisions.

    def _back_off(self, reason: str) -> None:
        """Nothing was granted: ask again later, and let the trainer make do with what it has."""
        self._link.back_off(reason, now_seconds=self._now_seconds)
        self._tell_no_more()

    def _tell_no_more(self) -> None:
        """Nothing is on its way: neither granted nor to be had now. `leases` takes it back."""
        if self._has_told_no_more or not self._facts.is_trainer_ready or self.leases.has_unsent:
            return
        self._has_told_no_more = True
        self._do(ev.TellNoMoreLeases(is_exhausted=self._link.is_exhausted))

    def _plan_leases(self) -> None:
        facts, link, position = self._facts, self._link, self._facts.position
        if facts.drain_reason is not None or not facts.is_joined or link.is_rejoining:
            return
        if position is None or (round_tokens := facts.tokens_to_lease) == 0:
            return
        if not link.is_reachable:
            link.no_lease_reason = f"WAITING_FOR_COORDINATOR: {link.lost_reason}"
            if self.leases.left_tokens < round_tokens:
                self._tell_no_more()
            return
        action = link.plan_leases(
            self.leases,
            incarnation=position.incarnation,
            round_tokens=round_tokens,
            now_seconds=self._now_seconds,
        )
        if action is not None:
            self._do(action)

    def _plan_heartbeat(self, jitter_ratio: float) -> None:
        if not self._facts.is_joined:
            return
        action = self._link.plan_heartbeat(
            self.leases,
            is_in_haste=self._is_in_haste(),
            jitter_ratio=jitter_ratio,
            now_seconds=self._now_seconds,
        )
        duty = self._facts.duty
        if action is not None and duty is not None:
            event = duty.event
            action = replace(action, duty_id=event.duty_id, duty_fence=event.fence)
        if action is not None:
            self._do(action)

    def _is_in_haste(self) -> bool:
        """True while a decision of the coordinator is awaited: roster, pause, end of the run."""
        position = self._facts.position
        is_out_of_work = self._link.is_exhausted and self._facts.is_trainer_idle
        no_part = position is not None and position.round_tokens == 0
        return no_part or is_out_of_work or self._facts.is_run_paused

    def _plan_duty(self) -> None:
        duty, position = self._facts.duty, self._facts.position
        if duty is None or duty.is_begun or self._facts.drain_reason is not None:
            return
        if duty.event.kind is ev.DutyKind.TRIAL:  # needs the text, not the run's state
            if not self._facts.is_dataset_ready:
                return
        elif position is None or position.outer_step < duty.event.min_outer_step:
            return
        if duty.event.kind is ev.DutyKind.EVALUATE and not self._facts.is_trainer_ready:
            return
        duty.is_begun = True
        event = duty.event
        self._do(ev.PerformDuty(duty_id=event.duty_id, fence=event.fence, kind=event.kind))

    def _tell_trainer(self) -> None:
        """Bring the trainer to the newest state, if it is free to follow."""
        facts, position = self._facts, self._facts.position
        if not facts.is_trainer_ready or position is None or facts.is_contributing:
            return
        if facts.drain_reason is not None:
            return
        if facts.trainer_position is None:
            if position.round_tokens == 0:
                return
            facts.trainer_position, facts.outcome, facts.offer_number = position, None, 0
            self._tell_swarm_idle(False)
            self._do(
                ev.TellStateReady(
                    incarnation=position.incarnation,
                    outer_step=position.outer_step,
                    round_tokens=position.round_tokens,
                )
            )
            return
        outcome = facts.outcome
        if outcome is not None and outcome.outcome is RoundOutcome.COMMITTED:
            if (position.incarnation, position.outer_step) < (
                outcome.incarnation,
                outcome.outer_step,
            ):
                return  # the state that belongs to it is still to come
        elif outcome is None and not facts.offer_number and position == facts.trainer_position:
            return
        offer_number, facts.offer_number = facts.offer_number, 0
        facts.trainer_position, facts.outcome = position, None
        if outcome is None:
            kind, reason = (
                RoundOutcome.RESYNC,
                f"state of step {position.outer_step} came without this peer",
            )
        else:
            kind, reason = outcome.outcome, outcome.reason
        self._do(
            ev.TellRoundOutcome(
                outcome=kind,
                incarnation=position.incarnation,
                outer_step=position.outer_step,
                round_tokens=position.round_tokens,
                reason=reason,
                offer_number=offer_number,
            )
        )

    def _tell_swarm_idle(self, is_idle: bool) -> None:
        if is_idle != self._facts.is_swarm_told_idle:
            self._facts.is_swarm_told_idle = is_idle
            self._do(ev.TellSwarmIdle(is_idle=is_idle))

    def _send_leases(self) -> None:
        parts = self.leases.take_sendable()
        if parts:
            self._has_told_no_more = False
            self._do(ev.SendLeases(parts=parts))

    def _lose_all_leases(self) -> None:
        numbers = self.leases.forget_all()
        self._facts.contribution_tokens = 0
        self._has_told_no_more = False
        self._link.start_over(self._now_seconds)
        if numbers and self._facts.is_trainer_ready:
            self._do(ev.TellLostLeases(lease_numbers=numbers))

    def _release(self, numbers: tuple[int, ...], reason: str) -> None:
        if numbers:
            self._do(ev.ReleaseLeases(lease_numbers=numbers, reason=reason))

    def _set_trainer_pause(self) -> None:
        should_pause = self._facts.is_run_paused or self._link.is_grace_over(self._now_seconds)
        if self._facts.is_trainer_ready and should_pause != self._facts.is_trainer_paused:
            self._facts.is_trainer_paused = should_pause
            self._do(ev.TellPause(is_paused=should_pause))

    def _begin_drain(self, reason: str, exit_code: int) -> None:
        if self._facts.drain_reason is None:
            self._facts.drain_reason = reason
            self._do(ev.BeginDrain(reason=reason, exit_code=exit_code))

    def _do(self, *actions: ev.Action) -> None:
        self._actions.extend(actions)
