"""Leaving as the last holder of a state: bounded, told, and never a reason to stay."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from peer import supervisor
from peer.daemon import running
from peer.daemon.parting import ASK_SECONDS, hand_over
from protos.contract.errors import UnavailableError
from protos.contract.leaving import DRAIN_SECONDS, HAND_OVER_SECONDS, LEAVE_SECONDS
from protos.muster.v1 import duties_pb2

DUTY = duties_pb2.Duty(duty_id="run/checkpoint/1-9-parting", fence=1)


class Calls:
    """Answers of a coordinator."""

    def __init__(self, duty: duties_pb2.Duty | None, *, is_away: bool = False) -> None:
        self._duty, self._is_away = duty, is_away
        self.renewed: list[str] = []
        self.was_renewed_twice = asyncio.Event()

    async def parting_duty(
        self, membership: object, held: duties_pb2.Duty | None = None
    ) -> duties_pb2.Duty | None:
        if self._is_away:
            raise UnavailableError("no answer", allowed="one", remedy="none")
        if held is not None:
            self.renewed.append(held.duty_id)
            if len(self.renewed) == 2:
                self.was_renewed_twice.set()
        return self._duty


class Uploads:
    """A checkpoint that is there when something else has happened."""

    def __init__(self, end: asyncio.Event) -> None:
        self._end, self.uploaded_bytes = end, 0
        self.has_ended = ""

    async def perform(self, duty: duties_pb2.Duty, *, heldout_paths: tuple[Path, ...]) -> None:
        try:
            self.uploaded_bytes = 2**20
            await self._end.wait()
            self.has_ended = "done"
        except asyncio.CancelledError:
            self.has_ended = "cancelled"
            raise


def leave(calls: Any, uploads: Any, *, most_seconds: float = 30.0) -> list[str]:
    notes: list[str] = []
    membership: Any = None
    asyncio.run(
        hand_over(
            calls=calls,
            duties=uploads,
            membership=membership,
            note=notes.append,
            tell_seconds=0.02,
            most_seconds=most_seconds,
        )
    )
    return notes


@pytest.mark.parametrize("calls", [Calls(None), Calls(DUTY, is_away=True)])
def test_who_owes_nothing_or_reaches_nobody_leaves_at_once(calls: Calls) -> None:
    uploads = Uploads(asyncio.Event())
    assert leave(calls, uploads) == [] and uploads.has_ended == ""


def test_the_state_is_given_away_and_it_is_told_how_far_that_is() -> None:
    calls = Calls(DUTY)
    uploads = Uploads(calls.was_renewed_twice)
    notes = leave(calls, uploads)
    assert uploads.has_ended == "done" and "Ctrl+C" in notes[0]
    assert len(notes) >= 3 and all("1.0 MiB of the checkpoint" in note for note in notes[1:])
    assert set(calls.renewed) == {DUTY.duty_id}, "the coordinator keeps waiting for it"


def test_a_slow_coordinator_is_not_waited_for_for_ever() -> None:
    uploads = Uploads(asyncio.Event())
    notes = leave(Calls(DUTY), uploads, most_seconds=0.1)
    assert uploads.has_ended == "cancelled" and "not taken in time" in notes[-1]


def test_whoever_started_a_peer_waits_as_long_as_it_may_take() -> None:
    """All that `RunningSession.drain` waits for, each child pressed by SIGTERM once."""
    trainer_seconds = running._TRAINER_STOP_SECONDS + supervisor._TERM_GRACE_SECONDS
    calls_seconds = running._LEAVE_SECONDS + ASK_SECONDS + running._LEAVE_SECONDS
    swarm_seconds = running._DRAIN_SECONDS + supervisor._TERM_GRACE_SECONDS
    assert trainer_seconds + calls_seconds + swarm_seconds <= DRAIN_SECONDS
    assert HAND_OVER_SECONDS + DRAIN_SECONDS <= LEAVE_SECONDS
