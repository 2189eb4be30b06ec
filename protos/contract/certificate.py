"""What is signed and how, and what makes a quorum.

Everything signed is Ed25519 over `tag || payload` with a tag per kind of statement, so a signature
on one kind can never pass for another. A vote signs the value's exact bytes together with the
attempt. A certificate is a quorum of votes equal in value and attempt (architecture section 5,
Agree); members weigh one, the coordinator one half: weights are counted in halves here so that
everything stays an integer.
"""

import hashlib
from collections.abc import Iterable, Mapping
from enum import StrEnum

from protos.contract.ids import COORDINATOR_VOTER
from protos.muster.v1 import common_pb2, rounds_pb2


class Tag(StrEnum):
    """Kinds of signed statements."""

    LEASE = "muster lease 1"
    DIRECTIVE = "muster directive 1"
    INCARNATION = "muster incarnation 1"
    MANIFEST = "muster manifest 1"
    ATTESTATION = "muster attestation 1"
    VOTE = "muster vote 1"
    JOIN = "muster join 1"
    PRESENCE = "muster presence 1"
    CHECKPOINT = "muster checkpoint 1"


MEMBER_HALF_VOTES = 2
COORDINATOR_HALF_VOTES = 1


def tagged(tag: Tag, payload: bytes) -> bytes:
    """Bytes to sign for a statement."""
    return tag.value.encode() + b"\0" + payload


def vote_payload(value: bytes, attempt: int) -> bytes:
    """Payload of a vote: the attempt, then the value's bytes."""
    return attempt.to_bytes(4, "big") + value


def join_payload(nonce: bytes, *, run_id: str, p2p_public_key: bytes) -> bytes:
    """Payload of Tag.JOIN. Unambiguous: the nonce has 32 bytes, and a run id has no byte that
    begins a p2p key.
    """
    return nonce + run_id.encode() + p2p_public_key


def p2p_join_payload(nonce: bytes, *, public_key: bytes) -> bytes:
    """What the libp2p key signs at Join (RSA PKCS#1 v1.5, SHA-256, without a tag: the nonce is the
    coordinator's).
    """
    return nonce + public_key


def contributions_digest(contributions: bytes) -> bytes:
    """SHA-256 of serialised Contributions, as the value names it."""
    return hashlib.sha256(contributions).digest()


def half_votes_by_voter(roster: Iterable[common_pb2.RosterEntry]) -> dict[str, int]:
    """Weight in halves of everybody who may vote under a roster, the coordinator included."""
    weights = {entry.peer_id: MEMBER_HALF_VOTES for entry in roster if entry.has_vote}
    weights[COORDINATOR_VOTER] = COORDINATOR_HALF_VOTES
    return weights


def is_quorum(voters: Iterable[str], half_votes: Mapping[str, int]) -> bool:
    """True if the distinct voters hold more than half of *all* votes of the roster."""
    return 2 * sum(half_votes.get(voter, 0) for voter in set(voters)) > sum(half_votes.values())


def public_key_by_voter(
    roster: Iterable[common_pb2.RosterEntry], coordinator_public_key: bytes
) -> dict[str, bytes]:
    """Ed25519 public keys of everybody who may vote under a roster."""
    keys = {entry.peer_id: entry.public_key for entry in roster if entry.has_vote}
    keys[COORDINATOR_VOTER] = coordinator_public_key
    return keys


def certificate_from_votes(
    votes: Iterable[rounds_pb2.Vote], contributions: bytes
) -> rounds_pb2.Certificate:
    """Bundle equal votes, ordered by voter. The caller has checked them. Raises ValueError for
    unequal votes.
    """
    ordered = sorted(votes, key=lambda vote: vote.voter)
    if not ordered:
        raise ValueError("no votes; a certificate needs a quorum")
    first = ordered[0]
    if any(vote.value != first.value or vote.attempt != first.attempt for vote in ordered):
        raise ValueError("votes differ in value or attempt; a certificate needs equal votes")
    return rounds_pb2.Certificate(
        value=first.value,
        attempt=first.attempt,
        votes=[
            rounds_pb2.VoteSignature(voter=vote.voter, signature=vote.signature) for vote in ordered
        ],
        contributions=contributions,
    )
