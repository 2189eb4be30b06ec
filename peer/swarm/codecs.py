"""Codecs at work: vectors encoded piece by piece, and error feedback around a codec.

A vector travels as its pieces (protos/contract/digest.py), each encoded by itself; a piece has a
multiple of every codec's block, so the pieces' bytes one after the other are the vector's bytes,
and any run of pieces can be encoded, sent, checked and decoded alone. The codec of a run is the one
that its RunSpec names; averaged vectors travel as its `for_result`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from protos.contract.codecs_wire import Codec
from protos.contract.digest import PIECE_VALUES, Float32Vector, num_pieces, piece_digest


def piece_bounds(begin_piece: int, end_piece: int, num_values: int) -> tuple[int, int]:
    """Values of a run of pieces."""
    return min(begin_piece * PIECE_VALUES, num_values), min(end_piece * PIECE_VALUES, num_values)


def piece_byte_bounds(
    codec: Codec, begin_piece: int, end_piece: int, num_values: int
) -> tuple[int, int]:
    """Bytes of a run of pieces in an encoded vector."""
    first, last = piece_bounds(begin_piece, end_piece, num_values)
    return codec.encoded_bytes(first), codec.encoded_bytes(last)


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedVector:
    """A whole vector in the bytes of its codec."""

    codec: Codec
    num_values: int
    data: memoryview
    """`codec.encoded_bytes(num_values)` bytes; fp32 shares the memory of the values."""

    @classmethod
    def encode(cls, codec: Codec, vector: Float32Vector) -> "EncodedVector":
        """Encode. Raises CorruptDataError for values that are not finite."""
        return cls(codec=codec, num_values=vector.size, data=codec.encode(vector))

    def run(self, begin_piece: int, end_piece: int) -> memoryview:
        """Bytes of a run of pieces."""
        first, last = piece_byte_bounds(self.codec, begin_piece, end_piece, self.num_values)
        return self.data[first:last]

    def digests(self) -> tuple[bytes, ...]:
        """SHA-256 of each piece's bytes."""
        pieces = range(num_pieces(self.num_values))
        return tuple(piece_digest(self.run(piece, piece + 1)) for piece in pieces)

    def decode_run(self, begin_piece: int, end_piece: int, out: Float32Vector) -> None:
        """Values of a run of pieces. Raises CorruptDataError."""
        self.codec.decode(self.run(begin_piece, end_piece), out)

    def decoded(self) -> Float32Vector:
        """All values, in memory of their own. Raises CorruptDataError."""
        vector = np.empty(self.num_values, dtype=np.float32)
        self.codec.decode(self.data, vector)
        return vector


def encode_with_residual(
    codec: Codec, vector: Float32Vector, residual: Float32Vector
) -> tuple[bytes, Float32Vector]:
    """(bytes of vector + residual, what they leave out): error feedback (Karimireddy et al. 2019,
    arXiv 1901.09847, algorithm 2: p = vector + e, e' = p - decode(encode(p))).

    Pure: keep the old residual until the round has committed, then take the new one. Raises
    CorruptDataError for a sum that is not finite.
    """
    encoded = bytearray(codec.encoded_bytes(vector.size))
    left = np.empty_like(vector)
    for first, last in _bounds_of_pieces(vector.size):
        total = np.add(vector[first:last], residual[first:last])
        data = codec.encode(total)
        encoded[codec.encoded_bytes(first) : codec.encoded_bytes(last)] = data
        codec.decode(data, left[first:last])
        np.subtract(total, left[first:last], out=left[first:last])
    return bytes(encoded), left


def _bounds_of_pieces(num_values: int) -> Iterator[tuple[int, int]]:
    for piece in range(num_pieces(num_values)):
        yield piece_bounds(piece, piece + 1, num_values)
