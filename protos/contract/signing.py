"""Ed25519 keys and signatures over tagged payloads (certificate.py); a thin layer over
`cryptography`.
"""

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from google.protobuf.message import DecodeError

from protos.contract.certificate import (
    Tag,
    certificate_from_votes,
    contributions_digest,
    half_votes_by_voter,
    is_quorum,
    public_key_by_voter,
    tagged,
    vote_payload,
)
from protos.contract.ids import PeerId, peer_id_from_public_key
from protos.muster.v1 import common_pb2, rounds_pb2

__all__ = [
    "SigningKey",
    "certificate_from_votes",
    "check_certificate",
    "has_valid_signature",
    "is_valid_vote",
]


class SigningKey:
    """A private key that signs tagged payloads."""

    def __init__(self, private_bytes: bytes) -> None:
        """Take the raw 32-byte private key. Raises ValueError for other lengths."""
        self._key = Ed25519PrivateKey.from_private_bytes(private_bytes)
        self.public_key: bytes = self._key.public_key().public_bytes_raw()
        self.peer_id: PeerId = peer_id_from_public_key(self.public_key)

    @classmethod
    def generate(cls) -> "SigningKey":
        """Make a new key from the system's randomness."""
        return cls(Ed25519PrivateKey.generate().private_bytes_raw())

    def private_bytes(self) -> bytes:
        """Raw 32-byte private key, for storage with mode 0600."""
        return self._key.private_bytes_raw()

    def sign(self, tag: Tag, payload: bytes) -> bytes:
        """Signature of 64 bytes."""
        return self._key.sign(tagged(tag, payload))

    def signed(self, tag: Tag, payload: bytes) -> common_pb2.Signed:
        """Payload together with its signature."""
        return common_pb2.Signed(payload=payload, signature=self.sign(tag, payload))

    def vote(self, value: bytes, attempt: int, voter: str) -> rounds_pb2.Vote:
        """Vote for a value in an attempt, under the voter's name."""
        signature = self.sign(Tag.VOTE, vote_payload(value, attempt))
        return rounds_pb2.Vote(value=value, attempt=attempt, voter=voter, signature=signature)


def has_valid_signature(public_key: bytes, tag: Tag, payload: bytes, signature: bytes) -> bool:
    """True if the key signed this payload as this kind of statement."""
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, tagged(tag, payload))
    except (InvalidSignature, ValueError):
        return False
    return True


def is_valid_vote(vote: rounds_pb2.Vote, public_key: bytes) -> bool:
    """True if the key cast this vote."""
    payload = vote_payload(vote.value, vote.attempt)
    return has_valid_signature(public_key, Tag.VOTE, payload, vote.signature)


def check_certificate(
    certificate: rounds_pb2.Certificate,
    *,
    directive: common_pb2.Directive,
    coordinator_public_key: bytes,
) -> str:
    """Return "" if the certificate proves its outer step under the directive's roster, else the
    reason why not.

    Checks: it names this roster and incarnation, its contributions match, every signature is valid
    and its voters are a quorum. Whether its previous state is the caller's is for the caller to
    compare.
    """
    try:
        value = rounds_pb2.RoundValue.FromString(certificate.value)
    except DecodeError as error:
        return f"value does not parse ({error})"
    if (value.run_id, value.incarnation) != (directive.run_id, directive.incarnation):
        return (
            f"names run {value.run_id!r} incarnation {value.incarnation}, "
            f"not {directive.run_id!r} {directive.incarnation}"
        )
    if value.roster_directive_number != directive.directive_number:
        return f"names roster {value.roster_directive_number}, not {directive.directive_number}"
    if contributions_digest(certificate.contributions) != value.contributions_digest:
        return "contributions do not match the digest in the value"
    keys = public_key_by_voter(directive.roster, coordinator_public_key)
    if len(certificate.votes) > len(keys):
        return f"{len(certificate.votes)} votes; there are {len(keys)} voters"
    payload = vote_payload(certificate.value, certificate.attempt)
    for vote in certificate.votes:
        key = keys.get(vote.voter)
        if key is None:
            return f"{vote.voter} has no vote under directive {directive.directive_number}"
        if not has_valid_signature(key, Tag.VOTE, payload, vote.signature):
            return f"signature of {vote.voter} is not valid"
    voters = {vote.voter for vote in certificate.votes}
    if not is_quorum(voters, half_votes_by_voter(directive.roster)):
        return (
            f"{len(voters)} voters are no quorum of {len(keys)} "
            f"under directive {directive.directive_number}"
        )
    return ""
