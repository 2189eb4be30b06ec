"""Patience learnt from measured rounds and calls: median + spread. Pure.

Nothing here affects what is agreed, only how long a member waits before it goes on without another.
The limits around what was measured are wide: below them a busy machine would look dead, above them
nobody would wait for a person's answer. On a quiet loopback a stopped member is found within 1.7 s
in any phase of a round; where answers take longer, later.
"""

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from peer.swarm.round_types import RoundTiming

_NUM_ROUNDS = 16
_NUM_CALLS = 64
_NUM_FIRST_CALLS = 16
_LEAST_ROUNDS = 3
_FIRST = RoundTiming(form_wait_seconds=30.0, reduce_wait_seconds=60.0, is_guessed=True)
"""Of averaging, this is for a reduction in which nothing moves: nobody knows the links yet."""
FIRST_CALL_SECONDS = 4.0
_FIRST_STALL_SECONDS = 15.0
MARGIN_SECONDS = 0.75
"""Of every patience, for a process that has to wait for a core."""
_MOST_DOUBLINGS = 16
MOST_REDUCE_SECONDS = 3600.0
"""For the bytes of one attempt, also if they still move."""


class Pace:
    """Durations of the last rounds of this member, and the deadlines that follow from them."""

    def __init__(self) -> None:
        self._form_seconds: deque[float] = deque(maxlen=_NUM_ROUNDS)
        self._reduce_seconds: deque[float] = deque(maxlen=_NUM_ROUNDS)
        self._agree_seconds: deque[float] = deque(maxlen=_NUM_ROUNDS)
        self._wait_seconds: deque[float] = deque(maxlen=_NUM_ROUNDS)
        self._round_seconds: deque[float] = deque(maxlen=_NUM_ROUNDS)
        self._call_seconds: deque[float] = deque(maxlen=_NUM_CALLS)

    def add(self, *, form_seconds: float, reduce_seconds: float, agree_seconds: float) -> None:
        """Remember a committed round: from the own contribution to the group, from there to the
        bytes, and from there to the certificate.
        """
        self._form_seconds.append(form_seconds)
        self._reduce_seconds.append(reduce_seconds)
        self._agree_seconds.append(agree_seconds)

    def add_round(self, seconds: float) -> None:
        """Remember the time from one certified step to the next."""
        self._round_seconds.append(seconds)

    def add_wait(self, seconds: float) -> None:
        """Remember the longest wait for the next bytes of a reduction that succeeded."""
        self._wait_seconds.append(seconds)

    def add_call(self, seconds: float) -> None:
        """Remember how long a member took to answer a message."""
        self._call_seconds.append(seconds)

    @property
    def is_learnt(self) -> bool:
        """True once deadlines follow from rounds; before, who misses one may still be quick."""
        return len(self._form_seconds) >= _LEAST_ROUNDS

    @property
    def call_seconds(self) -> float:
        """How long to wait for a member's answer to a message, whoever it is. Of the first answers
        only the quicker half counts: the others waited for the start of this very process.
        """
        calls = sorted(self._call_seconds)
        if not calls:
            return FIRST_CALL_SECONDS
        if len(calls) < _NUM_FIRST_CALLS:
            calls = calls[: max(1, len(calls) // 2)]
        return _patience(calls, factor=4.0, least=0.75, most=FIRST_CALL_SECONDS)

    def stall_seconds(self, num_failed: int = 0) -> float:
        """How long a member may send nothing that we wait for, until it counts as stopped; twice as
        long after each reduction of the step that failed.
        """
        seconds = _FIRST_STALL_SECONDS
        if self._wait_seconds:
            factor = 2.0 if len(self._wait_seconds) >= _LEAST_ROUNDS else 4.0
            seconds = _patience(self._wait_seconds, factor=factor, least=0.9, most=60.0)
        return min(60.0, seconds * 2.0 ** min(num_failed, _MOST_DOUBLINGS))

    @property
    def _least_wait_seconds(self) -> float:
        """Where steps are far apart, members and bytes may be late: a third of the time between.

        Who is left out loses the work of a whole step, which costs more than the wait.
        """
        between = statistics.median(self._round_seconds) if self._round_seconds else 0.0
        return max(4.0, between / 3)

    def timing(self) -> RoundTiming:
        """Deadlines for the next round; generous until three rounds were measured. How often to ask
        and how long to wait for answers follows from calls alone.
        """
        call = self.call_seconds
        timing = replace(
            _FIRST,
            exchange_wait_seconds=max(1.0, 0.75 * call),
            rejoin_wait_seconds=max(0.5, 0.5 * call),
            resend_seconds=min(1.0, max(0.3, 0.3 * call)),
            grace_seconds=1.0 + call,
        )
        if not self.is_learnt:
            return timing
        return replace(
            timing,
            is_guessed=False,
            form_wait_seconds=_patience(
                self._form_seconds, factor=2.0, least=self._least_wait_seconds, most=60.0
            ),
            reduce_wait_seconds=_patience(
                self._reduce_seconds, factor=2.0, least=self._least_wait_seconds, most=300.0
            ),
            agree_wait_seconds=_patience(self._agree_seconds, factor=4.0, least=1.0, most=30.0),
        )


def reduce_deadline_seconds(
    timing: RoundTiming, *, expected_seconds: float, num_failed: int
) -> float:
    """How long the bytes of an attempt may take: what past rounds or the links' rates let expect,
    and twice as long after each reduction of the step that failed.
    """
    patience = max(timing.reduce_wait_seconds, 2.0 * expected_seconds + 2.0)
    return min(MOST_REDUCE_SECONDS, patience * 2.0 ** min(num_failed, _MOST_DOUBLINGS))


def _patience(values: Sequence[float], *, factor: float, least: float, most: float) -> float:
    """So many times the median plus four times the median deviation plus a margin."""
    median = statistics.median(values)
    spread = statistics.median(abs(value - median) for value in values)
    return min(most, max(least, factor * median + 4.0 * spread + MARGIN_SECONDS))
