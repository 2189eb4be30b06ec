"""sparse: the largest values of every chunk of 4,096, with small indices (as SparseLoCo, arXiv
2508.15706: top-k per chunk, 12-bit indices, quantised values, error feedback by the sender).

A chunk of n values keeps k of them: a contribution min(n, 2 ceil(n / 128)), that is 64 of 4,096;
the weighted sum of m contributions m times as many (at most 16 times), so that nothing that was
sent is dropped from it. The k largest magnitudes are kept, of equal ones the first. Layout:

  u16 scale       as in int8 and int4, over the kept values
  indices         12 bits each, ascending: two in 3 bytes, the first in the low bits; 0 fills up
  codes           by ascending index: nibbles as int4 in a contribution, bytes as int8 in a sum

A chunk of a contribution takes 2 + 96 + 32 = 130 bytes of 16,384 (126 x). Error: of a kept value at
most max|chunk| / 13.9 (in a sum / 253), of a dropped one its own magnitude; no kept one is smaller.
"""

import numpy as np
import numpy.typing as npt

from protos.contract.codecs_wire.codec import (
    ByteArray,
    Codec,
    Float32Array,
    UInt32Array,
    magnitudes_of,
    raise_corrupt,
)
from protos.contract.codecs_wire.integers import (
    INT4_TOP,
    INT8_TOP,
    SCALE_BYTES,
    check_scales,
    pack_nibbles,
    rounded_codes,
    scale_bits_of,
    scales_from_bits,
    unpacked_bytes,
    unpacked_nibbles,
)

CHUNK_VALUES = 4_096
_VALUES_PER_PAIR = 128
"""One pair of values is kept of so many."""
MAX_RESULT_PARTS = 16
"""A sum of more contributions keeps 1,024 of 4,096 values, the largest."""

IndexArray = npt.NDArray[np.int64]


