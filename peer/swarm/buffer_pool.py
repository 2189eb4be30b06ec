"""Memory that is used again by the next round.

Touching fresh pages costs more CPU than all else in a round where a hypervisor backs them late:
16 us a page, 0.4 s for 100 MB, were measured. A buffer is free once nothing refers to it any more,
which its reference count says; so nobody has to give anything back.
"""

import sys

import numpy as np
import numpy.typing as npt

_FREE_REFERENCES = 3
"""References to a free buffer while it is asked for: the list, the loop, the question itself."""
_NUM_ROUNDS_KEPT = 16


class BufferPool:
    """Buffers by size; one that has not been used for some rounds is given back."""

    def __init__(self) -> None:
        self._buffers: list[npt.NDArray[np.uint8]] = []
        self._round_by_id: dict[int, int] = {}
        self._round = 0

    def begin_round(self) -> None:
        """Give back what has been free for long."""
        self._round += 1
        oldest = self._round - _NUM_ROUNDS_KEPT
        for index in reversed(range(len(self._buffers))):
            buffer = self._buffers[index]
            is_old = self._round_by_id[id(buffer)] < oldest
            if is_old and sys.getrefcount(buffer) <= _FREE_REFERENCES:
                del self._round_by_id[id(buffer)], self._buffers[index]

    def take(self, num_bytes: int) -> npt.NDArray[np.uint8]:
        """A buffer of this size, with any content. Use it, or a view of it, before the
        next call.
        """
        for buffer in self._buffers:
            if buffer.size == num_bytes and sys.getrefcount(buffer) <= _FREE_REFERENCES:
                self._round_by_id[id(buffer)] = self._round
                return buffer
        buffer = np.empty(num_bytes, dtype=np.uint8)
        self._buffers.append(buffer)
        self._round_by_id[id(buffer)] = self._round
        return buffer

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        return sum(buffer.size for buffer in self._buffers)
