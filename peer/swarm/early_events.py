"""Events of a later step than ours, kept until we are there. Pure.

A member may say whatever it likes of later steps, as often and in as large messages as it likes: so
there is room for a few of each sender, and nobody pushes out another's.
"""

from collections import defaultdict, deque

from peer.swarm import round_types as rt
from peer.swarm.coordinator_questions import Place

_MOST_EVENTS, _MOST_BYTES = 32, 32 * 2**20
"""Of one sender: the last ones, or one of the largest."""


class EarlyEvents:
    """By sender, in the order in which they came."""

    def __init__(self) -> None:
        self._by_sender: defaultdict[str, deque[tuple[Place, rt.Event, int]]] = defaultdict(deque)

    def keep(self, place: Place, event: rt.Event) -> None:
        """Remember an event for its step, and forget the sender's oldest if they are too many."""
        kept = self._by_sender[event.sender if isinstance(event, rt.Received) else ""]
        kept.append((place, event, _num_bytes(event)))
        while len(kept) > _MOST_EVENTS or sum(num_bytes for *_, num_bytes in kept) > _MOST_BYTES:
            kept.popleft()

    def take(self, place: Place) -> list[tuple[Place, rt.Event]]:
        """All of a step or later ones; the rest is over."""
        kept = [item for items in self._by_sender.values() for item in items]
        self._by_sender.clear()
        return [(of_place, event) for of_place, event, _ in kept if of_place >= place]


def _num_bytes(event: rt.Event) -> int:
    return int(event.message.ByteSize()) if isinstance(event, rt.Received) else 0
