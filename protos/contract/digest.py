"""Canonical digests: the same state has the same digest on any CPU, layout and torch version.

Vectors are cut into pieces of `PIECE_VALUES` fp32 values; each piece is hashed over its
little-endian bytes, and the digest of a vector is the SHA-256 over the piece digests. So one piece
can be checked without the others, and a reducer's share of a vector is a run of whole pieces.
Everything else is hashed as canonical JSON.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

PIECE_VALUES = 65_536
"""Values per piece: 256 KiB of fp32; 2 M parameters are 31 pieces, 124 M are 1,900."""

Float32Vector = npt.NDArray[np.float32]

STATE_LAYOUTS: dict[str, tuple[str, ...]] = {
    "sync": ("params", "exp_avg", "exp_avg_sq"),
    "diloco": ("params", "outer_momentum"),
}
"""Strategy -> names of the replicated vectors, in the order of the digest; each layout has a length
of its own. `params` are the anchors of all fragments.
"""


def canonical_json(value: Any) -> bytes:
    """Serialise plain data so that equal data gives equal bytes: sorted keys, no spaces, ASCII."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    ).encode()


def num_pieces(num_values: int) -> int:
    """Number of pieces of a vector; the last may be shorter."""
    return -(-num_values // PIECE_VALUES)


def piece_digest(data: bytes | memoryview | Float32Vector) -> bytes:
    """SHA-256 of one piece's bytes."""
    return hashlib.sha256(data.data if isinstance(data, np.ndarray) else data).digest()


def vector_piece_digests(vector: Float32Vector) -> list[bytes]:
    """Digests of all pieces of a contiguous fp32 vector."""
    return [
        piece_digest(vector[begin : begin + PIECE_VALUES])
        for begin in range(0, vector.size, PIECE_VALUES)
    ]


def state_piece_digests(vectors: Iterable[Float32Vector]) -> tuple[tuple[bytes, ...], ...]:
    """Of each vector, in order."""
    return tuple(tuple(vector_piece_digests(vector)) for vector in vectors)


def digest_of_pieces(digests: Iterable[bytes]) -> bytes:
    """Digest of a vector from the digests of its pieces, in order."""
    whole = hashlib.sha256(b"muster pieces 1\n")
    for digest in digests:
        whole.update(digest)
    return whole.digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class StateMeta:
    """Replicated state that is not a vector; the same on every member after an outer step."""

    run_digest: str
    """Hex digest of the RunSpec."""
    incarnation: int
    outer_step: int
    """Committed outer steps."""
    schedule_tokens: int
    """Sum of the tokens of all committed rounds; drives the learning rate."""
    directive_number: int
    """Directive in force for the next outer step."""
    lease_cursor_by_peer: dict[str, tuple[int, int]] = field(default_factory=dict)
    """peer_id -> (lease number, end window) of the last range committed; only ranges above are
    accepted.
    """

    def to_json(self) -> bytes:
        """Canonical JSON, also the wire form (SnapshotHeader.state_meta)."""
        return canonical_json(
            {
                "run_digest": self.run_digest,
                "incarnation": self.incarnation,
                "outer_step": self.outer_step,
                "schedule_tokens": self.schedule_tokens,
                "directive_number": self.directive_number,
                "lease_cursor_by_peer": {k: list(v) for k, v in self.lease_cursor_by_peer.items()},
            }
        )

    @classmethod
    def from_json(cls, data: bytes) -> "StateMeta":
        """Parse `to_json`. Raises ValueError for anything else."""
        try:
            plain = json.loads(data)
            cursors = {
                str(k): (int(v[0]), int(v[1])) for k, v in plain.pop("lease_cursor_by_peer").items()
            }
            meta = cls(lease_cursor_by_peer=cursors, **plain)
            is_canonical = meta.to_json() == data
        except (LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(
                f"state meta is not what StateMeta.to_json writes: {error!r}"
            ) from error
        if not is_canonical:
            raise ValueError("state meta is not canonical: StateMeta.to_json writes it otherwise")
        return meta


def state_digest(meta: StateMeta, vectors: Sequence[Float32Vector]) -> bytes:
    """Digest of a whole replicated state: meta, then each vector of its layout."""
    return state_digest_of_pieces(meta, state_piece_digests(vectors))


def state_digest_of_pieces(meta: StateMeta, pieces: Sequence[Sequence[bytes]]) -> bytes:
    """The same from piece digests, one list per vector."""
    whole = hashlib.sha256(b"muster state 1\n")
    whole.update(hashlib.sha256(meta.to_json()).digest())
    for digests in pieces:
        whole.update(digest_of_pieces(digests))
    return whole.digest()
