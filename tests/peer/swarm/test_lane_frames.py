"""Sealed chunks and the handshake of lanes: whatever is not exactly what was sent is refused."""

import pytest

from peer.swarm.lane_frames import (
    CHALLENGE_BYTES,
    CHUNK_BYTES,
    DATA,
    END,
    HEADER_BYTES,
    HELLO_BYTES,
    ChunkHeader,
    LaneError,
    Sealer,
    Unsealer,
    bundle_id_of,
    challenge,
    hello,
    is_challenge,
    is_proof,
    lane_index,
    proof,
)

SECRET, OTHER_SECRET = bytes(range(32)), bytes(32)
BUNDLE_ID = b"b" * 16


def _sealed(num_chunks: int) -> list[memoryview]:
    sealer = Sealer(SECRET, is_owner=True)
    return [memoryview(sealer.seal(DATA, bytes([i]) * (100 + i))) for i in range(num_chunks)]


def test_chunks_come_out_as_they_went_in() -> None:
    sealer, unsealer = Sealer(SECRET, is_owner=False), Unsealer(SECRET, is_owner=False)
    for kind, data in ((DATA, bytes(CHUNK_BYTES)), (DATA, b""), (END, b"\0" * 8)):
        frame = sealer.seal(kind, data)
        header = ChunkHeader.parse(frame[:HEADER_BYTES])
        assert (header.kind, header.num_bytes) == (kind, len(data))
        assert unsealer.unseal(memoryview(frame)) == (kind, data)
    assert sealer.number == unsealer.number == 3


def test_reordered_replayed_and_missing_chunks_are_refused() -> None:
    first, second, third = _sealed(3)
    unsealer = Unsealer(SECRET, is_owner=True)
    with pytest.raises(LaneError, match="1 came; 0 is next"):
        unsealer.unseal(second)
    unsealer.unseal(first)
    with pytest.raises(LaneError, match="0 came; 1 is next"):
        unsealer.unseal(first)
    with pytest.raises(LaneError, match="2 came; 1 is next"):
        unsealer.unseal(third)
    unsealer.unseal(second)


def test_a_changed_bit_anywhere_is_refused() -> None:
    (frame,) = _sealed(1)
    for place in range(len(frame)):
        changed = bytearray(frame)
        changed[place] ^= 1
        with pytest.raises(LaneError):
            Unsealer(SECRET, is_owner=True).unseal(memoryview(changed))


def test_a_truncated_chunk_and_another_direction_or_secret_are_refused() -> None:
    (frame,) = _sealed(1)
    for unsealer, found in (
        (Unsealer(SECRET, is_owner=True), frame[:-1]),
        (Unsealer(SECRET, is_owner=True), frame[: HEADER_BYTES + 3]),
        (Unsealer(SECRET, is_owner=False), frame),
        (Unsealer(OTHER_SECRET, is_owner=True), frame),
    ):
        with pytest.raises(LaneError, match="altered"):
            unsealer.unseal(found)


def test_a_header_asks_for_no_more_than_a_chunk() -> None:
    frame = bytearray(_sealed(1)[0][:HEADER_BYTES])
    for place, value in ((0, 7), (9, 0xFF)):
        bad = bytearray(frame)
        bad[place] = value
        with pytest.raises(LaneError, match="a chunk of kind"):
            ChunkHeader.parse(bad)


def test_both_sides_prove_the_secret() -> None:
    greeting = hello(SECRET, bundle_id=BUNDLE_ID, index=1, nonce=b"n" * 16)
    assert len(greeting) == HELLO_BYTES and bundle_id_of(greeting) == BUNDLE_ID
    assert lane_index(SECRET, greeting) == 1
    challenged = challenge(SECRET, greeting, nonce=b"m" * 16)
    assert len(challenged) == CHALLENGE_BYTES
    assert is_challenge(SECRET, greeting, challenged)
    assert is_proof(SECRET, greeting, challenged, proof(SECRET, greeting, challenged))


def test_who_does_not_know_the_secret_or_replays_is_found_out() -> None:
    greeting = hello(SECRET, bundle_id=BUNDLE_ID, index=1, nonce=b"n" * 16)
    assert lane_index(OTHER_SECRET, greeting) is None
    for place in range(HELLO_BYTES):
        changed = bytearray(greeting)
        changed[place] ^= 1
        assert lane_index(SECRET, bytes(changed)) is None
    challenged = challenge(SECRET, greeting, nonce=b"m" * 16)
    assert not is_challenge(OTHER_SECRET, greeting, challenged)
    recorded = proof(SECRET, greeting, challenged)
    assert not is_proof(SECRET, greeting, challenge(SECRET, greeting, nonce=b"o" * 16), recorded)
