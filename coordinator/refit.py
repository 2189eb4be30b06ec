"""After every evaluation: refit, forecast, publish. Beside the writer thread, which only stores.

Once a second the runs are looked at (a read); a fit takes milliseconds to a second, in a worker
thread. numpy is all that it needs, so there is nothing that could be missing at run time. A fit
that fails is a forecast that could not be made: stored with its reason like any other.
"""

import asyncio
import logging
from contextlib import suppress

import numpy as np

from coordinator.operations.forecasts import (
    FindRefitsRequest,
    RefitTask,
    SaveForecastRequest,
    find_refits,
    save_forecast,
)
from coordinator.operations.writer import Writer
from coordinator.scaling.live import live_forecast
from protos.contract.errors import MusterError, UsageError

_LOGGER = logging.getLogger(__name__)
LOOK_SECONDS = 1.0


def make_forecast(task: RefitTask) -> SaveForecastRequest:
    """Forecast, or the reason why there is none."""
    try:
        said = live_forecast(task.run, others=task.others)
        reason = ""
    except UsageError as error:
        said, reason = None, f"{error.found}; {error.allowed}"
    except (ArithmeticError, ValueError, np.linalg.LinAlgError) as error:
        said, reason = None, f"the fit failed: {error}"
    return SaveForecastRequest(task=task, forecast=said, reason=reason)


class Refitter:
    """Runs between `start` and `stop` on the server's event loop."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to look."""
        self._task = asyncio.create_task(self._run(), name="refit")

    async def stop(self) -> None:
        """End; a fit under way is dropped and made again after the next start."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    async def _run(self) -> None:
        while True:
            try:
                await self.refit()
            except MusterError as error:
                _LOGGER.warning("refit: %s", error)
            await asyncio.sleep(LOOK_SECONDS)

    async def refit(self) -> None:
        """Forecast every run that has a new evaluation."""
        tasks = await asyncio.to_thread(self._writer.read, find_refits, FindRefitsRequest())
        for task in tasks:
            found = await asyncio.to_thread(make_forecast, task)
            said = await asyncio.wrap_future(self._writer.submit(save_forecast, found))
            _LOGGER.info("%s", said)
