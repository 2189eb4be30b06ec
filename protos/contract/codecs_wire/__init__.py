"""Bit layouts of vectors on the wire, by codec name.

A codec turns a contiguous fp32 vector into bytes and back (codec.py says what all of them keep to);
who encodes once and lets everybody decode the same bytes keeps all members bit-equal. Layouts are
frozen by golden bytes in tests/contract: a changed layout is a new name.

| name   | bytes a value | 1 / compression | lost |
|--------|---------------|-----------------|------|
| fp32   | 4             | 1               | nothing |
| bf16   | 2             | 2               | 2^-8 of a value |
| fp16   | 2.008         | 1.99            | 2^-11 of a value |
| int8   | 1.008         | 3.97            | 1/253 of the block's largest of 256 |
| int4   | 0.531         | 7.53            | 1/13.9 of the block's largest of 64 |
| sparse | 0.032         | 126             | all but the largest 64 of 4,096 |
"""

from protos.contract.codecs_wire.codec import MAX_MAGNITUDE, MIN_MAGNITUDE, Buffer, Codec
from protos.contract.codecs_wire.floats import Bf16Codec, Fp16Codec, Fp32Codec
from protos.contract.codecs_wire.integers import Int4Codec, Int8Codec
from protos.contract.codecs_wire.sparse import MAX_RESULT_PARTS, SparseCodec
from protos.contract.errors import CorruptDataError, UsageError

__all__ = [
    "CODEC_NAMES",
    "MAX_MAGNITUDE",
    "MIN_MAGNITUDE",
    "Buffer",
    "Codec",
    "check_codec",
    "codec_named",
    "result_codec_of_bytes",
]

_CODECS: tuple[Codec, ...] = (
    Fp32Codec(),
    Bf16Codec(),
    Fp16Codec(),
    Int8Codec(),
    Int4Codec(),
    SparseCodec(),
)
_CODEC_BY_NAME = {codec.name: codec for codec in _CODECS}
CODEC_NAMES: tuple[str, ...] = tuple(_CODEC_BY_NAME)
"""Every codec that this version can encode and decode."""


def check_codec(name: str) -> None:
    """Raise UsageError for a codec that this version does not know."""
    codec_named(name)


def codec_named(name: str) -> Codec:
    """The codec of a RunSpec's `strategy.codec`. Raises UsageError for an unknown one."""
    codec = _CODEC_BY_NAME.get(name)
    if codec is None:
        raise UsageError(
            f"codec {name!r}",
            allowed="known codecs: " + ", ".join(CODEC_NAMES),
            remedy="choose one of them, or upgrade muster where it is refused",
        )
    return codec


def result_codec_of_bytes(name: str, *, num_values: int, num_bytes: int) -> Codec:
    """The codec of a result (`Codec.for_result`) by its size, which tells the number of parts.

    Raises CorruptDataError if no result of these values is so large.
    """
    codec = codec_named(name)
    for num_parts in range(1, MAX_RESULT_PARTS + 1):
        result = codec.for_result(num_parts)
        if result.encoded_bytes(num_values) == num_bytes:
            return result
    largest = codec.for_result(MAX_RESULT_PARTS).encoded_bytes(num_values)
    raise CorruptDataError(
        f"{num_bytes} bytes of averaged {num_values} values of codec {name}",
        allowed=f"the size of a result, at most {largest} bytes",
        remedy="discard them",
    )
