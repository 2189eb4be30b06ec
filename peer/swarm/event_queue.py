"""What the swarm process still has to handle: events of members and its own, and what the daemon
says, in the order in which they came.

A member may send as many messages as it likes, as large as it likes: it takes its own share of the
room, so that no result of ours is dropped for want of it, nor the daemon left unread.
"""

import asyncio
from collections import Counter

from peer.ipc import Message
from peer.swarm import round_types as rt
from peer.swarm.coordinator_questions import Place

_MAX_QUEUED = 4096
_MOST_BYTES, _LEAST_EVENT_BYTES = 40 * 2**20, 2**16
"""Of one member's messages, and what each counts at least: 640 small ones, or a large one."""

Item = tuple[Place, rt.Event] | Message


class EventQueue:
    """For one task that takes from it, on the event loop."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[Item] = asyncio.Queue(_MAX_QUEUED)
        self._bytes_by_sender: Counter[str] = Counter()

    def post(self, place: Place, event: rt.Event) -> None:
        """Add an event, or drop it if there is no room: whoever sent it sends it again."""
        sender, num_bytes = _source_of(event)
        has_room = self._bytes_by_sender[sender] + num_bytes <= _MOST_BYTES
        if has_room and not self._queue.full():
            self._bytes_by_sender[sender] += num_bytes
            self._queue.put_nowait((place, event))

    async def put(self, message: Message) -> None:
        """Add what the daemon says, when there is room."""
        await self._queue.put(message)

    async def get(self) -> Item:
        """Wait for the next."""
        item = await self._queue.get()
        if not isinstance(item, dict):
            sender, num_bytes = _source_of(item[1])
            self._bytes_by_sender[sender] -= num_bytes
        return item


def _source_of(event: rt.Event) -> tuple[str, int]:
    """Which member has sent an event, and what it counts; ("", 0) for our own."""
    if not isinstance(event, rt.Received):
        return "", 0
    return event.sender, max(_LEAST_EVENT_BYTES, int(event.message.ByteSize()))
