"""Leaving as the last holder of a state: bounded, told, and never a reason to stay."""

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from peer import supervisor
from peer.daemon import daemon, running
from peer.daemon.parting import hand_over
from protos.contract.errors import ErrorCode, MachineError, RefusedError, UnavailableError
from protos.contract.leaving import DRAIN_SECONDS
from protos.muster.v1 import duties_pb2

DUTY = duties_pb2.Duty(duty_id="run/checkpoint/1-9-parting", fence=1)


class Calls:
    """Answers of a coordinator."""

    def __init__(
        self, duty: duties_pb2.Duty | None, *, num_missed: int = 0, refusal: ErrorCode | None = None
    ) -> None:
        self.duty, self.num_missed, self._refusal = duty, num_missed, refusal
        self.renewed: list[str] = []
        self.was_renewed_twice = asyncio.Event()

    async def parting_duty(
        self, membership: object, held: duties_pb2.Duty | None = None
    ) -> duties_pb2.Duty | None:
        if self._refusal is not None:
            raise RefusedError("not this peer", code=self._refusal)
        if self.num_missed:
            self.num_missed -= 1
            match self.num_missed % 3:
                case 0:
                    raise UnavailableError("nobody listens there (ECONNREFUSED)")
                case 1:
                    await asyncio.Event().wait()  # a coordinator that hangs
                case _:
                    raise MachineError("the store is read-only")
        if held is not None:
            self.renewed.append(held.duty_id)
            if len(self.renewed) == 2:
                self.was_renewed_twice.set()
        return self.duty


class Uploads:
    """A checkpoint that is there when something else has happened."""

    def __init__(self, end: asyncio.Event, *, num_failed: int = 0) -> None:
        self._end, self.uploaded_bytes = end, 0
        self.num_failed, self.has_ended = num_failed, ""

    async def perform(self, duty: duties_pb2.Duty, *, heldout_paths: tuple[Path, ...]) -> bool:
        if self.num_failed:
            self.num_failed -= 1
            return False
        try:
            self.uploaded_bytes = 2**20
            await self._end.wait()
            self.has_ended = "done"
            return True
        except asyncio.CancelledError:
            self.has_ended = "cancelled"
            raise


async def leaving(calls: Any, uploads: Any, notes: list[str], *, most_seconds: float) -> None:
    membership: Any = None
    await hand_over(
        calls=calls,
        duties=uploads,
        membership=membership,
        note=notes.append,
        tell_seconds=0.02,
        ask_seconds=0.02,
        pause_seconds=0.005,
        most_seconds=most_seconds,
    )


def leave(calls: Any, uploads: Any, *, most_seconds: float = 30.0) -> list[str]:
    notes: list[str] = []
    asyncio.run(leaving(calls, uploads, notes, most_seconds=most_seconds))
    return notes


@pytest.mark.parametrize("calls", [Calls(None), Calls(DUTY, refusal=ErrorCode.PEER_EVICTED)])
def test_who_owes_nothing_or_is_evicted_leaves_at_once(calls: Calls) -> None:
    uploads = Uploads(asyncio.Event())
    assert leave(calls, uploads) == [] and uploads.has_ended == ""


def test_who_is_refused_leaves_at_once_and_says_so() -> None:
    notes = leave(Calls(DUTY, refusal=ErrorCode.SESSION_INVALID), Uploads(asyncio.Event()))
    assert len(notes) == 1 and "not this peer" in notes[0] and "this peer's home" in notes[0]


def test_a_state_that_is_given_up_is_not_lost_without_a_word() -> None:
    """An upload fails, and the coordinator asks for it no longer."""
    calls = Calls(DUTY)

    class Failing(Uploads):
        async def perform(self, *_: Any, **__: Any) -> bool:
            calls.duty = None
            return False

    notes = leave(calls, Failing(asyncio.Event()))
    assert "asks for it no longer" in notes[-1] and "this peer's home only" in notes[-1]


