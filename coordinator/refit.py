"""After every evaluation: refit, forecast, publish. Beside the writer thread, which only stores.

Once a second the runs are looked at (a read); a fit takes milliseconds to a second, in a worker
thread. numpy is all that it needs, so there is nothing that could be missing at run time. A fit
that fails is a forecast that could not be made: stored with its reason like any other.
"""

import asyncio
import logging

import numpy as np

from coordinator.operations.forecasts import (
    FindRefitsRequest,
    RefitTask,
    SaveForecastRequest,
    find_refits,
    save_forecast,
)
from coordinator.operations.writer import Writer
from coordinator.repeating import Repeating
from coordinator.scaling.live import live_forecast
from protos.contract.errors import UsageError

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


class Refitter(Repeating):
    """Looks for runs with a new evaluation."""

    def __init__(self, writer: Writer) -> None:
        super().__init__("refit", pause_seconds=LOOK_SECONDS)
        self._writer = writer

    async def turn(self) -> None:
        """Forecast every run that has a new evaluation."""
        tasks = await asyncio.to_thread(self._writer.read, find_refits, FindRefitsRequest())
        for task in tasks:
            found = await asyncio.to_thread(make_forecast, task)
            said = await asyncio.wrap_future(self._writer.submit(save_forecast, found))
            _LOGGER.info("%s", said)
