"""The clock during a session: a warning, then the end with the remedy if it stays too far off."""

from typing import Any, cast

from peer import session_events as ev
from peer.coordinator_client import ClockOffset
from peer.daemon.coordinator_tasks import CoordinatorTasks, Hooks
from peer.daemon.outbox import Outbox
from peer.daemon.reports import SessionNumbers


class Session:
    """Calls of a session without a coordinator: only what the daemon does with a measured clock."""

    def __init__(self) -> None:
        self.events: list[ev.Event] = []
        self.notes: list[str] = []
        self.numbers = SessionNumbers(peer_id="p", name="n")
        nothing = cast(Any, lambda *_: None)
        hooks = Hooks(
            feed=self.events.append,
            keep_membership=nothing,
            pass_certificates=nothing,
            pass_directive=nothing,
            acknowledge=nothing,
            note=self.notes.append,
            keep_trial=nothing,
        )
        self.calls = CoordinatorTasks(
            cast(Any, None), numbers=self.numbers, outbox=Outbox(), hooks=hooks
        )

    def measure(self, offset_seconds: float, uncertainty_seconds: float = 0.01) -> None:
        clock = ClockOffset(offset_seconds=offset_seconds, uncertainty_seconds=uncertainty_seconds)
        self.calls.note_clock(clock)


def test_warned_once_from_half_a_second_on() -> None:
    session = Session()
    for offset in (0.4, -0.6, -0.7, 0.1, 0.9):
        session.measure(offset)
    assert session.numbers.clock_offset_seconds == 0.9
    assert len(session.notes) == 2 and "-0.60 s" in session.notes[0]
    assert "timedatectl" in session.notes[0]
    assert session.events == []


def test_session_ends_with_the_remedy_when_the_clock_stays_too_far_off() -> None:
    session = Session()
    for offset in (2.0, 2.0, 0.0, -1.7, -1.7):
        session.measure(offset)
    assert session.events == [], "corrected in time, and two more are not enough"
    session.measure(-1.7)
    (stop,) = session.events
    assert isinstance(stop, ev.StopRequested) and stop.exit_code == 3
    assert "clock differs" in stop.reason and "timedatectl" in stop.reason


def test_slow_answers_prove_nothing_about_the_clock() -> None:
    session = Session()
    for _ in range(5):
        session.measure(4.0, uncertainty_seconds=3.8)
    assert session.events == [] and session.notes == []
