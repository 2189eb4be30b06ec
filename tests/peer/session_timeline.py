"""A session machine with a clock, and the events that its tests feed it."""

from collections.abc import Iterable

from peer import session_events as ev
from peer.lease_holdings import GrantedLease, UsedRange
from peer.session import Decision, SessionMachine
from peer.session_events import ChildName
from protos.contract.telemetry import RoundOutcome, RoundPhase, SessionState

WINDOW_TOKENS = 256
ROUND_TOKENS = 4096


class Timeline:
    """A machine with a clock and everything that it has decided."""

    def __init__(self) -> None:
        self.machine = SessionMachine()
        self.now_seconds = 100.0
        self.actions: list[ev.Action] = []
        self.last: Decision | None = None

    def feed(self, *events: ev.Event) -> Decision:
        for event in events:
            self.last = self.machine.handle(event, now_seconds=self.now_seconds)
            self.actions += self.last.actions
        assert self.last is not None
        return self.last

    def wait(self, seconds: float) -> Decision:
        self.now_seconds += seconds
        return self.feed(ev.Tick(jitter_ratio=0.5))

    def take(self, kind: type) -> list:
        """Actions of one kind since the last look; all others are forgotten too."""
        found = [action for action in self.actions if isinstance(action, kind)]
        self.actions = [action for action in self.actions if not isinstance(action, kind)]
        return found

    @property
    def state(self) -> SessionState:
        assert self.last is not None
        return self.last.state


def state_reached(
    step: int,
    *,
    incarnation: int = 1,
    round_tokens: int = ROUND_TOKENS,
    is_paused: bool = False,
    state_digest: bytes = b"",
) -> ev.StateReached:
    return ev.StateReached(
        incarnation=incarnation,
        outer_step=step,
        round_tokens=round_tokens,
        is_paused=is_paused,
        state_digest=state_digest,
    )


def grant(*numbers: int, incarnation: int = 1, windows: int = 16) -> ev.LeasesGranted:
    leases = tuple(
        GrantedLease(
            lease_number=number, begin_window=0, end_window=windows, tokens_per_window=WINDOW_TOKENS
        )
        for number in numbers
    )
    return ev.LeasesGranted(
        incarnation=incarnation, leases=leases, reason="", is_budget_exhausted=False
    )


def nothing(*, is_exhausted: bool = False) -> ev.LeasesGranted:
    return ev.LeasesGranted(
        incarnation=1, leases=(), reason="nothing is free", is_budget_exhausted=is_exhausted
    )


def contribution(
    step: int, ranges: Iterable[tuple[int, int, int]], *, number: int = 1
) -> ev.ContributionReady:
    return ev.ContributionReady(
        offer_number=number,
        incarnation=1,
        outer_step=step,
        ranges=tuple(
            UsedRange(lease_number=number, begin_window=begin, end_window=end)
            for number, begin, end in ranges
        ),
    )


def ended(outcome: RoundOutcome, step: int, *, number: int = 1) -> ev.RoundEnded:
    return ev.RoundEnded(
        outcome=outcome, incarnation=1, outer_step=step, reason="because", offer_number=number
    )


JOINED = ev.Joined(heartbeat_interval_seconds=10.0, incarnation=1, has_lost_leases=False)
IDLE_PHASE = ev.PhaseChanged(phase=RoundPhase.IDLE, reason="between rounds")
AWAY = ev.CoordinatorReachable(is_reachable=False, reason="connection refused")
BACK = ev.CoordinatorReachable(is_reachable=True, reason="it answers")


def training_peer() -> Timeline:
    """A peer in the middle of training with leases 1 and 2 of one round each."""
    timeline = Timeline()
    timeline.feed(
        ev.JoinBegun(reason="joining"),
        JOINED,
        ev.ChildReady(child=ChildName.SWARM),
        ev.DatasetReady(),
        ev.ChildReady(child=ChildName.TRAINER),
        state_reached(5),
        IDLE_PHASE,
        grant(1, 2),
        ev.LeaseFetched(lease_number=1),
        ev.LeaseFetched(lease_number=2),
    )
    timeline.actions.clear()
    return timeline
