"""What travels on lanes: who may join one, and sealed chunks with numbers. Pure.

A lane is one of several TCP connections that carry a stream of a pair of members (lane_stream.py).
Both sides know a fresh secret, told over libp2p. Who dials says hello with a proof, gets a
challenge with a proof, and answers that; without the first proof it hears nothing. From then on
each direction has an AES-256-GCM key of its own. Chunks are numbered over all lanes of the bundle,
and the number is the nonce, so a chunk that is altered, replayed or missing ends the bundle.
"""

import hmac
import struct
from dataclasses import dataclass
from typing import Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

ID_BYTES, SECRET_BYTES, NONCE_BYTES, PROOF_BYTES = 16, 32, 16, 32
HELLO_BYTES = ID_BYTES + 1 + NONCE_BYTES + PROOF_BYTES
CHALLENGE_BYTES = NONCE_BYTES + PROOF_BYTES
CHUNK_BYTES = 2**17
"""Most plain bytes of a chunk."""
DATA, END = 0, 1
"""Kinds of chunks; END carries the number of chunks that its sender has taken, in 8 bytes."""
_HEADER = struct.Struct(">BQI")
HEADER_BYTES = _HEADER.size
TAG_BYTES = 16
_HELLO = struct.Struct(f">{ID_BYTES}sB{NONCE_BYTES}s")


class LaneError(Exception):
    """What came over a lane is not what the other side sent, or not all of it."""


def _derived(secret: bytes, label: str) -> bytes:
    """A key; the secret is uniformly random, so one HMAC is enough (RFC 5869, section 3.3)."""
    return hmac.digest(secret, f"muster lane 1 {label}".encode(), "sha256")


# Joining --------------------------------------------------------------------------------------


def hello(secret: bytes, *, bundle_id: bytes, index: int, nonce: bytes) -> bytes:
    """What the dialling side says first: which lane of which bundle, and that it may."""
    head = _HELLO.pack(bundle_id, index, nonce)
    return head + hmac.digest(_derived(secret, "hello"), head, "sha256")


def bundle_id_of(greeting: bytes) -> bytes:
    """Whose secret to hold a hello against."""
    return greeting[:ID_BYTES]


def lane_index(secret: bytes, greeting: bytes) -> int | None:
    """Which lane a hello is for; None if its sender does not know the secret."""
    head, proof = greeting[: _HELLO.size], greeting[_HELLO.size :]
    if not hmac.compare_digest(hmac.digest(_derived(secret, "hello"), head, "sha256"), proof):
        return None
    return greeting[ID_BYTES]


def challenge(secret: bytes, greeting: bytes, *, nonce: bytes) -> bytes:
    """Answer to a good hello."""
    key = _derived(secret, "challenge")
    return nonce + hmac.digest(key, greeting + nonce, "sha256")


def is_challenge(secret: bytes, greeting: bytes, found: bytes) -> bool:
    """True if it answers this hello and its sender knows the secret."""
    return hmac.compare_digest(challenge(secret, greeting, nonce=found[:NONCE_BYTES]), found)


def proof(secret: bytes, greeting: bytes, challenged: bytes) -> bytes:
    """Answer to a good challenge: the hello is not a recorded one."""
    return hmac.digest(_derived(secret, "proof"), greeting + challenged, "sha256")


def is_proof(secret: bytes, greeting: bytes, challenged: bytes, found: bytes) -> bool:
    """True if it answers this challenge."""
    return hmac.compare_digest(proof(secret, greeting, challenged), found)


# Chunks ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkHeader:
    """In clear before every chunk, and sealed with it."""

    kind: int
    number: int
    """Over all lanes of the bundle, in one direction."""
    num_bytes: int
    """Without the tag."""

    @classmethod
    def parse(cls, data: bytes | bytearray | memoryview) -> Self:
        """Read HEADER_BYTES. Raises LaneError."""
        kind, number, num_bytes = _HEADER.unpack(data)
        if kind not in (DATA, END) or num_bytes > CHUNK_BYTES:
            raise LaneError(f"a chunk of kind {kind} with {num_bytes} bytes")
        return cls(kind=kind, number=number, num_bytes=num_bytes)


class Sealer:
    """Seals one direction's chunks."""

    def __init__(self, secret: bytes, *, is_owner: bool) -> None:
        """`is_owner`: of the side that asked for the bundle."""
        self._cipher = AESGCM(_derived(secret, "owner's" if is_owner else "other's"))
        self.number = 0
        """Of the next chunk."""

    def seal(self, kind: int, data: bytes | memoryview) -> bytes:
        """Header, sealed bytes and tag of the next chunk."""
        header = _HEADER.pack(kind, self.number, len(data))
        sealed = self._cipher.encrypt(self.number.to_bytes(12, "big"), data, header)
        self.number += 1
        return header + sealed


class Unsealer:
    """Opens one direction's chunks, in the order of their numbers."""

    def __init__(self, secret: bytes, *, is_owner: bool) -> None:
        """`is_owner`: the chunks are of the side that asked for the bundle."""
        self._cipher = AESGCM(_derived(secret, "owner's" if is_owner else "other's"))
        self.number = 0
        """Of the next chunk."""

    def unseal(self, frame: memoryview) -> tuple[int, bytes]:
        """Kind and plain bytes of the next chunk. Raises LaneError if this is not it."""
        header, sealed = frame[:HEADER_BYTES], frame[HEADER_BYTES:]
        found = ChunkHeader.parse(header)
        if found.number != self.number:
            raise LaneError(f"chunk {found.number} came; {self.number} is next")
        try:
            data = self._cipher.decrypt(self.number.to_bytes(12, "big"), sealed, bytes(header))
        except InvalidTag as error:
            raise LaneError(f"chunk {self.number} was altered on its way") from error
        self.number += 1
        return found.kind, data
