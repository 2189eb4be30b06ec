"""Vectors encoded piece by piece, and error feedback around every codec."""

import hashlib

import numpy as np
import pytest

from peer.swarm.codecs import (
    EncodedVector,
    encode_with_residual,
    piece_bounds,
)
from protos.contract.codecs_wire import CODEC_NAMES, Codec, codec_named
from protos.contract.digest import PIECE_VALUES, Float32Vector
from protos.contract.errors import CorruptDataError

NUM_VALUES = 2 * PIECE_VALUES + 777
each_codec = pytest.mark.parametrize(
    "codec", [codec_named(name) for name in CODEC_NAMES], ids=lambda codec: codec.name
)


def _vector(seed: int) -> Float32Vector:
    return np.random.default_rng(seed).standard_normal(NUM_VALUES).astype(np.float32)


@each_codec
def test_pieces_are_encoded_and_decoded_alone(codec: Codec) -> None:
    vector = _vector(1)
    whole = EncodedVector.encode(codec, vector)
    pieces = [codec.encode(vector[slice(*piece_bounds(p, p + 1, NUM_VALUES))]) for p in range(3)]
    assert [bytes(whole.run(p, p + 1)) for p in range(3)] == [bytes(piece) for piece in pieces]
    assert whole.digests() == tuple(hashlib.sha256(piece).digest() for piece in pieces)
    assert whole.run(1, 3) == whole.data[len(pieces[0]) :]
    values = np.empty(NUM_VALUES - PIECE_VALUES, dtype=np.float32)
    whole.decode_run(1, 3, values)
    assert np.array_equal(values, whole.decoded()[PIECE_VALUES:])


@each_codec
def test_residual_is_what_the_bytes_leave_out_and_nothing_given_is_changed(codec: Codec) -> None:
    vector, residual = _vector(1), 0.1 * _vector(2)
    before = vector.copy(), residual.copy()
    data, left = encode_with_residual(codec, vector, residual)
    decoded = np.empty_like(vector)
    codec.decode(data, decoded)
    assert np.array_equal(left, (vector + residual) - decoded)
    assert np.array_equal(vector, before[0]) and np.array_equal(residual, before[1])
    assert data == bytes(codec.encode(vector + residual))
    assert np.array_equal(EncodedVector.encode(codec, decoded).decoded(), decoded), (
        "no more is lost"
    )


@each_codec
def test_with_residuals_the_sum_over_rounds_is_the_sum_of_what_was_meant(codec: Codec) -> None:
    vector, residual = _vector(3), np.zeros(NUM_VALUES, dtype=np.float32)
    num_rounds = 200
    sent = np.zeros(NUM_VALUES, dtype=np.float64)
    for _ in range(num_rounds):
        data, residual = encode_with_residual(codec, vector, residual)
        decoded = np.empty_like(vector)
        codec.decode(data, decoded)
        sent += decoded
    meant = num_rounds * vector.astype(np.float64)
    assert np.abs(sent + residual - meant).max() < 1e-3 * np.abs(meant).max()
    share_missing = np.linalg.norm(sent - meant) / np.linalg.norm(meant)
    assert share_missing < (0.5 if codec.name == "sparse" else 1e-3)


def test_a_sum_that_is_not_finite_is_refused() -> None:
    largest = np.full(10, 3e38, dtype=np.float32)
    with np.errstate(over="ignore"), pytest.raises(CorruptDataError, match="10 of 10 values"):
        encode_with_residual(codec_named("int8"), largest, largest)
