"""Patience learnt from measured rounds: median + spread, within limits. Pure."""

import statistics
from collections import deque

from peer.swarm.round_types import RoundTiming

_NUM_ROUNDS = 16
_FIRST = RoundTiming(form_wait_seconds=30.0, reduce_wait_seconds=60.0)


class Pace:
    """Durations of the last rounds of this member, and the deadlines that follow from them."""

    def __init__(self) -> None:
        self._form_seconds: deque[float] = deque(maxlen=_NUM_ROUNDS)
        self._reduce_seconds: deque[float] = deque(maxlen=_NUM_ROUNDS)

    def add(self, *, form_seconds: float, reduce_seconds: float) -> None:
        """Remember a committed round: from the own contribution to the group, and from there to the
        bytes.
        """
        self._form_seconds.append(form_seconds)
        self._reduce_seconds.append(reduce_seconds)

    def timing(self) -> RoundTiming:
        """Deadlines for the next round; generous until three rounds were measured."""
        if len(self._form_seconds) < 3:
            return _FIRST
        return RoundTiming(
            form_wait_seconds=_deadline(self._form_seconds, least=5.0, most=60.0),
            reduce_wait_seconds=_deadline(self._reduce_seconds, least=10.0, most=300.0),
        )


def _deadline(values: deque[float], *, least: float, most: float) -> float:
    """Twice the median plus four times the median deviation plus two seconds, within limits."""
    median = statistics.median(values)
    spread = statistics.median(abs(value - median) for value in values)
    return min(most, max(least, 2.0 * median + 4.0 * spread + 2.0))
