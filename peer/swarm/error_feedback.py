"""Error feedback: what a lossy codec leaves out of a contribution is added to the next one of the
same fragment (Karimireddy et al. 2019, arXiv 1901.09847, algorithm 2).

The residual is private to this member: never in a digest, a snapshot or a checkpoint that leaves
the machine. It lies in shared memory, because a trainer with parameters of its own begins its next
steps from the anchors less what it owes (diloco.py). It changes only when a round is committed with
the own contribution in it; an attempt that is discarded leaves it as it was, because the
contribution stays frozen, and a resync makes it zero. A file beside the local checkpoint carries it
over a restart; it is used only with the very state that it was saved for, so a joiner and a member
that caught up begin with zeros.
"""

import logging
from pathlib import Path

import numpy as np

from peer.swarm.codecs import EncodedVector, encode_with_residual
from peer.swarm.fragments import Fragment
from protos.contract.codecs_wire import Codec
from protos.contract.digest import Float32Vector

logger = logging.getLogger(__name__)


Place = tuple[int, int]
"""(incarnation, committed outer steps) of a state."""


class ErrorFeedback:
    """Encodes contributions and keeps what the codec leaves out; of fp32 nothing is left out."""

    def __init__(self, codec: Codec, residual: Float32Vector) -> None:
        """`residual`: memory of the canonical vector's length, not touched with fp32."""
        self._codec = codec
        self._residual = residual if codec.name != "fp32" else None
        self._place: Place = (-1, -1)
        self._pending: tuple[Fragment, Float32Vector] | None = None
        self.reset()

    def encode(
        self, fragment: Fragment, contribution: Float32Vector, *, place: Place
    ) -> EncodedVector:
        """A contribution made on the state at `place` with the fragment's residual added, in the
        codec's bytes; what is left out waits for `end_round`.

        A residual of another state is not used: this member has been brought to `place`. Raises
        CorruptDataError for values that are not finite.
        """
        if self._residual is None:
            return EncodedVector.encode(self._codec, contribution)
        if place != self._place:
            self.reset()
            self._place = place
        packed = np.empty(fragment.num_values, dtype=np.float32)
        fragment.pack(self._residual, packed)
        data, left = encode_with_residual(self._codec, contribution, packed)
        self._pending = (fragment, left)
        return EncodedVector(codec=self._codec, num_values=contribution.size, data=memoryview(data))

    def end_round(self, *, is_committed: bool, place: Place) -> None:
        """The state is now at `place`: with the encoded contribution in it, what that left out is
        owed to the next one; without it this member resyncs and owes nothing.
        """
        if not is_committed:
            self.reset()
        elif self._pending is not None and self._residual is not None:
            fragment, left = self._pending
            fragment.unpack(left, self._residual)
        self._pending, self._place = None, place

    def reset(self) -> None:
        """Owe nothing."""
        self._pending = None
        if self._residual is not None:
            self._residual.fill(0.0)

    @property
    def norm(self) -> float:
        """Size of what is owed; for metrics and tests."""
        return float(np.linalg.norm(self._residual)) if self._residual is not None else 0.0

    def save(self, folder: Path, place: Place) -> None:
        """Keep the residual for a restart on the state at `place`; replaces older files."""
        if self._residual is None or self._place != place:
            return
        path = folder / _file_name(place)
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(self._residual.data)
        temporary.replace(path)
        for old in folder.glob("*.residual"):
            if old != path:
                old.unlink(missing_ok=True)

    def load(self, folder: Path, place: Place) -> bool:
        """Take the residual saved for this very state; False, with zeros, if there is none."""
        self.reset()
        self._place, path = place, folder / _file_name(place)
        if self._residual is None or not path.exists():
            return False
        values = np.fromfile(path, dtype="<f4")
        if values.size != self._residual.size or not np.isfinite(values).all():
            logger.warning("%s is of no use: %d values, not all finite", path.name, values.size)
            return False
        self._residual[:] = values
        return True


def _file_name(place: Place) -> str:
    return f"{place[0]}-{place[1]}.residual"
