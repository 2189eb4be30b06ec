"""Bit layouts of vectors on the wire, by codec name.

A codec turns a contiguous fp32 vector into bytes and back; who encodes once and lets everybody
decode the same bytes keeps all members bit-equal. "fp32" is IEEE 754 single precision,
little-endian, nothing else. Layouts are frozen by golden bytes in tests/contract: a changed layout
is a new name.
"""

import numpy as np

from protos.contract.digest import Float32Vector
from protos.contract.errors import CorruptDataError, UsageError

CODEC_NAMES: tuple[str, ...] = ("fp32",)
"""Every codec that this version can encode and decode."""

_FP32_BYTES = 4


def check_codec(name: str) -> None:
    """Raise UsageError for a codec that this version does not know."""
    if name not in CODEC_NAMES:
        raise UsageError(
            f"codec {name!r}",
            allowed="known codecs: " + ", ".join(CODEC_NAMES),
            remedy="choose one of them, or upgrade muster where it is refused",
        )


def encode(name: str, values: Float32Vector) -> bytes:
    """Bytes of a vector."""
    check_codec(name)
    return np.ascontiguousarray(values, dtype="<f4").tobytes()


def encoded_bytes(name: str, num_values: int) -> int:
    """Size of an encoded vector."""
    check_codec(name)
    return _FP32_BYTES * num_values


def decode(name: str, data: bytes | bytearray | memoryview, num_values: int) -> Float32Vector:
    """Vector of the bytes; it may share their memory. Raises CorruptDataError for a wrong size or
    values not finite.
    """
    check_codec(name)
    if len(data) != encoded_bytes(name, num_values):
        raise CorruptDataError(
            f"{len(data)} bytes of codec {name}",
            allowed=f"{encoded_bytes(name, num_values)} bytes for {num_values} values",
            remedy="discard them",
        )
    values: Float32Vector = np.frombuffer(data, dtype="<f4")
    if not np.isfinite(values).all():
        raise CorruptDataError(
            "values that are not finite", allowed="finite values", remedy="discard them"
        )
    return values
