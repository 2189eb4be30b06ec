"""The replicated state and the contribution in anonymous shared memory, seen by daemon, swarm
process and trainer.

The memory is a memfd: it has no name, is inherited as a file descriptor and disappears with its
last holder, however that dies. Layout: a header of sixteen little-endian uint64, then the fp32
vectors of the strategy's state (digest.py: STATE_LAYOUTS, `params` first), `contribution` and
`residual`, each `num_values` long. The size says which layout it is. What nobody touches takes no
memory.

Only the swarm process writes the state. Readers are kept from a half-written one by a sequence
lock: the header's counter is odd while the state is being written, and `read_state` repeats its
copy until the counter was even and unchanged. The trainer writes `contribution`, the swarm process
reads it only between `contribution_ready` and the outcome; with `residual` it is the other way
round.
"""

import dataclasses
import mmap
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Self

import numpy as np

from protos.contract.digest import STATE_LAYOUTS, Float32Vector

_HEADER_FIELDS = 16
_DIGEST_FIELDS = 4
_OWN_VECTORS = ("contribution", "residual")
"""Of this peer alone, behind the state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StatePosition:
    """Which state the vectors hold, and what the directive in force says of the round after it.

    The fields are the header's, in its order, after the counter; the digest is its end.
    """

    incarnation: int
    outer_step: int
    schedule_tokens: int
    directive_number: int
    planned_round_tokens: int = 0
    """Sum of the round budgets of the roster in force; 0 while that is not known."""
    cooldown_start_tokens: int = 0
    budget_tokens: int = 0
    state_digest: bytes = field(default=bytes(8 * _DIGEST_FIELDS), repr=False)

    def is_same_state(self, other: "StatePosition") -> bool:
        """False also for two states of one outer step: a wrong one may have been replaced."""
        own = (self.incarnation, self.outer_step, self.state_digest)
        return own == (other.incarnation, other.outer_step, other.state_digest)

    def follows(self, before: "StatePosition") -> bool:
        """True if this is the state one committed outer step after `before`."""
        return (self.incarnation, self.outer_step) == (before.incarnation, before.outer_step + 1)


_POSITION_FIELDS = tuple(f.name for f in dataclasses.fields(StatePosition))[:-1]
assert 1 + len(_POSITION_FIELDS) + _DIGEST_FIELDS <= _HEADER_FIELDS


@dataclass(slots=True)
class StateWriting:
    """A change of the state under way."""

    position: StatePosition
    """Which state it will be: it may be completed until the end."""


class SharedVectors:
    """A mapping of the shared memory; create it in the daemon, attach elsewhere by file
    descriptor.
    """

    def __init__(self, fd: int, num_values: int) -> None:
        self.fd = fd
        self.num_values = num_values
        total_bytes = os.fstat(fd).st_size
        num_state_vectors = (total_bytes - _HEADER_FIELDS * 8) // (num_values * 4) - len(
            _OWN_VECTORS
        )
        names = {len(layout): layout for layout in STATE_LAYOUTS.values()}[num_state_vectors]
        assert total_bytes == _total_bytes(names, num_values)
        self._map = mmap.mmap(fd, total_bytes)
        self._header = np.frombuffer(self._map, dtype="<u8", count=_HEADER_FIELDS)
        begin = _HEADER_FIELDS * 8
        self._vectors: dict[str, Float32Vector] = {}
        for name in (*names, *_OWN_VECTORS):
            self._vectors[name] = np.frombuffer(
                self._map, dtype="<f4", count=num_values, offset=begin
            )
            begin += num_values * 4

    @classmethod
    def create(cls, num_values: int, layout: tuple[str, ...] = STATE_LAYOUTS["sync"]) -> Self:
        """Reserve zeroed memory for a model of `num_values` parameters and its strategy's state."""
        fd = os.memfd_create("muster-vectors", os.MFD_CLOEXEC)
        os.ftruncate(fd, _total_bytes(layout, num_values))
        return cls(fd, num_values)

    @property
    def params(self) -> Float32Vector:
        """Anchor parameters, canonical order."""
        return self._vectors["params"]

    @property
    def contribution(self) -> Float32Vector:
        """What this peer brings into the round; a fragment's values lie at its beginning, and what
        is behind them is the trainer's own.
        """
        return self._vectors["contribution"]

    @property
    def residual(self) -> Float32Vector:
        """What a lossy codec has left out of this peer's contributions so far (error_feedback.py);
        with fp32 nobody touches it.
        """
        return self._vectors["residual"]

    def state_vectors(self) -> tuple[Float32Vector, ...]:
        """The vectors that state_digest covers, in its order."""
        return tuple(v for name, v in self._vectors.items() if name not in _OWN_VECTORS)

    def position(self) -> StatePosition:
        """Which state the vectors hold, as last published."""
        values = (int(value) for value in self._header[1 : 1 + len(_POSITION_FIELDS)])
        numbers = dict(zip(_POSITION_FIELDS, values, strict=True))
        digest = self._header[-_DIGEST_FIELDS:].tobytes()
        return StatePosition(**numbers, state_digest=digest)

    @property
    def sequence(self) -> int:
        """Rises by one at the begin and at the end of every change of the state; odd during one."""
        return int(self._header[0])

    @contextmanager
    def writing_state(self, position: StatePosition) -> Iterator[StateWriting]:
        """Write the state inside; afterwards the vectors hold `position`. Swarm process only.

        A writer that died inside left the counter odd; the next one takes it over as it is.
        """
        writing = int(self._header[0]) | 1
        self._header[0] = writing
        change = StateWriting(position)
        try:
            yield change
            *numbers, digest = dataclasses.astuple(change.position)
            self._header[1 : 1 + len(_POSITION_FIELDS)] = numbers
            self._header[-_DIGEST_FIELDS:] = np.frombuffer(digest, dtype="<u8")
        finally:
            self._header[0] = writing + 1

    def read_params(self, target: Float32Vector) -> StatePosition:
        """Copy a whole, untorn set of parameters into `target` and say which state it is."""
        return self._read(lambda: np.copyto(target, self.params))

    def read_position(self) -> StatePosition:
        """Which state the vectors hold, as soon as none is being written."""
        return self._read(lambda: None)

    def read_part(self, place: slice, target: Float32Vector, *, of: StatePosition) -> bool:
        """Copy some of the parameters of a state into `target`; False if it is there no more, and
        `target` then holds those of another.
        """
        return self._read(lambda: np.copyto(target, self.params[place])).is_same_state(of)

    def _read(self, copy: Callable[[], None]) -> StatePosition:
        """Copy something of one state, and say which it is.

        Waits while a state is being written; if the writer has died inside, until its successor has
        written one (the daemon's child_watch.py bounds that).
        """
        while True:
            before = int(self._header[0])
            if before % 2 == 0:
                copy()
                position = self.position()
                if int(self._header[0]) == before:
                    return position
            time.sleep(0.001)

    def close(self) -> None:
        """Drop the mapping and the descriptor; views taken before keep their memory alive."""
        self._vectors.clear()
        os.close(self.fd)


def _total_bytes(layout: tuple[str, ...], num_values: int) -> int:
    return _HEADER_FIELDS * 8 + (len(layout) + len(_OWN_VECTORS)) * num_values * 4
