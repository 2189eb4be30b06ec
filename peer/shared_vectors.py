"""The replicated state and the contribution in anonymous shared memory, seen by daemon, swarm
process and trainer.

The memory is a memfd: it has no name, is inherited as a file descriptor and disappears with its
last holder, however that dies. Layout: a header of eight little-endian uint64, then the fp32
vectors `params`, `exp_avg`, `exp_avg_sq`, `contribution`, each `num_values` long.

Only the swarm process writes the state. Readers are kept from a half-written one by a sequence
lock: the header's counter is odd while the state is being written, and `read_state` repeats its
copy until the counter was even and unchanged. The trainer writes `contribution`, the swarm process
reads it only between `contribution_ready` and the outcome.
"""

import mmap
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from protos.contract.digest import Float32Vector

_HEADER_FIELDS = 8
_SEQUENCE, _INCARNATION, _OUTER_STEP, _SCHEDULE_TOKENS, _DIRECTIVE_NUMBER = range(5)
STATE_VECTORS = ("params", "exp_avg", "exp_avg_sq")
_ALL_VECTORS = (*STATE_VECTORS, "contribution")


@dataclass(frozen=True, slots=True, kw_only=True)
class StatePosition:
    """Which state the vectors hold."""

    incarnation: int
    outer_step: int
    schedule_tokens: int
    directive_number: int


class SharedVectors:
    """A mapping of the shared memory; create it in the daemon, attach elsewhere by file
    descriptor.
    """

    def __init__(self, fd: int, num_values: int) -> None:
        self.fd = fd
        self.num_values = num_values
        num_bytes = _HEADER_FIELDS * 8 + len(_ALL_VECTORS) * num_values * 4
        self._map = mmap.mmap(fd, num_bytes)
        self._header = np.frombuffer(self._map, dtype="<u8", count=_HEADER_FIELDS)
        begin = _HEADER_FIELDS * 8
        self._vectors: dict[str, Float32Vector] = {}
        for name in _ALL_VECTORS:
            self._vectors[name] = np.frombuffer(
                self._map, dtype="<f4", count=num_values, offset=begin
            )
            begin += num_values * 4

    @classmethod
    def create(cls, num_values: int) -> "SharedVectors":
        """Reserve zeroed memory for a model of `num_values` parameters."""
        fd = os.memfd_create("muster-vectors", os.MFD_CLOEXEC)
        os.ftruncate(fd, _HEADER_FIELDS * 8 + len(_ALL_VECTORS) * num_values * 4)
        return cls(fd, num_values)

    @property
    def params(self) -> Float32Vector:
        """Anchor parameters, canonical order."""
        return self._vectors["params"]

    @property
    def exp_avg(self) -> Float32Vector:
        """AdamW's first moment."""
        return self._vectors["exp_avg"]

    @property
    def exp_avg_sq(self) -> Float32Vector:
        """AdamW's second moment."""
        return self._vectors["exp_avg_sq"]

    @property
    def contribution(self) -> Float32Vector:
        """What this peer brings into the round: mean gradient per token over its ranges."""
        return self._vectors["contribution"]

    def state_vectors(self) -> tuple[Float32Vector, Float32Vector, Float32Vector]:
        """The vectors that state_digest covers, in its order."""
        return self.params, self.exp_avg, self.exp_avg_sq

    def position(self) -> StatePosition:
        """Which state the vectors hold, as last published."""
        header = self._header
        return StatePosition(
            incarnation=int(header[_INCARNATION]),
            outer_step=int(header[_OUTER_STEP]),
            schedule_tokens=int(header[_SCHEDULE_TOKENS]),
            directive_number=int(header[_DIRECTIVE_NUMBER]),
        )

    @property
    def sequence(self) -> int:
        """Rises by one at the begin and at the end of every change of the state; odd during one."""
        return int(self._header[_SEQUENCE])

    @contextmanager
    def writing_state(self, position: StatePosition) -> Iterator[None]:
        """Write the state inside; afterwards the vectors hold `position`. Swarm process only."""
        header = self._header
        header[_SEQUENCE] += 1
        try:
            yield
            header[_INCARNATION] = position.incarnation
            header[_OUTER_STEP] = position.outer_step
            header[_SCHEDULE_TOKENS] = position.schedule_tokens
            header[_DIRECTIVE_NUMBER] = position.directive_number
        finally:
            header[_SEQUENCE] += 1

    def read_params(self, target: Float32Vector) -> StatePosition:
        """Copy a whole, untorn set of parameters into `target` and say which state it is."""
        while True:
            before = int(self._header[_SEQUENCE])
            if before % 2 == 0:
                np.copyto(target, self.params)
                position = self.position()
                if int(self._header[_SEQUENCE]) == before:
                    return position
            time.sleep(0.001)

    def close(self) -> None:
        """Drop the mapping and the descriptor; views taken before keep their memory alive."""
        self._vectors.clear()
        os.close(self.fd)