class SparseCodec(Codec):
    """See the module; `num_parts` is 0 for a contribution, else the contributions in the sum."""

    block_values = CHUNK_VALUES

    def __init__(self, num_parts: int = 0) -> None:
        self.name = f"sparse sum of {num_parts}" if num_parts else "sparse"
        self._num_parts = num_parts
        self._top = INT8_TOP if num_parts else INT4_TOP

    def for_result(self, num_parts: int) -> "SparseCodec":
        return SparseCodec(max(1, min(num_parts, MAX_RESULT_PARTS)))

    def num_kept(self, num_values: int) -> int:
        """Values kept of a chunk."""
        of_one = 2 * -(-num_values // _VALUES_PER_PAIR)
        return min(num_values, of_one * max(1, self._num_parts))

    def block_bytes(self, num_values: int) -> int:
        num_kept = self.num_kept(num_values)
        codes_bytes = num_kept if self._num_parts else (num_kept + 1) // 2
        return SCALE_BYTES + _indices_bytes(num_kept) + codes_bytes

    def _encode_blocks(self, values: Float32Array, records: ByteArray) -> None:
        values, magnitudes = magnitudes_of(values)
        num_rows, num_values = values.shape
        num_kept = self.num_kept(num_values)
        flat = np.flatnonzero(_largest(magnitudes, num_kept))
        kept = values.reshape(-1)[flat].reshape(num_rows, num_kept)
        indices = flat.reshape(num_rows, num_kept) - _first_of_row(num_rows, num_values)
        bits = scale_bits_of(magnitudes.max(axis=1, keepdims=True), self._top)
        records[:, :SCALE_BYTES].view("<u2")[...] = bits
        codes_begin = SCALE_BYTES + _indices_bytes(num_kept)
        _pack_indices(indices, records[:, SCALE_BYTES:codes_begin])
        codes = rounded_codes(kept, scales_from_bits(bits))
        if self._num_parts:
            np.copyto(records[:, codes_begin:].view(np.int8), codes, casting="unsafe")
        else:
            pack_nibbles(codes, records[:, codes_begin:])

    def _decode_blocks(self, records: ByteArray, out: Float32Array) -> None:
        num_rows, num_values = out.shape
        num_kept = self.num_kept(num_values)
        bits = records[:, :SCALE_BYTES].view("<u2")
        check_scales(self.name, bits, self._top)
        codes_begin = SCALE_BYTES + _indices_bytes(num_kept)
        indices = self._unpacked_indices(records[:, SCALE_BYTES:codes_begin], num_kept)
        if indices[:, -1].max() >= num_values:
            found = f"index {int(indices[:, -1].max())} in a chunk of {num_values} values"
            raise_corrupt(self.name, found, f"0 to {num_values - 1}")
        packed = records[:, codes_begin:]
        codes = (
            unpacked_bytes(self.name, packed)
            if self._num_parts
            else unpacked_nibbles(self.name, packed, num_kept)
        )
        kept = np.multiply(codes, scales_from_bits(bits), dtype=np.float32)
        out[...] = 0.0
        out.reshape(-1)[indices + _first_of_row(num_rows, num_values)] = kept

    def _unpacked_indices(self, packed: ByteArray, num_kept: int) -> IndexArray:
        """Indices [chunks, kept], strictly ascending."""
        num_pairs = -(-num_kept // 2)
        wide = np.zeros((packed.shape[0], 3 * num_pairs), dtype=np.int64)
        wide[:, : packed.shape[1]] = packed
        indices = np.empty((packed.shape[0], 2 * num_pairs), dtype=np.int64)
        indices[:, 0::2] = wide[:, 0::3] | (wide[:, 1::3] & 15) << 8
        indices[:, 1::2] = wide[:, 1::3] >> 4 | wide[:, 2::3] << 4
        if num_kept % 2 and indices[:, -1].any():
            raise_corrupt(self.name, "filling bits that are not 0", "0 after an odd chunk")
        indices = indices[:, :num_kept]
        if not (indices[:, 1:] > indices[:, :-1]).all():
            raise_corrupt(self.name, "indices out of order", "strictly ascending indices")
        return indices


def _indices_bytes(num_kept: int) -> int:
    return (3 * num_kept + 1) // 2


def _first_of_row(num_rows: int, num_values: int) -> IndexArray:
    return (np.arange(num_rows, dtype=np.int64) * num_values).reshape(-1, 1)


def _largest(magnitudes: UInt32Array, num_kept: int) -> npt.NDArray[np.bool_]:
    """True at the `num_kept` largest of each row [chunks, n], of equal ones at the first."""
    num_values = magnitudes.shape[1]
    if num_kept == num_values:
        return np.ones(magnitudes.shape, dtype=np.bool_)
    position = num_values - num_kept
    smallest_kept = np.partition(magnitudes, position, axis=1)[:, position : position + 1]
    is_kept: npt.NDArray[np.bool_] = magnitudes >= smallest_kept
    for row in np.flatnonzero(np.count_nonzero(is_kept, axis=1) != num_kept):
        is_kept[row] = magnitudes[row] > smallest_kept[row]
        num_open = num_kept - int(np.count_nonzero(is_kept[row]))
        is_kept[row, np.flatnonzero(magnitudes[row] == smallest_kept[row])[:num_open]] = True
    return is_kept


def _pack_indices(indices: IndexArray, out: ByteArray) -> None:
    num_rows, num_kept = indices.shape
    pairs = np.zeros((num_rows, -(-num_kept // 2), 2), dtype=np.uint16)
    pairs.reshape(num_rows, -1)[:, :num_kept] = indices
    low, high = pairs[:, :, 0], pairs[:, :, 1]
    packed = np.empty((num_rows, pairs.shape[1], 3), dtype=np.uint8)
    np.copyto(packed[:, :, 0], low & 255, casting="unsafe")
    np.copyto(packed[:, :, 1], low >> 8 | (high & 15) << 4, casting="unsafe")
    np.copyto(packed[:, :, 2], high >> 4, casting="unsafe")
    out[...] = packed.reshape(num_rows, -1)[:, : out.shape[1]]
