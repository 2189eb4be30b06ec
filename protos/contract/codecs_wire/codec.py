"""What a codec is: a frozen bit layout of a contiguous fp32 vector, cut into blocks.

Every block is encoded by itself, so encode(a) + encode(b) == encode(a + b) when a has a multiple of
`block_values` values: slices may be encoded, sent and decoded one by one. Sizes follow from the
number of values alone. Encoding uses integer operations and separately rounded element-wise fp32
operations, never a library's reduction of floats: the same values give the same bytes on every CPU.
Decoding what was encoded and encoding it again gives the same values (error feedback needs that).
"""

from abc import ABC, abstractmethod

import numpy as np
import numpy.typing as npt

from protos.contract.digest import Float32Vector
from protos.contract.errors import CorruptDataError, UsageError

Buffer = bytes | bytearray | memoryview
ByteArray = npt.NDArray[np.uint8]
Float32Array = npt.NDArray[np.float32]
UInt32Array = npt.NDArray[np.uint32]

MAX_MAGNITUDE = float(2.0**126)
"""Lossy codecs take finite values beyond it (8.5e37) as this value: nothing decoded overflows."""
MIN_MAGNITUDE = float(2.0**-80)
"""A block whose largest magnitude is below it (8.3e-25) is zeros to codecs with a scale."""

_INFINITY_BITS = 0x7F80_0000
_SIGN_MASK = 0x7FFF_FFFF
_MAX_BITS = int(np.float32(MAX_MAGNITUDE).view(np.uint32))
MIN_BITS = int(np.float32(MIN_MAGNITUDE).view(np.uint32))
_STRIP_VALUES = 32_768
"""Values worked on at a time: 128 KiB and its scratch stay in a core's cache."""


class Codec(ABC):
    """A layout by name. All blocks are full but the last of a vector."""

    name: str
    block_values: int
    """Slices that are encoded apart begin at a multiple of this."""

    @abstractmethod
    def block_bytes(self, num_values: int) -> int:
        """Encoded size of a block of 1 to `block_values` values."""

    @abstractmethod
    def _encode_blocks(self, values: Float32Array, records: ByteArray) -> None:
        """Encode rows of `values` [blocks, n] to rows of `records` [blocks, block_bytes(n)]."""

    @abstractmethod
    def _decode_blocks(self, records: ByteArray, out: Float32Array) -> None:
        """The way back. Raises CorruptDataError for what no encoder writes."""

    def for_result(self, num_parts: int) -> "Codec":
        """The codec of a weighted sum of so many encoded vectors; dense codecs use themselves."""
        return self

    def encoded_bytes(self, num_values: int) -> int:
        """Encoded size of a vector; 0 for an empty one."""
        full, left = divmod(num_values, self.block_values)
        return full * self.block_bytes(self.block_values) + (self.block_bytes(left) if left else 0)

    def encode(self, values: Float32Vector) -> memoryview:
        """Bytes of a contiguous fp32 vector; they may share its memory.

        Raises CorruptDataError for NaN or infinity, UsageError for another type or shape.
        """
        check_vector(values)
        encoded = np.empty(self.encoded_bytes(values.size), dtype=np.uint8)
        for rows, records in self._strips(values, encoded):
            self._encode_blocks(rows, records)
        return encoded.data

    def decode(self, data: Buffer, out: Float32Vector) -> None:
        """Write the `out.size` values that the bytes stand for.

        Raises CorruptDataError for a wrong size and for anything that `encode` does not write; what
        `out` holds is then undefined.
        """
        check_vector(out)
        if len(data) != self.encoded_bytes(out.size):
            raise CorruptDataError(
                f"{len(data)} bytes of codec {self.name}",
                allowed=f"{self.encoded_bytes(out.size)} bytes for {out.size} values",
                remedy="discard them",
            )
        for rows, records in self._strips(out, np.frombuffer(data, dtype=np.uint8)):
            self._decode_blocks(records, rows)

    def _strips(
        self, values: Float32Vector, encoded: ByteArray
    ) -> list[tuple[Float32Array, ByteArray]]:
        """Views of runs of blocks [blocks, n] and of their records, as many as fit the cache."""
        width, record_bytes = self.block_values, self.block_bytes(self.block_values)
        num_full = values.size // width
        at_a_time = max(1, _STRIP_VALUES // width)
        strips = []
        for begin in range(0, num_full, at_a_time):
            end = min(begin + at_a_time, num_full)
            rows = values[begin * width : end * width].reshape(-1, width)
            records = encoded[begin * record_bytes : end * record_bytes]
            strips.append((rows, records.reshape(-1, record_bytes)))
        if num_full * width < values.size:
            tail = values[num_full * width :].reshape(1, -1)
            strips.append((tail, encoded[num_full * record_bytes :].reshape(1, -1)))
        return strips


def check_vector(values: Float32Vector) -> None:
    """Raise UsageError unless it is a contiguous one-dimensional fp32 array."""
    is_fp32 = values.dtype == np.float32 and values.ndim == 1 and values.flags.c_contiguous
    if not is_fp32:
        raise UsageError(
            f"a vector of {values.dtype} with shape {values.shape}",
            allowed="a contiguous one-dimensional fp32 vector",
            remedy="pass np.ascontiguousarray(values, dtype=np.float32).ravel()",
        )


def magnitudes_of(values: Float32Array) -> tuple[Float32Array, UInt32Array]:
    """(values, bits of their magnitudes), limited to MAX_MAGNITUDE; bits order as magnitudes do.

    Raises CorruptDataError for NaN or infinity.
    """
    bits: UInt32Array = np.bitwise_and(values.view(np.uint32), np.uint32(_SIGN_MASK))
    largest = int(bits.max())
    if largest >= _INFINITY_BITS:
        raise_not_finite(int(np.count_nonzero(bits >= _INFINITY_BITS)), values.size)
    if largest > _MAX_BITS:
        values = np.clip(values, np.float32(-MAX_MAGNITUDE), np.float32(MAX_MAGNITUDE))
        np.minimum(bits, np.uint32(_MAX_BITS), out=bits)
    return values, bits


def raise_not_finite(num_bad: int, num_values: int) -> None:
    """Refuse NaN and infinity."""
    raise CorruptDataError(
        f"{num_bad} of {num_values} values are not finite",
        allowed="finite values",
        remedy="discard the vector; if it was made here, lower the learning rate",
    )


def raise_corrupt(codec_name: str, found: str, allowed: str) -> None:
    """Refuse bytes that no encoder writes."""
    raise CorruptDataError(f"codec {codec_name}: {found}", allowed=allowed, remedy="discard them")
