"""The session machine by tables: each case is a timeline of events and what must come of it."""

import dataclasses

import pytest

from peer import session_events as ev
from peer.session import MAX_DEATHS
from peer.session_events import ChildName
from peer.session_link import GRACE_SECONDS
from protos.contract.telemetry import RoundOutcome, SessionState
from tests.peer.session_timeline import (
    AWAY,
    BACK,
    IDLE_PHASE,
    JOINED,
    ROUND_TOKENS,
    WINDOW_TOKENS,
    Timeline,
    contribution,
    ended,
    grant,
    nothing,
    state_reached,
    training_peer,
)


@pytest.fixture
def training() -> Timeline:
    return training_peer()


def test_from_idle_to_training() -> None:
    timeline = Timeline()
    steps: list[tuple[ev.Event, SessionState]] = [
        (ev.Tick(jitter_ratio=0.0), SessionState.IDLE),
        (ev.JoinBegun(reason="joining"), SessionState.JOINING),
        (JOINED, SessionState.SYNCING),
        (ev.ChildReady(child=ChildName.SWARM), SessionState.SYNCING),
        (state_reached(0), SessionState.SYNCING),
        (IDLE_PHASE, SessionState.SYNCING),
        (ev.DatasetReady(), SessionState.SYNCING),
        (ev.ChildReady(child=ChildName.TRAINER), SessionState.TRAINING),
    ]
    for event, state in steps:
        decision = timeline.feed(event)
        assert (decision.state, decision.reason != "") == (state, True), event
    assert timeline.take(ev.TellStateReady) == [
        ev.TellStateReady(incarnation=1, outer_step=0, round_tokens=ROUND_TOKENS)
    ]


def test_asks_for_two_rounds_of_work_once() -> None:
    timeline = Timeline()
    timeline.feed(JOINED, ev.ChildReady(child=ChildName.SWARM), state_reached(0))
    asked = timeline.take(ev.AcquireLeases)
    assert asked == [ev.AcquireLeases(incarnation=1, wanted_tokens=2 * ROUND_TOKENS, held_tokens=0)]
    timeline.wait(1.0)
    assert timeline.take(ev.AcquireLeases) == []


def test_a_peer_without_a_round_budget_waits_and_says_so() -> None:
    timeline = Timeline()
    timeline.feed(
        JOINED,
        ev.ChildReady(child=ChildName.SWARM),
        ev.DatasetReady(),
        ev.ChildReady(child=ChildName.TRAINER),
        state_reached(0, round_tokens=0),
        IDLE_PHASE,
    )
    assert timeline.state is SessionState.WAITING
    assert timeline.last is not None and "roster" in timeline.last.reason
    assert timeline.take(ev.AcquireLeases) == [] and timeline.take(ev.TellStateReady) == []
    timeline.feed(state_reached(1))
    assert len(timeline.take(ev.TellStateReady)) == 1


def test_a_joiner_has_its_leases_before_its_roster_is_in_force() -> None:
    """Asks as soon as the newest directive gives it tokens, and trains under that one only; until
    then it takes part in rounds without work.
    """
    timeline = Timeline()
    timeline.feed(
        JOINED,
        ev.ChildReady(child=ChildName.SWARM),
        ev.DatasetReady(),
        ev.ChildReady(child=ChildName.TRAINER),
        state_reached(3, round_tokens=0),
        IDLE_PHASE,
    )
    assert timeline.take(ev.TellSwarmIdle)[-1] == ev.TellSwarmIdle(is_idle=True)
    assert timeline.take(ev.AcquireLeases) == []
    coming = dataclasses.replace(state_reached(4, round_tokens=0), coming_tokens=ROUND_TOKENS)
    timeline.feed(coming)
    assert timeline.take(ev.AcquireLeases) == [
        ev.AcquireLeases(incarnation=1, wanted_tokens=2 * ROUND_TOKENS, held_tokens=0)
    ]
    timeline.feed(grant(1, 2), ev.LeaseFetched(lease_number=1), ev.LeaseFetched(lease_number=2))
    assert timeline.state is SessionState.WAITING
    assert len(timeline.take(ev.SendLeases)) == 2
    assert timeline.take(ev.TellStateReady) == [] and timeline.take(ev.TellSwarmIdle) == []
    timeline.feed(state_reached(5))
    assert len(timeline.take(ev.TellStateReady)) == 1
    assert timeline.take(ev.TellSwarmIdle) == [ev.TellSwarmIdle(is_idle=False)]
    assert timeline.take(ev.AcquireLeases) == []


