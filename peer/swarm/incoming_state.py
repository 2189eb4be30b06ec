"""A state on its way here: its pieces on disk, each checked before it is written, kept over
restarts of this process.

incoming.header holds the donor's SnapshotHeader with the list of pieces, incoming.bin the vectors
one behind the other. Which pieces are there is nowhere written down: whatever has the digest that
is wanted at its place counts, so a torn write costs one piece, and pieces that two states share are
not fetched again. Nothing of a state is kept in memory but the piece at hand.
"""

import functools
import os
from pathlib import Path

import numpy as np
from google.protobuf.message import DecodeError

from peer.home import machine_error_from_os_error
from peer.swarm.piece_plan import PieceLayout
from protos.contract.digest import Float32Vector, piece_digest
from protos.muster.v1 import state_pb2


class IncomingState:
    """Both files; one download at a time."""

    def __init__(self, folder: Path, layout: PieceLayout) -> None:
        self.layout = layout
        self._data_path = folder / "incoming.bin"
        self._header_path = folder / "incoming.header"
        self._digests: tuple[bytes, ...] = ()
        self._fd = -1

    def remembered(self) -> state_pb2.SnapshotHeader | None:
        """Header of a download that was not finished; the caller trusts nothing in it."""
        try:
            data = self._header_path.read_bytes()
            header: state_pb2.SnapshotHeader = state_pb2.SnapshotHeader.FromString(data)
        except (OSError, DecodeError):
            return None
        is_ours = len(header.piece_digests) == self.layout.num_pieces
        return header if is_ours and self._data_path.exists() else None

    def begin(self, header: state_pb2.SnapshotHeader) -> list[int]:
        """Expect the pieces of a proven list; returns those that are there. Raises MachineError."""
        self._digests = tuple(header.piece_digests)
        try:
            self.close()
            self._fd = os.open(self._data_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            os.ftruncate(self._fd, self.layout.total_bytes)
            held = [piece for piece in range(len(self._digests)) if self._is_there(piece)]
            temporary = self._header_path.with_suffix(".tmp")
            temporary.write_bytes(header.SerializeToString())
            temporary.replace(self._header_path)
        except OSError as error:
            raise machine_error_from_os_error(error, action=f"write {self._data_path}") from error
        return held

    def held(self, header: state_pb2.SnapshotHeader) -> int:
        """How many pieces of a list are there, without expecting it."""
        self._digests = tuple(header.piece_digests)
        try:
            self.close()
            self._fd = os.open(self._data_path, os.O_RDONLY | os.O_CLOEXEC)
            return sum(self._is_there(piece) for piece in range(len(self._digests)))
        except OSError:
            return 0
        finally:
            self.close()

    def _is_there(self, piece: int) -> bool:
        offset, length = self.layout.bytes_of(piece)
        if _is_hole(self._fd, offset, length):
            return self._digests[piece] == _digest_of_zeros(length)
        return piece_digest(os.pread(self._fd, length, offset)) == self._digests[piece]

    def take(self, piece: int, data: bytes) -> bool:
        """Keep a piece; False, with nothing written, if it is not what its digest says. Raises
        MachineError.
        """
        if piece_digest(data) != self._digests[piece]:
            return False
        offset, _ = self.layout.bytes_of(piece)
        try:
            os.pwrite(self._fd, data, offset)
        except OSError as error:
            raise machine_error_from_os_error(error, action=f"write {self._data_path}") from error
        return True

    def vectors(self) -> tuple[Float32Vector, ...]:
        """The vectors, mapped from the file and read-only; whole once every piece was taken."""
        mapped = np.memmap(self._data_path, dtype="<f4", mode="r")
        ends = np.cumsum(self.layout.sizes)
        return tuple(
            mapped[end - size : end] for size, end in zip(self.layout.sizes, ends, strict=True)
        )

    def close(self) -> None:
        """Stop writing; what is there stays for a later try."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def discard(self) -> None:
        """The state was loaded, or will never be wanted again."""
        self.close()
        for path in (self._header_path, self._data_path):
            path.unlink(missing_ok=True)


def _is_hole(fd: int, offset: int, length: int) -> bool:
    """True if nothing was ever written there."""
    try:
        return os.lseek(fd, offset, os.SEEK_DATA) >= offset + length
    except OSError:  # ENXIO: nothing but a hole up to the end
        return True


@functools.cache
def _digest_of_zeros(length: int) -> bytes:
    return piece_digest(bytes(length))