def test_the_state_is_given_away_and_it_is_told_how_far_that_is() -> None:
    calls = Calls(DUTY)
    uploads = Uploads(calls.was_renewed_twice)
    notes = leave(calls, uploads)
    assert uploads.has_ended == "done" and "Ctrl+C" in notes[0]
    assert len(notes) >= 3 and all("1.0 MiB of the checkpoint" in note for note in notes[1:])
    assert set(calls.renewed) == {DUTY.duty_id}, "the coordinator keeps waiting for it"


def test_a_coordinator_that_comes_back_in_time_gets_the_state() -> None:
    """It is asked again and again, and after an upload that failed."""
    calls = Calls(DUTY, num_missed=12)
    uploads = Uploads(calls.was_renewed_twice, num_failed=2)
    notes = leave(calls, uploads)
    assert uploads.has_ended == "done" and (calls.num_missed, uploads.num_failed) == (0, 0)
    waiting = [note for note in notes if "asking whether" in note]
    assert len(waiting) == 3 and all("Ctrl+C" in note for note in waiting), "each reason once"
    assert any(note.startswith("still trying, ") for note in notes)
    assert "ECONNREFUSED" not in "".join(notes)
    assert sum("trying again" in note for note in notes) == 1


def test_a_slow_coordinator_is_not_waited_for_for_ever() -> None:
    uploads = Uploads(asyncio.Event())
    notes = leave(Calls(DUTY), uploads, most_seconds=0.1)
    assert uploads.has_ended == "cancelled" and "this peer's home only" in notes[-1]


@pytest.mark.parametrize("num_missed", [0, 10**6])
def test_a_second_signal_ends_it_at_once(num_missed: int) -> None:
    """It cancels the leaving, be it asking or giving; what was begun is ended."""
    uploads = Uploads(asyncio.Event())

    async def interrupted() -> None:
        notes: list[str] = []
        calls = Calls(DUTY, num_missed=num_missed)
        task = asyncio.ensure_future(leaving(calls, uploads, notes, most_seconds=10**6))
        while len(notes) < 2:
            await asyncio.sleep(0)
        task.cancel()
        async with asyncio.timeout(5.0):
            await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled()

    asyncio.run(interrupted())
    assert uploads.has_ended == ("" if num_missed else "cancelled")


def test_whoever_started_a_peer_waits_as_long_as_it_may_take() -> None:
    """All that `RunningSession.drain` waits for, each child pressed by SIGTERM once and leaving
    processes behind; and, as long as one such, `close`, which waits for nobody's good will.
    """
    pressed_seconds = supervisor._TERM_GRACE_SECONDS + supervisor._ORPHAN_SECONDS
    before_seconds = running._TRAINER_STOP_SECONDS + pressed_seconds + 2 * running._LEAVE_SECONDS
    swarm_grace_seconds = max(running._SWARM_STOP_SECONDS, running._DRAIN_SECONDS - before_seconds)
    drain_seconds = before_seconds + swarm_grace_seconds + pressed_seconds
    assert drain_seconds + supervisor._ORPHAN_SECONDS <= DRAIN_SECONDS


def test_status_is_kept_up_to_date_while_a_peer_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemon, "STATUS_SECONDS", 0.01)
    path = tmp_path / "status.json"
    states = []

    async def drain() -> bool:
        anything: Any = SimpleNamespace(name="me", peer_id="p", run_id="r", address="a:1")
        home: Any = SimpleNamespace(run=tmp_path)
        leaving_one = daemon.Daemon(
            config=anything, home=home, identity=anything, join_string=anything, report=print
        )
        numbers = leaving_one._core.numbers

        class Session:
            async def drain(self, reason: str) -> None:
                for state in ("DRAINING", "LEFT"):
                    numbers.state = state
                    while not path.exists() or json.loads(path.read_text())["state"] != state:
                        await asyncio.sleep(0)
                    states.append(state)

        session: Any = Session()
        async with asyncio.timeout(10.0):
            return await leaving_one._drain(session, "SIGTERM")

    assert asyncio.run(drain()) is False and states == ["DRAINING", "LEFT"]
