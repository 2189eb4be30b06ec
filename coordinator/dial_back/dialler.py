"""Beside the ticker: dials every live member back at the addresses that it announces, when they are
new and every few minutes.

A peer's word is not taken: what counts is that somebody who proves the member's libp2p identity
answers at one of them. Dialled from where the coordinator stands, which need not be where the other
peers are; so a member that cannot be dialled only loses the right to reduce.
"""

import asyncio
import logging
import time
from dataclasses import dataclass

from coordinator.dial_back.hello import HelloError, identity_at, is_loopback, tcp_endpoint
from coordinator.operations.reachability import (
    DialTask,
    FindDialsRequest,
    SaveReachRequest,
    find_dials,
    save_reach,
)
from coordinator.operations.writer import Writer
from coordinator.repeating import Repeating

_LOGGER = logging.getLogger(__name__)
LOOK_SECONDS = 1.0
_TIMEOUT_SECONDS = 4.0
_GOOD_FOR_SECONDS = 600.0
_BAD_FOR_SECONDS = 60.0
_SOON_SECONDS = 2.0
"""Until the second try; one alone that fails may be a moment's trouble."""
_MAX_AT_ONCE = 16
_MAX_ADDRESSES = 6


@dataclass(slots=True)
class _Known:
    """What the dialler remembers of a member at its addresses."""

    next_seconds: float = 0.0
    num_failures: int = 0


async def dial(task: DialTask, *, timeout_seconds: float = _TIMEOUT_SECONDS) -> str | None:
    """Why a member cannot be dialled, "" if it can, None if it announces nothing that is dialled
    from here.

    Addresses of this machine only count for members that announce no other.
    """
    endpoints = {address: tcp_endpoint(address) for address in task.addresses}
    direct = {address: found for address, found in endpoints.items() if found is not None}
    outside = {address: found for address, found in direct.items() if not is_loopback(address)}
    chosen = list((outside or direct).items())[:_MAX_ADDRESSES]
    if not chosen:
        is_relayed = all("p2p-circuit" in address for address in task.addresses)
        return "it announces a relay's address only" if is_relayed else None

    async def try_one(address: str, host: str, port: int) -> str:
        try:
            found = await identity_at(host, port, timeout_seconds=timeout_seconds)
        except HelloError as error:
            return f"{address}: {error}"
        return "" if found == task.p2p_peer_id else f"{address}: somebody else listens there"

    problems = await asyncio.gather(*(try_one(address, *end) for address, end in chosen))
    return "" if not all(problems) else "; ".join(problems[:2])


class Dialler(Repeating):
    """Looks for members that are due."""

    def __init__(self, writer: Writer) -> None:
        super().__init__("dialling back", pause_seconds=LOOK_SECONDS)
        self._writer = writer
        self._known: dict[DialTask, _Known] = {}

    async def turn(self) -> None:
        """By this machine's clock."""
        await self.dial_due(time.monotonic())

    async def dial_due(self, now_seconds: float) -> None:
        """Dial whoever is due and store what came of it."""
        tasks = await asyncio.to_thread(self._writer.read, find_dials, FindDialsRequest())
        self._known = {task: self._known.get(task, _Known()) for task in tasks}
        due = [task for task, known in self._known.items() if known.next_seconds <= now_seconds]
        await asyncio.gather(*(self._dial(task, now_seconds) for task in due[:_MAX_AT_ONCE]))

    async def _dial(self, task: DialTask, now_seconds: float) -> None:
        known, problem = self._known[task], await dial(task)
        if not problem:
            known.num_failures, known.next_seconds = 0, now_seconds + _GOOD_FOR_SECONDS
        else:
            known.num_failures += 1
            is_sure = known.num_failures > 1
            known.next_seconds = now_seconds + (_BAD_FOR_SECONDS if is_sure else _SOON_SECONDS)
            if not is_sure:
                return
        request = SaveReachRequest(task=task, problem=problem or "")
        said = await asyncio.wrap_future(self._writer.submit(save_reach, request))
        if said:
            _LOGGER.info("%s", said)
