"""Tells the daemon that the event loop comes round (peer/daemon/child_watch.py takes silence for a
failure).
"""

import asyncio
import time
from collections import deque

from peer.ipc import AsyncChannel

INTERVAL_SECONDS = 1.0
_NUM_RECENT = 64


async def tell_turns(channel: AsyncChannel) -> None:
    """Say about once a second how long the loop was held up at most lately, for ever. Raises
    ChannelClosed.
    """
    recent_seconds: deque[float] = deque(maxlen=_NUM_RECENT)
    while True:
        begin_seconds = time.monotonic()
        await asyncio.sleep(INTERVAL_SECONDS)
        recent_seconds.append(time.monotonic() - begin_seconds)
        channel.send("turn", longest_turn_seconds=max(recent_seconds))
