"""Before a peer leaves: if nobody else holds the newest state, the coordinator gets a checkpoint of
it, so that whoever comes next goes on from there.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable

from peer.config import format_bytes
from peer.daemon.coordinator_tasks import CoordinatorTasks
from peer.daemon.duties import Duties
from peer.daemon.membership import Membership
from protos.contract.errors import MusterError
from protos.contract.leaving import HAND_OVER_SECONDS

_LOGGER = logging.getLogger(__name__)
ASK_SECONDS = 1.0
_TELL_SECONDS = 5.0


async def hand_over(
    *,
    calls: CoordinatorTasks,
    duties: Duties,
    membership: Membership,
    note: Callable[[str], None],
    tell_seconds: float = _TELL_SECONDS,
    most_seconds: float = HAND_OVER_SECONDS,
) -> float:
    """Ask the coordinator what is owed and give it, telling `note` how far it is; returns the
    seconds that took. Never raises MusterError: a peer that cannot give anything leaves all the
    same.
    """
    began_seconds = time.monotonic()
    try:
        async with asyncio.timeout(ASK_SECONDS):
            duty = await calls.parting_duty(membership)
    except (MusterError, TimeoutError) as error:
        _LOGGER.warning(
            "left without asking what is owed (%s): if nobody else holds the newest state, it lies"
            " in this home only",
            error or f"no answer within {ASK_SECONDS:g} s",
        )
        return 0.0
    if duty is None:
        return 0.0
    note(
        "nobody else holds the newest state: giving the coordinator a checkpoint of it, for at "
        f"most {most_seconds:.0f} s; Ctrl+C once more leaves without"
    )
    giving = asyncio.ensure_future(duties.perform(duty, heldout_paths=()))
    try:
        async with asyncio.timeout(most_seconds):
            while not (await asyncio.wait({giving}, timeout=tell_seconds))[0]:
                note(f"{format_bytes(duties.uploaded_bytes)} of the checkpoint are there")
                with contextlib.suppress(MusterError):
                    await calls.parting_duty(membership, duty)
    except TimeoutError:
        note("the checkpoint was not taken in time; the state lies in this peer's home only")
    finally:
        giving.cancel()
        await asyncio.gather(giving, return_exceptions=True)
    return time.monotonic() - began_seconds
