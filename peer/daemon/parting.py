"""Before a peer leaves: if nobody else holds the newest state, the coordinator gets a checkpoint of
it, so that whoever comes next goes on from there.
"""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from peer.config import format_bytes
from peer.daemon.coordinator_tasks import CoordinatorTasks
from peer.daemon.duties import Duties
from peer.daemon.membership import Membership
from protos.contract.errors import MusterError, UnavailableError
from protos.contract.leaving import HAND_OVER_SECONDS
from protos.muster.v1 import duties_pb2

_LOGGER = logging.getLogger(__name__)
_TELL_SECONDS = 5.0
_ASK_SECONDS = 5.0
_PAUSE_SECONDS = 1.0


async def hand_over(
    *,
    calls: CoordinatorTasks,
    duties: Duties,
    membership: Membership,
    note: Callable[[str], None],
    tell_seconds: float = _TELL_SECONDS,
    ask_seconds: float = _ASK_SECONDS,
    pause_seconds: float = _PAUSE_SECONDS,
    most_seconds: float = HAND_OVER_SECONDS,
) -> float:
    """Ask the coordinator what is owed and give it, telling `note` how far it is; returns the
    seconds that took. Without an answer, and after an upload that failed, it is asked again. Never
    raises MusterError: a peer that cannot give anything leaves all the same.
    """
    began_seconds = time.monotonic()
    asking = _Asking(calls, membership, note, tell_seconds, ask_seconds, pause_seconds)
    try:
        async with asyncio.timeout(most_seconds):
            duty = await asking.until_answered(most_seconds)
            if duty is not None:
                note(
                    "nobody else holds the newest state: giving the coordinator a checkpoint of "
                    f"it, for at most {most_seconds:.0f} s; Ctrl+C once more leaves without"
                )
            while duty is not None and not await _give(duty, duties, asking):
                note("the checkpoint could not be given; trying again")
                await asyncio.sleep(pause_seconds)
                duty = await asking.until_answered(most_seconds)
    except TimeoutError:
        note(
            f"left after {most_seconds:.0f} s without handing anything over: if nobody else holds "
            "the newest state, it lies in this peer's home only"
        )
    except MusterError as error:
        _LOGGER.info("left without handing anything over: %s", error.found)
    return time.monotonic() - began_seconds


@dataclass(frozen=True, slots=True)
class _Asking:
    """What is owed, from a coordinator that may be away."""

    calls: CoordinatorTasks
    membership: Membership
    note: Callable[[str], None]
    tell_seconds: float
    ask_seconds: float
    pause_seconds: float

    async def once(self, held: duties_pb2.Duty | None = None) -> duties_pb2.Duty | None:
        """Raises MusterError, UnavailableError if there was no answer in time."""
        try:
            async with asyncio.timeout(self.ask_seconds):
                return await self.calls.parting_duty(self.membership, held)
        except TimeoutError as error:
            raise UnavailableError(
                f"no answer within {self.ask_seconds:g} s",
                allowed="a coordinator that answers",
                remedy="start it, or leave without: the state stays in this peer's home",
            ) from error

    async def until_answered(self, most_seconds: float) -> duties_pb2.Duty | None:
        """Raises RefusedError."""
        told_seconds = -math.inf
        while True:
            try:
                return await self.once()
            except UnavailableError as error:
                if time.monotonic() - told_seconds >= self.tell_seconds:
                    told_seconds = time.monotonic()
                    found = error.found.partition(" (")[0]
                    self.note(
                        f"asking whether the newest state is needed: {found}; for at most "
                        f"{most_seconds:.0f} s, Ctrl+C once more leaves without"
                    )
                await asyncio.sleep(self.pause_seconds)


async def _give(duty: duties_pb2.Duty, duties: Duties, asking: _Asking) -> bool:
    """Returns whether it was given, renewing it meanwhile."""
    giving = asyncio.ensure_future(duties.perform(duty, heldout_paths=()))
    try:
        while not (await asyncio.wait({giving}, timeout=asking.tell_seconds))[0]:
            asking.note(f"{format_bytes(duties.uploaded_bytes)} of the checkpoint are there")
            with contextlib.suppress(MusterError):
                await asking.once(duty)
        return giving.result()
    finally:
        giving.cancel()
        await asyncio.gather(giving, return_exceptions=True)
