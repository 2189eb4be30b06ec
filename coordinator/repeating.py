"""What the coordinator does again and again beside its server: one loop for all of it.

The next turn begins a pause after the last one ended, so a slow store delays turns and never piles
them up. This is their broad-exception border: a turn that fails, for whatever reason, is logged and
counted, and the next one is tried.
"""

import asyncio
import logging
from abc import ABC, abstractmethod
from contextlib import suppress

from protos.contract.errors import MusterError

_LOGGER = logging.getLogger(__name__)


class Repeating(ABC):
    """Takes turns between `start` and `stop` on the server's event loop."""

    def __init__(self, name: str, *, pause_seconds: float) -> None:
        """`name` is for logs."""
        self._name, self._pause_seconds = name, pause_seconds
        self._task: asyncio.Task[None] | None = None
        self.num_failed_turns = 0

    @abstractmethod
    async def turn(self) -> None:
        """One turn. Whatever it raises is logged."""

    def start(self) -> None:
        """Begin."""
        self._task = asyncio.create_task(self._run(), name=self._name)

    async def stop(self) -> None:
        """End; a turn under way is dropped and taken again after the next start."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    async def _run(self) -> None:
        while True:
            try:
                await self.turn()
            except (MusterError, OSError) as error:
                self.num_failed_turns += 1
                _LOGGER.warning("%s: %s", self._name, error)
            except Exception:
                self.num_failed_turns += 1
                _LOGGER.exception("%s failed", self._name)
            await asyncio.sleep(self._pause_seconds)
