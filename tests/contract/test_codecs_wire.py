"""Codecs: golden bytes, sizes, error bounds, properties over all finite vectors, refusals."""

import hashlib

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from protos.contract.codecs_wire import (
    CODEC_NAMES,
    MAX_MAGNITUDE,
    MIN_MAGNITUDE,
    Codec,
    check_codec,
    codec_named,
    result_codec_of_bytes,
)
from protos.contract.codecs_wire.sparse import SparseCodec
from protos.contract.digest import PIECE_VALUES, Float32Vector
from protos.contract.errors import CorruptDataError, UsageError

Float64Vector = npt.NDArray[np.float64]
CODECS = tuple(codec_named(name) for name in CODEC_NAMES)
LOSSY = CODECS[1:]
SPARSE = codec_named("sparse")
WITH_RESULTS = (*CODECS, SPARSE.for_result(1), SPARSE.for_result(3))
each_codec = pytest.mark.parametrize("codec", WITH_RESULTS, ids=lambda codec: codec.name)

GOLDEN_VALUES = np.array([0.0, -1.0, 1.5, -0.3, 0.004, 2.71, 1e-9], dtype=np.float32)
GOLDEN = {
    "fp32": ("00000000000080bf0000c03f9a9999be6f12833ba4702d405f708930", "26f76ed2f2eefbde"),
    "bf16": ("000080bfc03f9abe833b2d408930", "d02965cec26c9a0b"),
    "fp16": ("8000000000f00072cde819506c758900", "d6f3b2b38c331f03"),
    "int8": ("af3c00d146f2007f00", "f19e33c984549dff"),
    "int4": ("c63e587cf888", "b76617c76c58d446"),
    "sparse": ("c63e025000fc", "94dff73866d0d51f"),
    "sparse sum of 1": ("af3c025000467f", "0b4c2aa586633c33"),
    "sparse sum of 3": ("af3c012000034000056000d146f2007f00", "b064c31b818da0df"),
}
"""Bytes of GOLDEN_VALUES, and SHA-256 of the bytes of `golden_ramp`."""


def golden_ramp() -> Float32Vector:
    """9,001 exact values of both signs, three chunks."""
    steps = np.arange(9001, dtype=np.int64) * 40_503 % 65_536 - 32_768
    return (steps / 1024).astype(np.float32)


def decoded(codec: Codec, data: bytes | memoryview, num_values: int) -> Float32Vector:
    out = np.full(num_values, np.nan, dtype=np.float32)
    codec.decode(data, out)
    return out


def roundtrip(codec: Codec, values: Float32Vector) -> Float32Vector:
    return decoded(codec, codec.encode(values), values.size)


def allowed_errors(codec: Codec, values: Float32Vector) -> Float64Vector:
    """The bound that the codec's documentation states, for every value, in fp64."""
    if codec.name == "fp32":
        return np.zeros(values.size)
    magnitudes = np.abs(values.astype(np.float64))
    beyond = np.maximum(magnitudes - MAX_MAGNITUDE, 0.0)
    magnitudes -= beyond
    if codec.name == "bf16":
        return np.maximum(2.0**-8 * magnitudes, 2.0**-134) + beyond
    bounds = [
        allowed_in_block(codec, magnitudes[begin : begin + codec.block_values])
        for begin in range(0, values.size, codec.block_values)
    ]
    return np.concatenate([np.zeros(0), *bounds]) + beyond


def allowed_in_block(codec: Codec, block: Float64Vector) -> Float64Vector:
    """The same for one block with a scale."""
    largest = block.max()
    if largest < MIN_MAGNITUDE:
        return block
    if codec.name == "fp16":
        return 2.0**-11 * block + 2.0**-39 * largest
    rounding = np.full(block.size, largest / (13.9 if codec.name in ("int4", "sparse") else 253))
    if isinstance(codec, SparseCodec):
        smallest_kept = np.sort(block)[-codec.num_kept(block.size)]
        return np.where(block <= smallest_kept, np.maximum(block, rounding), rounding)
    return rounding


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
sizes = st.one_of(st.integers(0, 70), st.sampled_from((255, 256, 257, 4095, 4096, 4097, 9000)))


@st.composite
def vectors(draw: st.DrawFn) -> Float32Vector:
    """Any finite bits in short vectors; long ones of a spread-out distribution with a few such."""
    size = draw(sizes)
    if size <= 70:
        return draw(hnp.arrays(np.float32, size, elements=finite))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    low, high = sorted(draw(st.tuples(st.floats(-45, 38), st.floats(-45, 38))))
    exponents = low + (high - low) * rng.random(size)
    with np.errstate(under="ignore"):
        values = (rng.standard_normal(size) * 10.0**exponents).clip(-3e38, 3e38)
    values = values.astype(np.float32)
    values[rng.random(size) < draw(st.sampled_from((0.0, 0.5, 0.999)))] = 0.0
    for value in draw(st.lists(finite, max_size=4)):
        values[rng.integers(size)] = value
    return values


