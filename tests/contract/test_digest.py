"""Canonical digests: golden values, and pieces against the whole."""

import hashlib

import numpy as np
import pytest

from protos.contract.digest import (
    PIECE_VALUES,
    StateMeta,
    canonical_json,
    digest_of_pieces,
    num_pieces,
    piece_digest,
    state_digest,
    state_digest_of_pieces,
    vector_piece_digests,
)

META = StateMeta(
    run_digest="cd" * 32,
    incarnation=2,
    outer_step=5,
    schedule_tokens=123_456,
    directive_number=3,
    lease_cursor_by_peer={"b": (4, 2), "a": (1, 7)},
)
VECTOR = np.arange(PIECE_VALUES + 3, dtype=np.float32) / 7
GOLDEN_VECTOR_DIGEST = "3ed2e171fe0f26bb897d6bea1660a77d1b3e47a411afa7c3e73230c6244dbb3f"
GOLDEN_STATE_DIGEST = "d7a8619ff5ab0e9f7f8f9f6b49c8a9673e842667f87148bad5d581edeff9dfbb"


def test_digests_are_golden() -> None:
    assert digest_of_pieces(vector_piece_digests(VECTOR)).hex() == GOLDEN_VECTOR_DIGEST
    assert state_digest(META, [VECTOR, VECTOR * 2, VECTOR * 3]).hex() == GOLDEN_STATE_DIGEST


def test_a_piece_is_hashed_over_its_little_endian_bytes() -> None:
    piece = np.array([1.0, -2.5], dtype=np.float32)
    assert piece_digest(piece) == hashlib.sha256(piece.astype("<f4").tobytes()).digest()
    assert piece_digest(piece) == piece_digest(piece.tobytes())


@pytest.mark.parametrize(
    ("num_values", "expected"), [(0, 0), (1, 1), (PIECE_VALUES, 1), (PIECE_VALUES + 1, 2)]
)
def test_number_of_pieces(num_values: int, expected: int) -> None:
    assert num_pieces(num_values) == expected
    assert len(vector_piece_digests(np.zeros(num_values, np.float32))) == expected


def test_every_part_of_a_state_counts() -> None:
    vectors = [VECTOR, VECTOR * 2]
    whole = state_digest(META, vectors)
    assert whole == state_digest_of_pieces(META, [vector_piece_digests(v) for v in vectors])
    assert whole != state_digest(META, vectors[::-1])
    changed = VECTOR.copy()
    changed[-1] = np.nextafter(changed[-1], np.float32(np.inf))
    assert whole != state_digest(META, [VECTOR, changed])
    moved = StateMeta.from_json(META.to_json().replace(b'"outer_step":5', b'"outer_step":6'))
    assert whole != state_digest(moved, vectors)


def test_meta_survives_its_json() -> None:
    assert StateMeta.from_json(META.to_json()) == META


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[]",
        b'{"lease_cursor_by_peer":{"a":[1]}}',
        b'{"lease_cursor_by_peer":{"a":{"b":1}}}',
        b'{"lease_cursor_by_peer":{"a":[1e999,1]}}',
        META.to_json().replace(b'"outer_step":5', b'"outer_step":NaN'),
        META.to_json() + b" ",
        b"[" * 100_000,
    ],
)
def test_bad_meta_is_refused(data: bytes) -> None:
    """By ValueError alone: a donor's meta must not end the process that reads it."""
    with pytest.raises(ValueError):
        StateMeta.from_json(data)


def test_canonical_json_is_canonical() -> None:
    assert canonical_json({"b": 1, "a": [1.5, "\u00e9"]}) == b'{"a":[1.5,"\\u00e9"],"b":1}'
    with pytest.raises(ValueError):
        canonical_json(float("nan"))
