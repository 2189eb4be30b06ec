"""Before a peer leaves: if nobody else holds the newest state, the coordinator gets a checkpoint of
it, so that whoever comes next goes on from there.
"""

import asyncio
import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from peer.config import format_bytes
from peer.daemon.coordinator_tasks import CoordinatorTasks
from peer.daemon.duties import Duties
from peer.daemon.membership import Membership
from protos.contract.errors import ErrorCode, MusterError, RefusedError, UnavailableError
from protos.contract.leaving import HAND_OVER_SECONDS
from protos.muster.v1 import duties_pb2

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
    seconds that took. Without an answer, after an error and after an upload that failed, it is
    asked again. Never raises MusterError: a peer that cannot give anything leaves all the same, and
    says so.
    """
    began_seconds = time.monotonic()
    asking = _Asking(
        calls, membership, note, tell_seconds, ask_seconds, pause_seconds, most_seconds
    )
    try:
        async with asyncio.timeout(most_seconds):
            why_not = await _give_what_is_owed(duties, asking)
    except TimeoutError:
        why_not = f"{most_seconds:.0f} s were not enough"
    except RefusedError as error:  # an evicted peer's state is not wanted
        why_not = "" if error.code is ErrorCode.PEER_EVICTED else str(error)
    if why_not:
        note(
            f"left without handing anything over: {why_not}; if nobody else holds the newest "
            "state, it lies in this peer's home only"
        )
    return time.monotonic() - began_seconds


async def _give_what_is_owed(duties: Duties, asking: "_Asking") -> str:
    """Returns why it could not be given; "" if it was, or nothing is owed. Raises RefusedError."""
    duty = await asking.until_answered()
    if duty is None:
        return ""
    asking.note(
        "nobody else holds the newest state: giving the coordinator a checkpoint of it, for at "
        f"most {asking.most_seconds:.0f} s; Ctrl+C once more leaves without"
    )
    while not await _give(duty, duties, asking):
        asking.tell("the checkpoint could not be given", "trying again")
        await asyncio.sleep(asking.pause_seconds)
        duty = await asking.until_answered()
        if duty is None:
            return "the checkpoint could not be given, and the coordinator asks for it no longer"
    return ""


@dataclass(slots=True)
class _Asking:
    """What is owed, from a coordinator that may be away."""

    calls: CoordinatorTasks
    membership: Membership
    note: Callable[[str], None]
    tell_seconds: float
    ask_seconds: float
    pause_seconds: float
    most_seconds: float
    begin_seconds: float = field(default_factory=time.monotonic)
    _told: set[str] = field(default_factory=set)
    _told_seconds: float = -math.inf

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

    async def until_answered(self) -> duties_pb2.Duty | None:
        """Raises RefusedError: asking again would not help."""
        while True:
            try:
                return await self.once()
            except RefusedError:
                raise
            except MusterError as error:
                found = error.found.partition(" (")[0]  # gRPC's words change with every try
                self.tell(
                    f"asking whether the newest state is needed: {found}",
                    "Ctrl+C once more leaves without",
                )
                await asyncio.sleep(self.pause_seconds)

    def tell(self, found: str, then: str) -> None:
        """Note it once as a whole; after that, now and then, that it goes on."""
        now_seconds = time.monotonic()
        left_seconds = max(0.0, self.begin_seconds + self.most_seconds - now_seconds)
        if found not in self._told:
            self._told.add(found)
            self.note(f"{found}; {then}; {left_seconds:.0f} s left")
        elif now_seconds - self._told_seconds >= self.tell_seconds:
            self.note(f"still trying, {left_seconds:.0f} s left")
        else:
            return
        self._told_seconds = now_seconds


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