@each_codec
@settings(max_examples=60, deadline=None)
@given(values=vectors())
def test_any_finite_vector_keeps_the_stated_bound(codec: Codec, values: Float32Vector) -> None:
    before = values.copy()
    data = codec.encode(values)
    assert len(data) == codec.encoded_bytes(values.size)
    assert np.array_equal(values, before)
    found = decoded(codec, data, values.size)
    errors = np.abs(found.astype(np.float64) - values.astype(np.float64))
    assert (errors <= allowed_errors(codec, values)).all()
    again = codec.encode(found)
    assert np.array_equal(decoded(codec, again, values.size), found)
    if not isinstance(codec, SparseCodec):
        assert bytes(again) == bytes(data) or codec.name == "fp16"


@each_codec
@settings(max_examples=25, deadline=None)
@given(values=vectors(), num_blocks=st.integers(0, 3))
def test_slices_at_block_bounds_are_encoded_apart(
    codec: Codec, values: Float32Vector, num_blocks: int
) -> None:
    cut = min(
        num_blocks * codec.block_values, values.size // codec.block_values * codec.block_values
    )
    parts = bytes(codec.encode(values[:cut])) + bytes(codec.encode(values[cut:]))
    assert parts == bytes(codec.encode(values))


@each_codec
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_bytes_are_refused_or_give_finite_values(codec: Codec, data: st.DataObject) -> None:
    size = data.draw(st.sampled_from((0, 1, 2, 63, 64, 65, 256, 300)))
    body = bytearray(codec.encode(data.draw(hnp.arrays(np.float32, size, elements=finite))))
    for position, byte in data.draw(
        st.lists(st.tuples(st.integers(0, max(0, len(body) - 1)), st.integers(0, 255)), max_size=4)
    ):
        if body:
            body[position] = byte
    try:
        found = decoded(codec, bytes(body), size)
    except CorruptDataError as error:
        assert error.allowed and error.remedy
        return
    assert np.isfinite(found).all()


def test_pieces_are_whole_blocks() -> None:
    assert all(PIECE_VALUES % codec.block_values == 0 for codec in WITH_RESULTS)


def test_sizes_are_the_stated_ones() -> None:
    per_value = [codec.encoded_bytes(2**20) / 2**20 for codec in CODECS]
    stated = [4, 2, 2 + 2 / 256, 1 + 2 / 256, 0.5 + 2 / 64, 130 / 4096]
    assert per_value == stated
    assert 4 * 2**20 / SPARSE.encoded_bytes(2**20) > 126
    assert all(
        codec.encoded_bytes(0) == 0 and not codec.encode(_fp32([])) for codec in WITH_RESULTS
    )


def _fp32(values: object) -> Float32Vector:
    return np.array(values, dtype=np.float32)


@pytest.mark.parametrize("codec", LOSSY, ids=lambda codec: codec.name)
def test_one_outlier_damages_its_own_block_only(codec: Codec) -> None:
    values = np.random.default_rng(1).standard_normal(3 * 4096).astype(np.float32)
    clean = roundtrip(codec, values)
    values[5000] = 1e6
    found = roundtrip(codec, values)
    begin = 5000 // codec.block_values * codec.block_values
    assert abs(found[5000] - 1e6) <= 1e6 / 250
    is_other = np.ones(values.size, dtype=bool)
    is_other[begin : begin + codec.block_values] = False
    assert np.array_equal(found[is_other], clean[is_other])


@each_codec
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(codec: Codec, bad: float) -> None:
    for position in (0, 4097, 9999):
        values = np.ones(10_000, dtype=np.float32)
        values[position] = bad
        with pytest.raises(CorruptDataError, match="1 of .* values are not finite; finite values"):
            codec.encode(values)


@each_codec
def test_wrong_size_and_wrong_type_are_refused(codec: Codec) -> None:
    data = bytes(codec.encode(np.ones(300, dtype=np.float32)))
    for wrong in (data[:-1], data + b"\0", b""):
        with pytest.raises(CorruptDataError, match=f"{len(wrong)} bytes of codec {codec.name}; "):
            decoded(codec, wrong, 300)
    with pytest.raises(UsageError, match="float64.*contiguous one-dimensional fp32"):
        codec.encode(np.ones(3))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="contiguous"):
        codec.encode(np.ones(6, dtype=np.float32)[::2])


def _with_u16(data: memoryview, offset: int, value: int) -> bytes:
    changed = bytearray(data)
    changed[offset : offset + 2] = value.to_bytes(2, "little")
    return bytes(changed)


