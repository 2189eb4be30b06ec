"""Identities: golden values on both sides."""

import pytest

from protos.contract.ids import (
    is_valid_name,
    is_valid_run_id,
    p2p_peer_id_from_public_key,
    peer_id_from_public_key,
)


def test_peer_id_is_golden() -> None:
    assert peer_id_from_public_key(bytes(range(32))) == "630dcd2966c4336691125448bbb25b4f"
    with pytest.raises(ValueError, match="31 bytes"):
        peer_id_from_public_key(bytes(31))


def test_p2p_peer_id_is_golden() -> None:
    """Base58 of the multihash; RSA identities of libp2p begin with Qm."""
    peer_id = p2p_peer_id_from_public_key(b"\x08\x00\x12\x03abc")
    assert peer_id == "QmSEdUTmTwu3d2o2FGW7YyG4s9mWtVBoVaM53ExfmgB6qk"


def test_p2p_peer_id_is_that_of_an_independent_implementation() -> None:
    base58 = pytest.importorskip("base58")
    multihash = pytest.importorskip("multihash")
    for key in (b"", b"x", bytes(300)):
        expected = base58.b58encode(multihash.digest(key, "sha2-256").encode()).decode()
        assert p2p_peer_id_from_public_key(key) == expected


@pytest.mark.parametrize(
    ("text", "expected"), [("a", True), ("run-1", True), ("-a", False), ("A", False), ("", False)]
)
def test_run_ids(text: str, expected: bool) -> None:
    assert is_valid_run_id(text) is expected
    assert not is_valid_run_id("a" * 33)


def test_names() -> None:
    assert is_valid_name("Ann's".replace("'", "") + " box_1.2-x")
    assert not any(is_valid_name(text) for text in ("", " a", "a\n", "\u00e9", "a" * 41, "<b>"))
