"""Integer layouts with one scale per block: int8 and int4.

A block is u16 scale (bf16 bits, little-endian, 0 = all zeros), then the codes. The scale is
max|block| / T with T = 127 or 7, rounded to the nearest bf16; code = x / scale rounded to nearest
even, in -T..T; value = code * scale, exact in fp32. The largest code of a block is always T, which
makes encoding what was decoded give the same bytes again.

int8  blocks of 256: 2 + 256 bytes, codes in two's complement. |error| <= max|block| / 253.
int4  blocks of 64: 2 + 32 bytes, code + 8 per nibble, the even value in the low one; an odd block
      is filled up with code 0. |error| <= max|block| / 13.9.
"""

from abc import abstractmethod

import numpy as np
import numpy.typing as npt

from protos.contract.codecs_wire.codec import (
    MAX_MAGNITUDE,
    MIN_BITS,
    MIN_MAGNITUDE,
    ByteArray,
    Codec,
    Float32Array,
    UInt32Array,
    magnitudes_of,
    raise_corrupt,
)
from protos.contract.codecs_wire.floats import nearest_bf16_bits

SCALE_BYTES = 2
_ZERO_NIBBLE = 8
INT8_TOP, INT4_TOP = 127, 7


def scale_bits_of(largest: UInt32Array, top: int) -> UInt32Array:
    """bf16 bits of the scales for blocks with these largest magnitudes (fp32 bits)."""
    scales = largest.view(np.float32) / np.float32(top)
    scales[largest < MIN_BITS] = 0.0
    return nearest_bf16_bits(scales.view(np.uint32))


def scales_from_bits(bits: npt.NDArray[np.uint16] | UInt32Array) -> Float32Array:
    """fp32 scales of bf16 bits."""
    return np.left_shift(bits, 16, dtype=np.uint32).view(np.float32)


def scale_range(top: int) -> tuple[int, int]:
    """Smallest and largest bits of a scale that is not 0."""
    ends = np.array([MIN_MAGNITUDE, MAX_MAGNITUDE], dtype=np.float32).view(np.uint32)
    low, high = scale_bits_of(ends, top).tolist()
    return low, high


def rounded_codes(values: Float32Array, scales: Float32Array) -> Float32Array:
    """Codes, still as floats: [blocks, n] values by [blocks, 1] scales."""
    inverses = np.zeros_like(scales)
    np.divide(np.float32(1.0), scales, out=inverses, where=scales > 0)
    codes: Float32Array = np.multiply(values, inverses)
    return np.rint(codes, out=codes)


class IntegerCodec(Codec):
    """What int8 and int4 share: a bf16 scale before the codes of each block."""

    top: int

    def _encode_blocks(self, values: Float32Array, records: ByteArray) -> None:
        values, magnitudes = magnitudes_of(values)
        bits = scale_bits_of(magnitudes.max(axis=1, keepdims=True), self.top)
        records[:, :SCALE_BYTES].view("<u2")[...] = bits
        self._pack(rounded_codes(values, scales_from_bits(bits)), records[:, SCALE_BYTES:])

    def _decode_blocks(self, records: ByteArray, out: Float32Array) -> None:
        bits = records[:, :SCALE_BYTES].view("<u2")
        check_scales(self.name, bits, self.top)
        codes = self._unpack(records[:, SCALE_BYTES:], out.shape[1])
        np.multiply(codes, scales_from_bits(bits), out=out, dtype=np.float32)

    @abstractmethod
    def _pack(self, codes: Float32Array, out: ByteArray) -> None:
        """Write codes [blocks, n] -T..T; they may be overwritten."""

    @abstractmethod
    def _unpack(self, packed: ByteArray, num_values: int) -> npt.NDArray[np.int8]:
        """Codes [blocks, num_values], checked."""


def check_scales(codec_name: str, bits: npt.NDArray[np.uint16], top: int) -> None:
    """Raise CorruptDataError for scales that are negative, not finite or out of range."""
    low, high = _RANGE_BY_TOP[top]
    if not ((bits == 0) | ((bits >= low) & (bits <= high))).all():
        bad = int(bits[(bits != 0) & ((bits < low) | (bits > high))][0])
        raise_corrupt(codec_name, f"scale bits {bad:#06x}", f"0 or {low:#06x} to {high:#06x}")


_RANGE_BY_TOP = {top: scale_range(top) for top in (INT8_TOP, INT4_TOP)}


class Int8Codec(IntegerCodec):
    """See the module."""

    name = "int8"
    block_values = 256
    top = INT8_TOP

    def block_bytes(self, num_values: int) -> int:
        return SCALE_BYTES + num_values

    def _pack(self, codes: Float32Array, out: ByteArray) -> None:
        np.copyto(out.view(np.int8), codes, casting="unsafe")

    def _unpack(self, packed: ByteArray, num_values: int) -> npt.NDArray[np.int8]:
        return unpacked_bytes(self.name, packed)


class Int4Codec(IntegerCodec):
    """See the module."""

    name = "int4"
    block_values = 64
    top = INT4_TOP

    def block_bytes(self, num_values: int) -> int:
        return SCALE_BYTES + (num_values + 1) // 2

    def _pack(self, codes: Float32Array, out: ByteArray) -> None:
        pack_nibbles(codes, out)

    def _unpack(self, packed: ByteArray, num_values: int) -> npt.NDArray[np.int8]:
        return unpacked_nibbles(self.name, packed, num_values)


def unpacked_bytes(codec_name: str, packed: ByteArray) -> npt.NDArray[np.int8]:
    """Codes of int8 bytes, checked."""
    codes = packed.view(np.int8)
    if codes.size and codes.min() < -INT8_TOP:
        raise_corrupt(codec_name, "code -128", "codes from -127 to 127")
    return codes


def pack_nibbles(codes: Float32Array, out: ByteArray) -> None:
    """Write codes -7..7 [blocks, n] as nibbles [blocks, (n + 1) // 2]; `codes` is overwritten."""
    num_rows, num_values = codes.shape
    nibbles = np.full((num_rows, num_values + num_values % 2), _ZERO_NIBBLE, dtype=np.uint8)
    np.add(codes, np.float32(_ZERO_NIBBLE), out=codes)
    np.copyto(nibbles[:, :num_values], codes, casting="unsafe")
    pairs = nibbles.view("<u2")
    np.copyto(out, pairs | (pairs >> np.uint16(4)), casting="unsafe")


def unpacked_nibbles(codec_name: str, packed: ByteArray, num_values: int) -> npt.NDArray[np.int8]:
    """Codes [blocks, n] of nibbles, checked."""
    pairs = np.left_shift(packed, 4, dtype=np.uint16)
    np.bitwise_or(pairs, packed, out=pairs)
    np.bitwise_and(pairs, 0x0F0F, out=pairs)
    nibbles = pairs.astype("<u2", copy=False).view(np.uint8)
    if nibbles.size and nibbles.min() == 0:
        raise_corrupt(codec_name, "nibble 0", "nibbles from 1 to 15")
    if num_values % 2 and (nibbles[:, -1] != _ZERO_NIBBLE).any():
        raise_corrupt(codec_name, "a filling nibble that is not 8", "8 after an odd block")
    return np.subtract(nibbles.view(np.int8), np.int8(_ZERO_NIBBLE))[:, :num_values]
