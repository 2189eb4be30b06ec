"""Once a second: expire leases, judge quorums, hand out duties, issue directives. All of it is one
operation, `tick`.
"""

import asyncio
import logging
from collections.abc import Callable

from coordinator.operations.requests import TickRequest
from coordinator.operations.tick import tick
from coordinator.operations.writer import Writer
from coordinator.repeating import Repeating

_LOGGER = logging.getLogger(__name__)
TICK_SECONDS = 1.0


class Ticker(Repeating):
    """Lets time pass for all runs."""

    def __init__(self, writer: Writer, *, observe_commit: Callable[[float], None]) -> None:
        super().__init__("ticker", pause_seconds=TICK_SECONDS)
        self._writer = writer
        self._observe_commit = observe_commit
        self._num_batches_seen = 0

    async def turn(self) -> None:
        """One tick."""
        try:
            response = await asyncio.wrap_future(self._writer.submit(tick, TickRequest()))
            for change in response.changes:
                _LOGGER.info("%s", change)
        finally:
            self._sample_commit()

    def _sample_commit(self) -> None:
        """Observe the newest group commit; one a second is enough for a distribution."""
        stats = self._writer.stats
        if stats.num_batches != self._num_batches_seen:
            self._num_batches_seen = stats.num_batches
            self._observe_commit(stats.last_batch_seconds)
