"""Floating-point layouts: fp32, bf16 and block-scaled fp16. All numbers are little-endian.

fp32  the values themselves; nothing is lost.
bf16  the upper half of each value's bits, rounded to nearest even: 2 bytes a value.
      |error| <= 2^-8 |x| (denormals: 2^-134).
fp16  blocks of 256: u16 exponent E (0 = all zeros), then IEEE half of x * 2^(141 - E) per value:
      514 bytes. E is the biased fp32 exponent of the block's largest magnitude once rounded to 11
      bits, so halves reach from 2^14 to 2^15 in every block and neither overflow nor, for the
      gradients' usual 1e-9, underflow. |error| <= 2^-11 |x| + 2^-39 max|block|.
"""

import numpy as np

from protos.contract.codecs_wire.codec import (
    MAX_MAGNITUDE,
    MIN_BITS,
    ByteArray,
    Codec,
    Float32Array,
    UInt32Array,
    check_vector,
    magnitudes_of,
    raise_corrupt,
    raise_not_finite,
)
from protos.contract.digest import Float32Vector

_HALF_MASK = 0x7FFF


def nearest_bf16_bits(bits: UInt32Array) -> UInt32Array:
    """Upper 16 bits of finite fp32 bits, rounded to nearest even."""
    rounded: UInt32Array = np.right_shift(bits, 16)
    np.bitwise_and(rounded, 1, out=rounded)
    np.add(rounded, bits, out=rounded)
    np.add(rounded, 0x7FFF, out=rounded)
    return np.right_shift(rounded, 16, out=rounded)


_MAX_BF16_BITS = int(
    nearest_bf16_bits(np.array([MAX_MAGNITUDE], dtype=np.float32).view(np.uint32))[0]
)


class Fp32Codec(Codec):
    """See the module."""

    name = "fp32"
    block_values = 1

    def block_bytes(self, num_values: int) -> int:
        return 4 * num_values

    def encode(self, values: Float32Vector) -> memoryview:
        """The vector's own memory on little-endian machines, checked."""
        check_vector(values)
        for rows, _ in self._strips(values, values.view(np.uint8)):
            _check_finite(rows)
        return values.astype("<f4", copy=False).view(np.uint8).data

    def _encode_blocks(self, values: Float32Array, records: ByteArray) -> None:
        records.view("<f4")[...] = values

    def _decode_blocks(self, records: ByteArray, out: Float32Array) -> None:
        out[...] = records.view("<f4")
        _check_finite(out)


def _check_finite(values: Float32Array) -> None:
    is_finite = np.isfinite(values)
    if not is_finite.all():
        raise_not_finite(int(np.count_nonzero(~is_finite)), values.size)


class Bf16Codec(Codec):
    """See the module."""

    name = "bf16"
    block_values = 1

    def block_bytes(self, num_values: int) -> int:
        return 2 * num_values

    def _encode_blocks(self, values: Float32Array, records: ByteArray) -> None:
        values, _ = magnitudes_of(values)
        records.view("<u2")[...] = nearest_bf16_bits(values.view(np.uint32))

    def _decode_blocks(self, records: ByteArray, out: Float32Array) -> None:
        halves = records.view("<u2")
        largest = int(np.bitwise_and(halves, _HALF_MASK).max())
        if largest > _MAX_BF16_BITS:
            raise_corrupt(self.name, f"magnitude bits {largest:#06x}", f"<= {_MAX_BF16_BITS:#06x}")
        np.left_shift(halves, 16, out=out.view(np.uint32), dtype=np.uint32)


_EXPONENT_BYTES = 2
_MIN_EXPONENT = MIN_BITS >> 23
_MAX_EXPONENT = 253
_MAX_HALF_BITS = 0x7800
"""2^15 as a half."""


class Fp16Codec(Codec):
    """See the module."""

    name = "fp16"
    block_values = 256

    def block_bytes(self, num_values: int) -> int:
        return _EXPONENT_BYTES + 2 * num_values

    def _encode_blocks(self, values: Float32Array, records: ByteArray) -> None:
        values, magnitudes = magnitudes_of(values)
        largest = magnitudes.max(axis=1, keepdims=True)
        exponents = np.where(largest < MIN_BITS, 0, (largest + np.uint32(0x1000)) >> np.uint32(23))
        factors = np.where(exponents == 0, 0, (268 - exponents) << 23).astype(np.uint32)
        records[:, :_EXPONENT_BYTES].view("<u2")[...] = exponents
        records[:, _EXPONENT_BYTES:].view("<f2")[...] = values * factors.view(np.float32)

    def _decode_blocks(self, records: ByteArray, out: Float32Array) -> None:
        exponents = records[:, :_EXPONENT_BYTES].view("<u2").astype(np.uint32)
        in_range = (exponents >= _MIN_EXPONENT) & (exponents <= _MAX_EXPONENT)
        if not (in_range | (exponents == 0)).all():
            allowed = f"0 or {_MIN_EXPONENT} to {_MAX_EXPONENT}"
            raise_corrupt(self.name, f"block exponent {int(exponents.max())}", allowed)
        halves = records[:, _EXPONENT_BYTES:]
        largest = int(np.bitwise_and(halves.view("<u2"), _HALF_MASK).max())
        if largest > _MAX_HALF_BITS:
            raise_corrupt(self.name, f"half bits {largest:#06x}", f"<= {_MAX_HALF_BITS:#06x}")
        factors = np.where(exponents == 0, 0, (exponents - np.uint32(14)) << np.uint32(23))
        out[...] = halves.view("<f2")
        np.multiply(out, factors.astype(np.uint32).view(np.float32), out=out)