def test_a_peer_of_a_new_run_is_waited_for_while_its_trainer_starts() -> None:
    timeline = Timeline()
    before = state_reached(0, incarnation=0, round_tokens=0)
    timeline.feed(JOINED, ev.ChildReady(child=ChildName.SWARM), before, state_reached(0))
    assert timeline.take(ev.TellSwarmIdle) == [ev.TellSwarmIdle(is_idle=False)]


def test_a_paused_run_leases_nothing_for_later() -> None:
    timeline = Timeline()
    paused = state_reached(3, round_tokens=0, is_paused=True)
    timeline.feed(JOINED, ev.ChildReady(child=ChildName.SWARM))
    timeline.feed(dataclasses.replace(paused, coming_tokens=ROUND_TOKENS))
    assert timeline.take(ev.AcquireLeases) == []


def test_refills_below_one_and_a_half_rounds(training: Timeline) -> None:
    assert training.take(ev.AcquireLeases) == []
    training.feed(contribution(5, [(1, 0, 16)]))
    assert training.take(ev.AcquireLeases) == [
        ev.AcquireLeases(incarnation=1, wanted_tokens=ROUND_TOKENS, held_tokens=ROUND_TOKENS)
    ]


def test_backs_off_and_lets_the_trainer_make_do(training: Timeline) -> None:
    training.feed(contribution(5, [(1, 0, 16), (2, 0, 16)]), nothing())
    assert len(training.take(ev.AcquireLeases)) == 1
    assert training.take(ev.TellNoMoreLeases) == [ev.TellNoMoreLeases(is_exhausted=False)]
    waits = []
    for _ in range(5):
        waited_seconds = 0.0
        while not training.take(ev.AcquireLeases):
            training.wait(0.5)
            waited_seconds += 0.5
        waits.append(waited_seconds)
        training.feed(nothing())
    assert waits == [1.0, 2.0, 4.0, 8.0, 8.0]
    assert training.take(ev.TellNoMoreLeases) == []
    training.feed(grant(3))
    training.feed(nothing(is_exhausted=True))
    assert training.take(ev.TellNoMoreLeases) == []
    training.feed(ev.LeaseFetched(lease_number=3), ev.LeasesNeeded())
    assert len(training.take(ev.SendLeases)) == 1
    assert training.take(ev.TellNoMoreLeases) == [ev.TellNoMoreLeases(is_exhausted=True)]


def test_heartbeats_are_jittered_and_renew_what_is_held(training: Timeline) -> None:
    training.wait(0.0)
    beats = training.take(ev.SendHeartbeat)
    assert [action.lease_numbers for action in beats] == [(1, 2)]
    answered = ev.HeartbeatAnswered(
        heartbeat_interval_seconds=10.0, lost_lease_numbers=(), is_run_over=False, run_reason=""
    )
    training.feed(answered)
    training.now_seconds += 7.4
    training.feed(ev.Tick(jitter_ratio=0.0))
    assert training.take(ev.SendHeartbeat) == []
    training.now_seconds += 5.2
    training.feed(ev.Tick(jitter_ratio=0.0))
    assert len(training.take(ev.SendHeartbeat)) == 1


def test_lost_leases_are_told_and_forgotten(training: Timeline) -> None:
    training.feed(
        ev.HeartbeatAnswered(
            heartbeat_interval_seconds=10.0,
            lost_lease_numbers=(2, 99),
            is_run_over=False,
            run_reason="",
        )
    )
    assert training.take(ev.TellLostLeases) == [ev.TellLostLeases(lease_numbers=(2,))]
    assert training.machine.leases.renewed_numbers == (1,)


def test_trains_on_without_the_coordinator_for_the_grace(training: Timeline) -> None:
    training.feed(AWAY, AWAY)
    assert training.take(ev.TellSwarmCoordinator) == [ev.TellSwarmCoordinator(is_reachable=False)]
    training.feed(contribution(5, [(1, 0, 16), (2, 0, 16)]), ended(RoundOutcome.COMMITTED, 6))
    training.feed(state_reached(6), ev.TrainerIdle(is_idle=True))
    assert training.take(ev.AcquireLeases) == []
    assert training.take(ev.TellSwarmIdle) == [ev.TellSwarmIdle(is_idle=True)]
    decision = training.wait(1.0)
    assert decision.state is SessionState.WAITING
    assert "WAITING_FOR_COORDINATOR" in decision.reason
    training.wait(GRACE_SECONDS)
    assert training.take(ev.TellPause) == [ev.TellPause(is_paused=True)]
    training.feed(BACK)
    assert training.take(ev.TellPause) == [ev.TellPause(is_paused=False)]
    assert len(training.take(ev.AcquireLeases)) == 1


