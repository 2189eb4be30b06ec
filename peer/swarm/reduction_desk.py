"""Takes the part streams of other members to the reduction that they belong to, which may begin a
little later.
"""

import asyncio
from collections.abc import Callable

from peer.swarm.allreduce import PART_STREAM, Reduction, Streams, refuse_stream
from peer.swarm.transport import Stream
from protos.muster.v1 import state_pb2

_EARLY_SECONDS = 15.0
"""How long a stream that arrives before the own group waits for it."""


class ReductionDesk:
    """Hands streams of other members to the reduction that they belong to, which may begin a little
    later.
    """

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._current: Reduction | None = None
        self._changed = asyncio.Event()

    async def start(self) -> None:
        """Begin to answer part streams."""
        await self._streams.serve_streams(PART_STREAM, self._on_stream)

    def open(self, reduction: Reduction | None) -> None:
        """Make a reduction the current one; the one before serves nobody any more."""
        if self._current is not None and not self._current.has_failed:
            self._current.close()
        self._current = reduction
        self._changed.set()
        self._changed = asyncio.Event()

    async def _on_stream(self, sender: str, stream: Stream) -> None:
        header = await stream.read_message(state_pb2.PartHeader)
        place = (header.incarnation, header.outer_step, header.attempt)
        reduction = await self._reduction_at(place)
        if reduction is None:
            reason = f"no reduction for incarnation, outer step and attempt {place}"
            await refuse_stream(stream, reason)
            return
        await reduction.serve(sender, header, stream)

    async def _reduction_at(self, place: tuple[int, int, int]) -> Reduction | None:
        loop = asyncio.get_running_loop()
        deadline_seconds = loop.time() + _EARLY_SECONDS
        wait: Callable[[], float] = lambda: deadline_seconds - loop.time()  # noqa: E731
        while self._current is None or self._current.place < place:
            try:
                await asyncio.wait_for(self._changed.wait(), wait())
            except TimeoutError:
                return None
        return self._current if self._current.place == place else None