@pytest.mark.parametrize("name", ["int8", "int4", "sparse"])
@pytest.mark.parametrize("bits", [0x7FC0, 0x7F80, 0xFF80, 0x8000, 0xBF80, 0x0001, 0x7E81])
def test_scales_that_no_encoder_writes_are_refused(name: str, bits: int) -> None:
    codec = codec_named(name)
    data = codec.encode(np.ones(64, dtype=np.float32))
    with pytest.raises(CorruptDataError, match=f"codec {name}: scale bits {bits:#06x}; 0 or 0x"):
        decoded(codec, _with_u16(data, 0, bits), 64)


def test_other_bytes_that_no_encoder_writes_are_refused() -> None:
    ones = np.ones(65, dtype=np.float32)
    for name, size, offset, value, message in (
        ("fp32", 65, 2, 0x7F80, "not finite"),
        ("bf16", 65, 0, 0x7F80, "magnitude bits"),
        ("bf16", 65, 0, 0xFFC0, "magnitude bits"),
        ("fp16", 65, 0, 1, "block exponent 1; 0 or 47 to 253"),
        ("fp16", 65, 0, 254, "block exponent 254"),
        ("fp16", 65, 2, 0x7C00, "half bits 0x7c00"),
        ("fp16", 65, 2, 0xFE00, "half bits 0x7e00"),
        ("int8", 65, 2, 0x8000, "code -128; codes from -127 to 127"),
        ("int4", 65, 2, 0x0000, "nibble 0; nibbles from 1 to 15"),
        ("int4", 65, 36, 0x9999, "a filling nibble that is not 8"),
        ("sparse", 65, 2, 0x0001, "indices out of order"),
        ("sparse", 65, 3, 0x0440, "index 68 in a chunk of 65 values; 0 to 64"),
        ("sparse", 1, 3, 0x0810, "filling bits that are not 0"),
        ("sparse", 65, 4, 0x0800, "nibble 0"),
    ):
        codec = codec_named(name)
        data = codec.encode(ones[:size])
        with pytest.raises(CorruptDataError, match=message):
            decoded(codec, _with_u16(data, offset, value)[: len(data)], size)


def test_sparse_keeps_the_largest_and_of_equal_ones_the_first() -> None:
    values = np.zeros(8192, dtype=np.float32)
    values[4096:] = 1.0
    values[[7, 4000, 8191]] = (-3.0, 2.0, 5.0)
    found = roundtrip(SPARSE, values)
    assert np.flatnonzero(found).tolist() == [7, 4000, *range(4096, 4096 + 63), 8191]
    assert found[[7, 4000, 8191]].tolist() == [-2.994140625, 2.138671875, 5.00390625]


def test_a_sum_of_sparse_contributions_drops_nothing_that_was_sent() -> None:
    rng = np.random.default_rng(3)
    parts = [roundtrip(SPARSE, rng.standard_normal(10_000).astype(np.float32)) for _ in range(5)]
    total = np.sum(parts, axis=0, dtype=np.float32) / np.float32(5)
    found = roundtrip(SPARSE.for_result(5), total)
    assert (np.abs(found - total) <= np.abs(total).max() / 253).all()
    many = SPARSE.for_result(1000)
    assert many.encoded_bytes(4096) == SPARSE.for_result(16).encoded_bytes(4096) < 4096


@pytest.mark.parametrize("name", CODEC_NAMES)
@pytest.mark.parametrize("num_values", [1, 100, 70_000, 300_000])
def test_size_tells_the_codec_of_a_result(name: str, num_values: int) -> None:
    for num_parts in (1, 2, 7, 16, 40):
        codec = codec_named(name).for_result(num_parts)
        size = codec.encoded_bytes(num_values)
        found = result_codec_of_bytes(name, num_values=num_values, num_bytes=size)
        values = np.random.default_rng(num_parts).standard_normal(num_values).astype(np.float32)
        data = codec.encode(values)
        assert np.array_equal(decoded(found, data, num_values), decoded(codec, data, num_values))
    with pytest.raises(CorruptDataError, match=f"{size + 1} bytes of averaged {num_values} values"):
        result_codec_of_bytes(name, num_values=num_values, num_bytes=size + 1)


@each_codec
def test_layouts_are_golden(codec: Codec) -> None:
    ramp_digest = hashlib.sha256(codec.encode(golden_ramp())).hexdigest()[:16]
    assert (codec.encode(GOLDEN_VALUES).hex(), ramp_digest) == GOLDEN[codec.name]


def test_unknown_codec_is_refused_with_what_is_known() -> None:
    with pytest.raises(UsageError, match="'int3'; known codecs: fp32, bf16, fp16, int8, int4, spa"):
        check_codec("int3")