def test_a_paused_run_pauses_the_trainer(training: Timeline) -> None:
    decision = training.feed(state_reached(6, is_paused=True))
    assert training.take(ev.TellPause) == [ev.TellPause(is_paused=True)]
    assert (decision.state, "paused" in decision.reason) == (SessionState.WAITING, True)
    training.feed(state_reached(7))
    assert training.take(ev.TellPause) == [ev.TellPause(is_paused=False)]


def test_another_incarnation_drops_leases_and_resyncs(training: Timeline) -> None:
    training.feed(contribution(5, [(1, 0, 16)]), state_reached(4, incarnation=2))
    assert training.take(ev.TellLostLeases) == [ev.TellLostLeases(lease_numbers=(1, 2))]
    assert training.take(ev.ReleaseLeases) == []
    told = training.take(ev.TellRoundOutcome)
    assert [(a.outcome, a.incarnation, a.outer_step) for a in told] == [(RoundOutcome.RESYNC, 2, 4)]
    training.take(ev.AcquireLeases)
    training.feed(grant(7, incarnation=1))
    assert training.machine.leases.renewed_numbers == ()
    assert [action.incarnation for action in training.take(ev.AcquireLeases)] == [2]


def test_a_dead_trainer_is_replaced_and_its_leases_return(training: Timeline) -> None:
    training.feed(ev.TrainingProgressed(contribution_tokens=WINDOW_TOKENS))
    training.feed(ev.ChildDied(child=ChildName.TRAINER, reason="killed"))
    assert training.take(ev.ReleaseLeases) == [
        ev.ReleaseLeases(lease_numbers=(1,), reason="killed")
    ]
    assert training.take(ev.Respawn) == [ev.Respawn(child=ChildName.TRAINER, reason="killed")]
    assert training.take(ev.TellSwarmIdle) == [ev.TellSwarmIdle(is_idle=True)]
    assert training.state is SessionState.SYNCING
    training.feed(ev.ChildReady(child=ChildName.TRAINER))
    sent = training.take(ev.SendLeases)
    assert [part.lease_number for action in sent for part in action.parts] == [2]
    assert len(training.take(ev.TellStateReady)) == 1
    assert training.take(ev.TellSwarmIdle) == [ev.TellSwarmIdle(is_idle=False)]


def test_a_dead_trainer_does_not_take_its_contribution_along(training: Timeline) -> None:
    training.feed(contribution(5, [(1, 0, 16)]))
    training.feed(ev.ChildDied(child=ChildName.TRAINER, reason="killed"))
    released = training.take(ev.ReleaseLeases)
    assert [action.lease_numbers for action in released] == [(2,)]
    training.feed(ended(RoundOutcome.COMMITTED, 6), state_reached(6))
    training.feed(ev.CertificatesAcknowledged(outer_step=6))
    assert training.machine.leases.renewed_numbers == ()


def test_a_dead_swarm_process_ends_the_round_for_the_trainer(training: Timeline) -> None:
    training.feed(contribution(5, [(1, 0, 16)]))
    training.feed(ev.ChildDied(child=ChildName.SWARM, reason="killed"))
    assert training.take(ev.ReleaseLeases)[0].lease_numbers == (1,)
    assert len(training.take(ev.Respawn)) == 1
    training.feed(ev.ChildReady(child=ChildName.SWARM), state_reached(5), IDLE_PHASE)
    told = training.take(ev.TellRoundOutcome)
    assert [action.outcome for action in told] == [RoundOutcome.RESYNC]


def test_a_child_that_keeps_dying_ends_the_session(training: Timeline) -> None:
    for _ in range(MAX_DEATHS):
        training.feed(ev.ChildDied(child=ChildName.TRAINER, reason="out of memory"))
    assert len(training.take(ev.Respawn)) == MAX_DEATHS
    decision = training.feed(ev.ChildDied(child=ChildName.TRAINER, reason="out of memory"))
    drains = training.take(ev.BeginDrain)
    assert (decision.state, [action.exit_code for action in drains]) == (SessionState.DRAINING, [7])
    assert "out of memory" in drains[0].reason


