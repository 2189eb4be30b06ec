"""An immutable image of a state, which a donor serves while its own state moves on.

The image is a file without a name (it disappears with this process, however that ends) and is read
piece by piece, so serving costs no memory. It is copied while nobody writes the state: if a step
was made meanwhile, the copy is thrown away and the asker hears that the state has moved on. So no
round ever waits for a newcomer.
"""

import logging
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from peer.swarm.piece_plan import PieceLayout
from peer.swarm.replica import Replica, Snapshot
from protos.contract.digest import Float32Vector

logger = logging.getLogger(__name__)

_WRITE_BYTES = 2**22
_TRIES = 3
_PAUSE_SECONDS = 0.002


@dataclass(frozen=True, slots=True, kw_only=True)
class StateImage:
    """A state in a file without a name; `snapshot.vectors` must not be read any more."""

    snapshot: Snapshot
    layout: PieceLayout
    fd: int

    def read_piece(self, piece: int) -> bytes:
        """Bytes of one piece."""
        offset, length = self.layout.bytes_of(piece)
        data = os.pread(self.fd, length, offset)
        assert len(data) == length, "the image is whole"
        return data

    def close(self) -> None:
        """Give the space back."""
        os.close(self.fd)


def make_image(
    replica: Replica, *, incarnation: int, outer_step: int, folder: Path
) -> StateImage | None:
    """Image of the state at a position, None if it is not held (any more). Raises OSError when the
    disk is full.

    Runs in a thread beside the task that writes the state.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for _ in range(_TRIES):
        sequence = replica.steady_sequence()
        if sequence is None:
            time.sleep(_PAUSE_SECONDS)
            continue
        snapshot = replica.snapshot(incarnation=incarnation, outer_step=outer_step)
        if snapshot is None:
            return None
        fd = _copy(snapshot.vectors, folder)
        if not snapshot.is_live or replica.steady_sequence() == sequence:
            layout = PieceLayout(tuple(vector.size for vector in snapshot.vectors))
            return StateImage(snapshot=snapshot, layout=layout, fd=fd)
        os.close(fd)
    return None


def _copy(vectors: Sequence[Float32Vector], folder: Path) -> int:
    with tempfile.TemporaryFile(dir=folder) as file:
        for vector in vectors:
            data = vector.reshape(-1).view("u1").data
            for begin in range(0, len(data), _WRITE_BYTES):
                file.write(data[begin : begin + _WRITE_BYTES])
        file.flush()
        return os.dup(file.fileno())


class ImageShelf:
    """At most a few images at a time, each kept for a while after its last reader, so that
    downloads can be resumed.
    """

    def __init__(self, *, max_images: int = 2, keep_seconds: float = 120.0) -> None:
        self._max_images, self._keep_seconds = max_images, keep_seconds
        self._image_by_place: dict[tuple[int, int], StateImage] = {}
        self._readers_by_place: dict[tuple[int, int], int] = {}
        self._unused_since_by_place: dict[tuple[int, int], float] = {}

    @property
    def oldest_step(self) -> int | None:
        """Lowest outer step of an image."""
        return min((step for _, step in self._image_by_place), default=None)

    @property
    def num_readers(self) -> int:
        """Readers of all images."""
        return sum(self._readers_by_place.values())

    def borrow(self, place: tuple[int, int]) -> StateImage | None:
        """An image that is there, for one more reader."""
        image = self._image_by_place.get(place)
        if image is not None:
            self._readers_by_place[place] += 1
        return image

    def give_back(self, place: tuple[int, int], now_seconds: float) -> None:
        """A reader has ended."""
        self._readers_by_place[place] -= 1
        if not self._readers_by_place[place]:
            self._unused_since_by_place[place] = now_seconds

    def make_room(self) -> bool:
        """True if one more image may be put up; the one unused for longest goes if there are
        enough.
        """
        if len(self._image_by_place) < self._max_images:
            return True
        unused = [place for place, readers in self._readers_by_place.items() if not readers]
        if not unused:
            return False
        self._drop(min(unused, key=lambda place: self._unused_since_by_place[place]))
        return True

    def put(self, image: StateImage, now_seconds: float) -> None:
        """Put up a new image, without a reader yet."""
        place = (image.snapshot.meta.incarnation, image.snapshot.meta.outer_step)
        self._image_by_place[place], self._readers_by_place[place] = image, 0
        self._unused_since_by_place[place] = now_seconds

    def drop_unused(self, now_seconds: float) -> None:
        """Drop images that nobody has read for long."""
        for place, readers in list(self._readers_by_place.items()):
            if (
                not readers
                and now_seconds - self._unused_since_by_place[place] > self._keep_seconds
            ):
                self._drop(place)

    def close(self) -> None:
        """Drop everything."""
        for place in list(self._image_by_place):
            self._drop(place)

    def _drop(self, place: tuple[int, int]) -> None:
        self._image_by_place.pop(place).close()
        del self._readers_by_place[place], self._unused_since_by_place[place]
