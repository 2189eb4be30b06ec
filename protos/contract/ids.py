"""Identifiers: who and what, as short printable strings.

A peer is its Ed25519 public key: `peer_id` is the first 16 bytes of the key's SHA-256 in hex, so it
can be checked by whoever sees the key. A run's id is chosen by the coordinator and only has to be
unique there.
"""

import hashlib
import re
from typing import NewType

PeerId = NewType("PeerId", str)
RunId = NewType("RunId", str)

COORDINATOR_VOTER = "coordinator"
"""Name under which the coordinator votes; never a PeerId, which is 32 hex digits."""

PROTOCOL_VERSION = 4
"""Rises when a message or rule changes so that older peers would disagree. The coordinator refuses
others at Join and at every call, members have no name for each other's calls in another version.
"""

_BASE58_DIGITS = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_SHA256_MULTIHASH_PREFIX = b"\x12\x20"

_RUN_ID_PATTERN = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")
_NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,39}")


def peer_id_from_public_key(public_key: bytes) -> PeerId:
    """Identity of a raw 32-byte Ed25519 public key. Raises ValueError for other lengths."""
    if len(public_key) != 32:
        raise ValueError(f"public key has {len(public_key)} bytes; an Ed25519 key has 32")
    return PeerId(hashlib.sha256(public_key).hexdigest()[:32])


def p2p_peer_id_from_public_key(p2p_public_key: bytes) -> str:
    """libp2p identity of a public key: base58 of the SHA-256 multihash of its protobuf (08 00 12
    len DER for RSA).
    """
    multihash = _SHA256_MULTIHASH_PREFIX + hashlib.sha256(p2p_public_key).digest()
    number, digits = int.from_bytes(multihash, "big"), ""
    while number:
        number, digit = divmod(number, 58)
        digits = _BASE58_DIGITS[digit] + digits
    return digits


def is_valid_run_id(text: str) -> bool:
    """True for 1 to 32 lower-case letters, digits and hyphens that do not begin with a hyphen."""
    return _RUN_ID_PATTERN.fullmatch(text) is not None


def is_valid_name(text: str) -> bool:
    """True for a display name: 1 to 40 letters, digits, spaces, dots, hyphens, underscores."""
    return _NAME_PATTERN.fullmatch(text) is not None