def test_out_of_memory_halves_the_micro_batch_and_ends_at_one_window(training: Timeline) -> None:
    """8, 4, 2, 1: more deaths than are forgiven otherwise; then nothing is left to try."""
    death = ev.ChildDied(child=ChildName.TRAINER, reason="no memory", is_out_of_memory=True)
    for sequences in (8, 4, 2):
        training.feed(ev.ChildReady(child=ChildName.TRAINER, micro_batch_sequences=sequences))
        training.feed(death)
        (respawn,) = training.take(ev.Respawn)
        assert respawn.max_micro_batch_sequences == sequences // 2
        assert f"{sequences // 2} windows from now on, not {sequences}" in respawn.reason
    training.feed(ev.ChildReady(child=ChildName.TRAINER, micro_batch_sequences=1))
    training.feed(death)
    (drain,) = training.take(ev.BeginDrain)
    assert drain.exit_code == 4 and training.take(ev.Respawn) == []
    for part in ("one window at a time", "fits this machine", "free memory"):
        assert part in drain.reason


def test_a_lost_device_costs_no_lease(training: Timeline) -> None:
    before = training.machine.leases.renewed_numbers
    assert before
    training.feed(
        ev.ChildDied(child=ChildName.TRAINER, reason="local rank 1 hangs", has_lost_device=True)
    )
    assert len(training.take(ev.Respawn)) == 1 and training.take(ev.ReleaseLeases) == []
    training.feed(ev.ChildReady(child=ChildName.TRAINER, micro_batch_sequences=8))
    (sent,) = training.take(ev.SendLeases)
    assert tuple(part.lease_number for part in sent.parts) == before
    assert training.machine.leases.renewed_numbers == before


def test_out_of_memory_with_one_window_recomputes_activations_once(training: Timeline) -> None:
    death = ev.ChildDied(child=ChildName.TRAINER, reason="no memory", is_out_of_memory=True)
    ready = ev.ChildReady(child=ChildName.TRAINER, micro_batch_sequences=1, can_save_memory=True)
    training.feed(ready, death)
    (respawn,) = training.take(ev.Respawn)
    assert respawn.saves_memory and "recomputed from now on" in respawn.reason
    training.feed(dataclasses.replace(ready, can_save_memory=False), death)
    assert [action.exit_code for action in training.take(ev.BeginDrain)] == [4]


def test_a_trainer_that_cannot_be_planned_for_what_is_left_ends_the_session(
    training: Timeline,
) -> None:
    """The first death is answered by another trainer; that one finds that nothing fits."""
    training.feed(ev.ChildDied(child=ChildName.TRAINER, reason="local rank 1 was killed"))
    assert len(training.take(ev.Respawn)) == 1
    reason = "2.00 GiB are missing"
    training.feed(ev.ChildDied(child=ChildName.TRAINER, reason=reason, exit_code=4))
    (drain,) = training.take(ev.BeginDrain)
    assert drain.exit_code == 4 and reason in drain.reason


def test_out_of_memory_before_the_first_micro_batch_is_refused(training: Timeline) -> None:
    """Not ready means that it was still probing single windows."""
    death = ev.ChildDied(child=ChildName.TRAINER, reason="no memory", is_out_of_memory=True)
    training.feed(ev.ChildDied(child=ChildName.TRAINER, reason="killed"), death)
    assert [action.exit_code for action in training.take(ev.BeginDrain)] == [4]


@pytest.mark.parametrize(
    ("reason", "exit_code"), [("the port is taken", 4), ("the votes are damaged", 5)]
)
def test_a_child_that_this_machine_cannot_run_ends_the_session_at_once(
    reason: str, exit_code: int
) -> None:
    timeline = Timeline()
    timeline.feed(ev.ChildDied(child=ChildName.SWARM, reason=reason, exit_code=exit_code))
    assert timeline.take(ev.BeginDrain) == [ev.BeginDrain(reason=reason, exit_code=exit_code)]


def test_a_child_that_could_run_before_is_started_again(training: Timeline) -> None:
    event = ev.ChildDied(child=ChildName.SWARM, reason="the port is taken", exit_code=4)
    training.feed(event)
    assert training.take(ev.BeginDrain) == [] and len(training.take(ev.Respawn)) == 1


def test_a_trainer_that_found_the_run_to_fail_ends_the_session_at_once(training: Timeline) -> None:
    """Not finite five times in a row, in the middle of training: the next trainer would do the
    same."""
    reason = "loss or gradient not finite, 5 in a row"
    training.feed(ev.TrainingProgressed(contribution_tokens=512))
    death = ev.ChildDied(child=ChildName.TRAINER, reason=reason, exit_code=7)
    decision = training.feed(death)
    assert training.take(ev.BeginDrain) == [ev.BeginDrain(reason=reason, exit_code=7)]
    assert training.take(ev.Respawn) == [] and len(training.take(ev.ReleaseLeases)) == 1
    assert decision.state is SessionState.DRAINING and decision.reason == reason


