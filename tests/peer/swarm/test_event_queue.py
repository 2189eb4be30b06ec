"""A member that floods takes its own share of the queue, not that of others nor of ourselves."""

import asyncio
from collections import Counter

from peer.swarm import round_types as rt
from peer.swarm.event_queue import EventQueue
from protos.muster.v1 import rounds_pb2

PLACE = (1, 7)


def _message(num_bytes: int = 0) -> rounds_pb2.RoundMessage:
    return rounds_pb2.RoundMessage(refusal=rounds_pb2.RoundRefusal(reason="x" * num_bytes))


def test_a_flood_of_one_member_leaves_room_for_everybody_else() -> None:
    """The queue was full of it: results of our own averaging were dropped, and what the daemon
    says was not even read, a stop included.
    """

    async def live() -> None:
        queue, stop = EventQueue(), {"kind": "stop"}
        for _ in range(2):
            for _ in range(10_000):
                queue.post(PLACE, rt.Received("small", _message()))
            for _ in range(8):
                queue.post(PLACE, rt.Received("large", _message(15 * 2**20)))
            queue.post(PLACE, rt.Received("good", _message()))
            queue.post(PLACE, rt.ReduceDone(0, b"averaged"))
            await asyncio.wait_for(queue.put(stop), 1.0)
            items = [await queue.get() for _ in range(640 + 2 + 1)]
            events = [item[1] for item in items if isinstance(item, tuple)]
            senders = Counter(event.sender for event in events if isinstance(event, rt.Received))
            assert senders == {"small": 640, "large": 2, "good": 1}
            assert await queue.get() == (PLACE, rt.ReduceDone(0, b"averaged"))
            assert await queue.get() == stop

    asyncio.run(live())
