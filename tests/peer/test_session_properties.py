"""Any order of events keeps what the session machine promises: no crash, no double renewal, no
stale order to a child.
"""

from hypothesis import given, settings
from hypothesis import strategies as st

from peer import session_events as ev
from peer.lease_holdings import GrantedLease, UsedRange
from peer.session import SessionMachine
from peer.session_events import ChildName
from protos.contract.telemetry import RoundOutcome, RoundPhase, SessionState

small = st.integers(0, 6)
numbers = st.lists(st.integers(1, 12), max_size=4, unique=True).map(tuple)
used = st.builds(
    UsedRange,
    lease_number=st.integers(1, 12),
    begin_window=st.just(0),
    end_window=st.integers(1, 4),
)
leases = st.lists(
    st.builds(
        GrantedLease,
        lease_number=st.integers(1, 12),
        begin_window=st.just(0),
        end_window=st.integers(1, 4),
        tokens_per_window=st.just(256),
    ),
    max_size=3,
    unique_by=lambda lease: lease.lease_number,
).map(tuple)
events = st.one_of(
    st.builds(ev.Tick, jitter_ratio=st.floats(0, 1)),
    st.builds(
        ev.Joined,
        heartbeat_interval_seconds=st.just(10.0),
        incarnation=small,
        has_lost_leases=st.booleans(),
    ),
    st.builds(ev.CoordinatorReachable, is_reachable=st.booleans(), reason=st.just("r")),
    st.just(ev.DatasetReady()),
    st.builds(ev.ChildReady, child=st.sampled_from(ChildName)),
    st.builds(ev.ChildDied, child=st.sampled_from(ChildName), reason=st.just("died")),
    st.builds(
        ev.StateReached,
        incarnation=st.integers(0, 2),
        outer_step=small,
        round_tokens=st.sampled_from([0, 1024]),
        is_paused=st.booleans(),
    ),
    st.builds(ev.PhaseChanged, phase=st.sampled_from(RoundPhase), reason=st.just("phase")),
    st.builds(
        ev.RoundEnded,
        outcome=st.sampled_from(RoundOutcome),
        incarnation=st.integers(0, 2),
        outer_step=small,
        reason=st.just("ended"),
        offer_number=st.integers(0, 3),
    ),
    st.just(ev.LeasesNeeded()),
    st.builds(
        ev.LeasesGranted,
        incarnation=st.integers(0, 2),
        leases=leases,
        reason=st.just("none"),
        is_budget_exhausted=st.booleans(),
    ),
    st.builds(ev.LeasesNotGranted, reason=st.just("away")),
    st.builds(ev.LeaseFetched, lease_number=st.integers(1, 12)),
    st.builds(ev.LeaseUnusable, lease_number=st.integers(1, 12), reason=st.just("bad")),
    st.builds(ev.LeasesReleasedByTrainer, lease_numbers=numbers, reason=st.just("dropped")),
    st.builds(ev.TrainingProgressed, contribution_tokens=st.integers(0, 2048)),
    st.builds(ev.TrainerIdle, is_idle=st.booleans()),
    st.builds(
        ev.ContributionReady,
        offer_number=st.integers(1, 3),
        incarnation=st.integers(0, 2),
        outer_step=small,
        ranges=st.lists(used, max_size=2).map(tuple),
    ),
    st.builds(ev.CertificatesAcknowledged, outer_step=small),
    st.builds(
        ev.HeartbeatAnswered,
        heartbeat_interval_seconds=st.just(10.0),
        lost_lease_numbers=numbers,
        is_run_over=st.just(False),
        run_reason=st.just("RUNNING"),
    ),
    st.builds(ev.HeartbeatFailed, reason=st.just("away")),
    st.builds(ev.SessionRefused, reason=st.just("ended")),
    st.builds(
        ev.DutyOffered,
        duty_id=st.sampled_from(["a", "b"]),
        fence=st.integers(1, 2),
        kind=st.sampled_from(ev.DutyKind),
        min_outer_step=small,
    ),
    st.builds(ev.DutyEnded, duty_id=st.sampled_from(["a", "b"]), fence=st.integers(1, 2)),
)
timelines = st.lists(st.tuples(events, st.floats(0.0, 5.0)), max_size=60)
TO_TRAINER = (
    ev.SendLeases, ev.TellLostLeases, ev.TellNoMoreLeases, ev.TellStateReady, ev.TellRoundOutcome,
    ev.TellPause,
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(timelines)
def test_any_order_of_events(timeline: list[tuple[ev.Event, float]]) -> None:
    machine = SessionMachine()
    now_seconds = 0.0
    is_trainer_ready = has_state = False
    num_asked = num_answered = num_beats = num_beats_answered = offer_number = 0
    for event, wait_seconds in timeline:
        now_seconds += wait_seconds
        if isinstance(event, ev.LeasesGranted | ev.LeasesNotGranted):
            if num_asked == num_answered:
                continue  # an answer comes only to a question
            num_answered += 1
        if isinstance(event, ev.HeartbeatAnswered | ev.HeartbeatFailed):
            if num_beats == num_beats_answered:
                continue
            num_beats_answered += 1
        is_ready = isinstance(event, ev.ChildReady) and event.child is ChildName.TRAINER
        if is_ready and is_trainer_ready:
            continue  # a process becomes ready once
        if isinstance(event, ev.ContributionReady):
            if not has_state or offer_number:
                continue  # made on a state, and after the verdict on the one before
            offer_number = event.offer_number
        decision = machine.handle(event, now_seconds=now_seconds)
        assert decision.reason
        if is_ready:
            is_trainer_ready, has_state = True, False
        died = isinstance(event, ev.ChildDied) and event.child is ChildName.TRAINER
        if died and decision.state is not SessionState.DRAINING:
            is_trainer_ready = has_state = False
            offer_number = 0
        for action in decision.actions:
            if isinstance(action, TO_TRAINER):
                assert is_trainer_ready, "orders go to a trainer that is there"
            if isinstance(action, ev.TellRoundOutcome):
                assert has_state, "an outcome follows a first state"
                assert action.offer_number in (0, offer_number), "a verdict names its offer"
                offer_number = 0 if action.offer_number else offer_number
            has_state = has_state or isinstance(action, ev.TellStateReady)
            if isinstance(action, ev.AcquireLeases):
                assert action.wanted_tokens > 0
                num_asked += 1
            num_beats += isinstance(action, ev.SendHeartbeat)
        if isinstance(event, ev.SessionRefused):
            num_answered, num_beats_answered = num_asked, num_beats
        assert num_asked - num_answered in (0, 1), "one question at a time"
        assert num_beats - num_beats_answered in (0, 1), "one heartbeat at a time"
        renewed = machine.leases.renewed_numbers
        assert len(set(renewed)) == len(renewed)
        assert machine.leases.left_tokens >= 0