def test_deaths_far_apart_are_forgiven(training: Timeline) -> None:
    for _ in range(3 * MAX_DEATHS):
        training.feed(ev.ChildDied(child=ChildName.TRAINER, reason="killed"))
        training.wait(300.0)
    assert training.take(ev.BeginDrain) == []


def test_a_refused_session_joins_again_without_its_leases(training: Timeline) -> None:
    training.feed(ev.SessionRefused(reason="ended"), ev.SessionRefused(reason="ended"))
    assert len(training.take(ev.Rejoin)) == 1
    training.wait(30.0)
    assert training.take(ev.SendHeartbeat) == []
    training.feed(ev.Joined(heartbeat_interval_seconds=10, incarnation=1, has_lost_leases=True))
    assert training.take(ev.TellLostLeases) == [ev.TellLostLeases(lease_numbers=(1, 2))]
    training.wait(0.0)
    assert len(training.take(ev.SendHeartbeat)) == 1


def test_duties_wait_for_their_step_and_are_done_once(training: Timeline) -> None:
    offer = ev.DutyOffered(duty_id="d1", fence=1, kind=ev.DutyKind.EVALUATE, min_outer_step=6)
    training.feed(offer, offer)
    assert training.take(ev.PerformDuty) == []
    decision = training.feed(state_reached(6))
    assert len(training.take(ev.PerformDuty)) == 1
    assert decision.state is SessionState.ON_DUTY
    training.wait(60.0)
    assert [(b.duty_id, b.duty_fence) for b in training.take(ev.SendHeartbeat)] == [("d1", 1)]
    training.feed(ev.DutyEnded(duty_id="d1", fence=1), offer)
    assert training.take(ev.PerformDuty) == []
    training.feed(
        ev.DutyOffered(duty_id="d1", fence=2, kind=ev.DutyKind.EVALUATE, min_outer_step=6)
    )
    assert len(training.take(ev.PerformDuty)) == 1


def test_a_duty_that_waits_is_renewed_and_follows_its_fence() -> None:
    """A trial given back and offered anew before its dataset is here is done under the new fence
    only; work under way is not disturbed."""
    timeline = Timeline()
    first, second, third = (
        ev.DutyOffered(duty_id="t", fence=fence, kind=ev.DutyKind.TRIAL, min_outer_step=0)
        for fence in (1, 2, 3)
    )
    answer = ev.HeartbeatFailed(reason="")
    timeline.feed(JOINED, first)
    timeline.wait(60.0)
    timeline.feed(answer, second)
    timeline.wait(60.0)
    sent = timeline.take(ev.SendHeartbeat)
    assert [(beat.duty_id, beat.duty_fence) for beat in sent] == [("t", 1), ("t", 2)]
    timeline.feed(ev.DatasetReady(), answer, third)
    timeline.wait(60.0)
    assert [action.fence for action in timeline.take(ev.PerformDuty)] == [2]
    assert [beat.duty_fence for beat in timeline.take(ev.SendHeartbeat)] == [2]


def test_a_trial_needs_the_dataset_and_no_state() -> None:
    timeline = Timeline()
    offer = ev.DutyOffered(duty_id="t", fence=1, kind=ev.DutyKind.TRIAL, min_outer_step=0)
    timeline.feed(offer)
    assert timeline.take(ev.PerformDuty) == []
    timeline.feed(ev.DatasetReady())
    (action,) = timeline.take(ev.PerformDuty)
    assert action.kind is ev.DutyKind.TRIAL


def test_the_end_of_the_run_drains_with_exit_code_0(training: Timeline) -> None:
    training.feed(
        ev.HeartbeatAnswered(
            heartbeat_interval_seconds=10.0,
            lost_lease_numbers=(),
            is_run_over=True,
            run_reason="run FINISHED: all credited",
        )
    )
    assert training.take(ev.BeginDrain) == [
        ev.BeginDrain(reason="run FINISHED: all credited", exit_code=0)
    ]
    training.wait(60.0)
    assert training.actions == []
    decision = training.feed(ev.Left(reason="run FINISHED"))
    assert decision.state is SessionState.LEFT
    assert training.feed(state_reached(9)).state is SessionState.LEFT


def test_a_chunk_that_cannot_be_had_returns_its_lease(training: Timeline) -> None:
    training.feed(ev.LeaseUnusable(lease_number=2, reason="digest differs"))
    assert training.take(ev.ReleaseLeases) == [
        ev.ReleaseLeases(lease_numbers=(2,), reason="digest differs")
    ]
