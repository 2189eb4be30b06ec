"""Leaving as the last holder of a state: bounded, told, and never a reason to stay."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from peer import supervisor
from peer.daemon import running
from peer.daemon.parting import hand_over
from protos.contract.errors import ErrorCode, RefusedError, UnavailableError
from protos.contract.leaving import DRAIN_SECONDS, HAND_OVER_SECONDS, LEAVE_SECONDS
from protos.muster.v1 import duties_pb2

DUTY = duties_pb2.Duty(duty_id="run/checkpoint/1-9-parting", fence=1)


class Calls:
    """Answers of a coordinator."""

    def __init__(
        self, duty: duties_pb2.Duty | None, *, num_missed: int = 0, is_evicting: bool = False
    ) -> None:
        self._duty, self.num_missed, self._is_evicting = duty, num_missed, is_evicting
        self.renewed: list[str] = []
        self.was_renewed_twice = asyncio.Event()

    async def parting_duty(
        self, membership: object, held: duties_pb2.Duty | None = None
    ) -> duties_pb2.Duty | None:
        if self._is_evicting:
            raise RefusedError(
                "this peer was evicted", allowed="", remedy="", code=ErrorCode.PEER_EVICTED
            )
        if self.num_missed:
            self.num_missed -= 1
            if self.num_missed % 2:
                await asyncio.Event().wait()  # a coordinator that hangs
            raise UnavailableError("nobody listens there", allowed="one", remedy="none")
        if held is not None:
            self.renewed.append(held.duty_id)
            if len(self.renewed) == 2:
                self.was_renewed_twice.set()
        return self._duty


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


@pytest.mark.parametrize("calls", [Calls(None), Calls(DUTY, is_evicting=True)])
def test_who_owes_nothing_or_is_refused_leaves_at_once(calls: Calls) -> None:
    uploads = Uploads(asyncio.Event())
    assert leave(calls, uploads) == [] and uploads.has_ended == ""


def test_the_state_is_given_away_and_it_is_told_how_far_that_is() -> None:
    calls = Calls(DUTY)
    uploads = Uploads(calls.was_renewed_twice)
    notes = leave(calls, uploads)
    assert uploads.has_ended == "done" and "Ctrl+C" in notes[0]
    assert len(notes) >= 3 and all("1.0 MiB of the checkpoint" in note for note in notes[1:])
    assert set(calls.renewed) == {DUTY.duty_id}, "the coordinator keeps waiting for it"


def test_a_coordinator_that_comes_back_in_time_gets_the_state() -> None:
    """It is asked again and again, and after an upload that failed."""
    calls = Calls(DUTY, num_missed=9)
    uploads = Uploads(calls.was_renewed_twice, num_failed=2)
    notes = leave(calls, uploads)
    assert uploads.has_ended == "done" and (calls.num_missed, uploads.num_failed) == (0, 0)
    waiting = [note for note in notes if "asking whether" in note]
    assert len(waiting) >= 2 and all("Ctrl+C" in note for note in waiting)
    assert sum("trying again" in note for note in notes) == 2


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
    """All that `RunningSession.drain` waits for, each child pressed by SIGTERM once."""
    trainer_seconds = running._TRAINER_STOP_SECONDS + supervisor._TERM_GRACE_SECONDS
    calls_seconds = 2 * running._LEAVE_SECONDS
    swarm_seconds = running._DRAIN_SECONDS + supervisor._TERM_GRACE_SECONDS
    assert trainer_seconds + calls_seconds + swarm_seconds <= DRAIN_SECONDS
    assert HAND_OVER_SECONDS + DRAIN_SECONDS <= LEAVE_SECONDS
