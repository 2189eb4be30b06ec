"""Once a second: expire leases, judge quorums, hand out duties, issue directives. All of it is one
operation, `tick`.

The next tick begins a second after the last one ended, so a slow store delays ticks and never piles
them up. This is the ticker's broad-exception border: a tick that fails is logged and counted, and
the next one is tried.
"""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress

from coordinator.operations.requests import TickRequest
from coordinator.operations.tick import tick
from coordinator.operations.writer import Writer
from protos.contract.errors import MusterError

_LOGGER = logging.getLogger(__name__)
TICK_SECONDS = 1.0


class Ticker:
    """Runs between `start` and `stop` on the server's event loop."""

    def __init__(self, writer: Writer, *, observe_commit: Callable[[float], None]) -> None:
        self._writer = writer
        self._observe_commit = observe_commit
        self._num_batches_seen = 0
        self._task: asyncio.Task[None] | None = None
        self.num_failed_ticks = 0

    def start(self) -> None:
        """Begin to tick."""
        self._task = asyncio.create_task(self._run(), name="ticker")

    async def stop(self) -> None:
        """End after the tick under way."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    async def _run(self) -> None:
        while True:
            try:
                response = await asyncio.wrap_future(self._writer.submit(tick, TickRequest()))
                for change in response.changes:
                    _LOGGER.info("%s", change)
            except MusterError as error:
                self.num_failed_ticks += 1
                _LOGGER.warning("a tick failed: %s", error)
            except Exception:
                self.num_failed_ticks += 1
                _LOGGER.exception("a tick failed")
            self._sample_commit()
            await asyncio.sleep(TICK_SECONDS)

    def _sample_commit(self) -> None:
        """Observe the newest group commit; one a second is enough for a distribution."""
        stats = self._writer.stats
        if stats.num_batches != self._num_batches_seen:
            self._num_batches_seen = stats.num_batches
            self._observe_commit(stats.last_batch_seconds)
