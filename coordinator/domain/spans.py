"""Runs of whole windows inside one chunk of one data pass, and the little arithmetic on them.

A span is (schedule_position, data_pass, chunk_index, begin_window, end_window), half-open. The
position fixes pass and chunk; it orders spans as the schedule does. Windows count positions in the
chunk's permuted order.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Windows [begin_window, end_window) of the chunk at a schedule position."""

    schedule_position: int
    data_pass: int
    chunk_index: int
    begin_window: int
    end_window: int

    @property
    def num_windows(self) -> int:
        """Windows in it."""
        return self.end_window - self.begin_window

    def part(self, begin_window: int, end_window: int) -> "Span":
        """The same chunk, other windows."""
        return Span(
            schedule_position=self.schedule_position,
            data_pass=self.data_pass,
            chunk_index=self.chunk_index,
            begin_window=begin_window,
            end_window=end_window,
        )


Interval = tuple[int, int]
"""Half-open [begin, end) of windows."""


def subtract(whole: Interval, holes: Iterable[Interval]) -> list[Interval]:
    """What is left of an interval without the holes, in order; holes may overlap and come in any
    order.
    """
    left: list[Interval] = []
    begin, end = whole
    for hole_begin, hole_end in sorted(holes):
        if hole_end <= begin or hole_begin >= hole_end:
            continue
        if hole_begin >= end:
            break
        if hole_begin > begin:
            left.append((begin, hole_begin))
        begin = max(begin, hole_end)
        if begin >= end:
            return left
    if begin < end:
        left.append((begin, end))
    return left


def intersect(whole: Interval, others: Iterable[Interval]) -> list[Interval]:
    """Parts of an interval that lie in one of the others, in order; the others do not overlap each
    other.
    """
    begin, end = whole
    cut = ((max(begin, other[0]), min(end, other[1])) for other in sorted(others))
    return [found for found in cut if found[0] < found[1]]


def num_windows(intervals: Sequence[Interval]) -> int:
    """Sum of the lengths."""
    return sum(end - begin for begin, end in intervals)
