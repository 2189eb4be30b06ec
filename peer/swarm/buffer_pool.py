"""Memory that is used again by the next round.

Touching fresh pages costs more CPU than all else in a round where a hypervisor backs them late:
16 us a page, 0.4 s for 100 MB, were measured. A buffer is free once nothing but the pool refers to
it, which its reference count says; so nobody has to give anything back. How many references the
interpreter shows for such a buffer differs between versions of Python, so it is counted here, and
an interpreter on which it cannot be told is refused.
"""

import sys

import numpy as np
import numpy.typing as npt

from protos.contract.errors import ErrorCode, MachineError

_NUM_ROUNDS_KEPT = 16

_Buffers = list[npt.NDArray[np.uint8]]


def _num_references(buffers: _Buffers, index: int) -> int:
    """As the interpreter counts them, its own while it asks included."""
    return sys.getrefcount(buffers[index])


def _count_of_free_buffer() -> int:
    """References that a free buffer shows. Raises MachineError if one in use shows no more."""
    buffers: _Buffers = [np.empty(8, dtype=np.uint8)]
    free = _num_references(buffers, 0)
    held = []
    for view in (buffers[0].data[2:4], buffers[0].view("<f4")[:1]):
        held.append(_num_references(buffers, 0))
        del view
    again = _num_references(buffers, 0)
    if min(held) <= free or again != free:
        raise MachineError(
            f"Python {sys.version.split()[0]} counts {free}, {held}, {again} references to a "
            "buffer that is free, in use, free",
            allowed="an interpreter whose sys.getrefcount shows what is in use",
            remedy="run the peer on CPython 3.11 to 3.13",
            code=ErrorCode.CAPABILITY_MISSING,
        )
    return free


class BufferPool:
    """Buffers by size; one that has not been used for some rounds is given back."""

    def __init__(self) -> None:
        """Raises MachineError on an interpreter that cannot tell which buffers are in use."""
        self._free_references = _count_of_free_buffer()
        self._buffers: _Buffers = []
        self._round_by_id: dict[int, int] = {}
        self._round = 0

    def _is_free(self, index: int) -> bool:
        return _num_references(self._buffers, index) <= self._free_references

    def begin_round(self) -> None:
        """Give back what has been free for long."""
        self._round += 1
        oldest = self._round - _NUM_ROUNDS_KEPT
        for index in reversed(range(len(self._buffers))):
            key = id(self._buffers[index])
            if self._round_by_id[key] < oldest and self._is_free(index):
                del self._round_by_id[key], self._buffers[index]

    def take(self, num_bytes: int) -> npt.NDArray[np.uint8]:
        """A buffer of this size, with any content. Use it, or a view of it, before the
        next call.
        """
        sizes = [buffer.size for buffer in self._buffers]
        for index, size in enumerate(sizes):
            if size == num_bytes and self._is_free(index):
                self._round_by_id[id(self._buffers[index])] = self._round
                return self._buffers[index]
        self._buffers.append(np.empty(num_bytes, dtype=np.uint8))
        self._round_by_id[id(self._buffers[-1])] = self._round
        return self._buffers[-1]

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        return sum(buffer.size for buffer in self._buffers)
