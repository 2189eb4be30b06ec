"""Signatures, quorums, certificates: the table of the architecture, every way to be refused."""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
from protos.contract.ids import COORDINATOR_VOTER
from protos.contract.signing import (
    SigningKey,
    check_certificate,
    has_valid_signature,
    is_valid_vote,
)
from protos.muster.v1 import common_pb2, rounds_pb2

COORDINATOR = SigningKey(bytes([99] * 32))
KEYS = [SigningKey(bytes([number] * 32)) for number in range(6)]


def roster_of(num_voters: int, *, num_others: int = 0) -> list[common_pb2.RosterEntry]:
    """Roster with voters first."""
    return [
        common_pb2.RosterEntry(
            peer_id=key.peer_id, public_key=key.public_key, has_vote=index < num_voters
        )
        for index, key in enumerate(KEYS[: num_voters + num_others])
    ]


@pytest.mark.parametrize(
    ("num_members", "needed_alone", "needed_with_coordinator"),
    [(1, 1, 1), (2, 2, 1), (3, 2, 2), (4, 3, 2), (5, 3, 3), (6, 4, 3)],
)
def test_quorum_table(num_members: int, needed_alone: int, needed_with_coordinator: int) -> None:
    weights = half_votes_by_voter(roster_of(num_members))
    members = [key.peer_id for key in KEYS[:num_members]]
    for count in range(num_members + 1):
        assert is_quorum(members[:count], weights) is (count >= needed_alone)
        with_coordinator = [*members[:count], COORDINATOR_VOTER]
        assert is_quorum(with_coordinator, weights) is (count >= needed_with_coordinator)


@given(num_members=st.integers(0, 6), data=st.data())
def test_two_quorums_always_share_a_voter(num_members: int, data: st.DataObject) -> None:
    weights = half_votes_by_voter(roster_of(num_members))
    voters = st.sets(st.sampled_from(sorted(weights)))
    first, second = data.draw(voters), data.draw(voters)
    if is_quorum(first, weights) and is_quorum(second, weights):
        assert first & second


def test_quorum_counts_nobody_twice_and_no_stranger() -> None:
    weights = half_votes_by_voter(roster_of(3, num_others=1))
    first = KEYS[0].peer_id
    assert not is_quorum([first, first, first], weights)
    assert not is_quorum([first, KEYS[3].peer_id, "stranger"], weights)
    assert not is_quorum([COORDINATOR_VOTER], half_votes_by_voter(roster_of(1)))


def test_without_members_the_coordinator_is_the_quorum_of_nothing_that_can_happen() -> None:
    """An empty roster (incarnation 0) has no rounds; the weights alone do not say so."""
    assert half_votes_by_voter([]) == {COORDINATOR_VOTER: 1}


def test_signature_is_golden() -> None:
    """Ed25519 is deterministic, so tag and payload layout are frozen by one signature."""
    assert tagged(Tag.VOTE, vote_payload(b"value", 258)) == b"muster vote 1\0\x00\x00\x01\x02value"
    assert COORDINATOR.sign(Tag.LEASE, b"payload").hex() == (
        "26c8e573d19101708a33cd7c1aad6a7bc246ab7f6a2c7486d571b29ea1bced12"
        "4b074e2c0f8becf2d46c0bfc32fff4f5b4509e6f8028b359ab303c0a59b41e0c"
    )
    assert COORDINATOR.peer_id == "2b61f0ec7a2b23523274ba3f5b0a4a9e"


def test_a_signature_holds_for_one_key_one_tag_one_payload() -> None:
    signature = KEYS[0].sign(Tag.LEASE, b"payload")
    assert has_valid_signature(KEYS[0].public_key, Tag.LEASE, b"payload", signature)
    assert not has_valid_signature(KEYS[1].public_key, Tag.LEASE, b"payload", signature)
    assert not has_valid_signature(KEYS[0].public_key, Tag.VOTE, b"payload", signature)
    assert not has_valid_signature(KEYS[0].public_key, Tag.LEASE, b"payloae", signature)
    assert not has_valid_signature(KEYS[0].public_key, Tag.LEASE, b"payload", b"")
    assert not has_valid_signature(b"short", Tag.LEASE, b"payload", signature)


def test_no_tag_begins_with_another() -> None:
    for first, second in combinations(Tag, 2):
        assert not tagged(first, b"").startswith(tagged(second, b""))
        assert not tagged(second, b"").startswith(tagged(first, b""))


def test_a_key_survives_storage() -> None:
    key = SigningKey.generate()
    assert SigningKey(key.private_bytes()).public_key == key.public_key
    signed = key.signed(Tag.DIRECTIVE, b"d")
    assert has_valid_signature(key.public_key, Tag.DIRECTIVE, signed.payload, signed.signature)


CONTRIBUTIONS = rounds_pb2.Contributions(
    contributions=[rounds_pb2.Contribution(peer_id=KEYS[0].peer_id)]
).SerializeToString()


def directive_of(num_voters: int) -> common_pb2.Directive:
    """Directive 4 of incarnation 1."""
    return common_pb2.Directive(
        run_id="r", incarnation=1, directive_number=4, roster=roster_of(num_voters, num_others=1)
    )


def value_of(**fields: object) -> bytes:
    """A value that fits the directive, with some fields replaced."""
    value = rounds_pb2.RoundValue(
        run_id="r",
        incarnation=1,
        outer_step=9,
        roster_directive_number=4,
        contributions_digest=contributions_digest(CONTRIBUTIONS),
    )
    value.MergeFrom(rounds_pb2.RoundValue(**fields))
    return value.SerializeToString()


def certificate_of(
    value: bytes, voters: list[SigningKey], *, has_coordinator: bool = False
) -> rounds_pb2.Certificate:
    """Certificate of attempt 2 with honest signatures."""
    votes = [key.vote(value, 2, key.peer_id) for key in voters]
    if has_coordinator:
        votes.append(COORDINATOR.vote(value, 2, COORDINATOR_VOTER))
    return certificate_from_votes(votes, CONTRIBUTIONS)


def reason_of(certificate: rounds_pb2.Certificate, num_voters: int = 3) -> str:
    """What check_certificate says."""
    return check_certificate(
        certificate,
        directive=directive_of(num_voters),
        coordinator_public_key=COORDINATOR.public_key,
    )


def test_quorum_of_valid_votes_is_a_proof() -> None:
    assert reason_of(certificate_of(value_of(), KEYS[:2])) == ""
    assert reason_of(certificate_of(value_of(), KEYS[1:3], has_coordinator=True)) == ""
    assert reason_of(certificate_of(value_of(), KEYS[:1], has_coordinator=True), 2) == ""
    assert reason_of(certificate_of(value_of(), KEYS[:1]), 1) == ""


def test_more_votes_than_voters_are_not_looked_at() -> None:
    """Each takes a tenth of a millisecond, and a message has room for a hundred thousand."""
    repeated = certificate_of(value_of(), KEYS[:1] * 5)
    assert "5 votes; there are 4 voters" in reason_of(repeated)


def test_what_is_no_proof_is_refused_with_the_reason() -> None:
    good = certificate_of(value_of(), KEYS[:2])
    assert "no quorum" in reason_of(certificate_of(value_of(), KEYS[:1], has_coordinator=True))
    assert "has no vote" in reason_of(certificate_of(value_of(), [KEYS[0], KEYS[3]]))
    assert "has no vote" in reason_of(certificate_of(value_of(), [KEYS[0], KEYS[5]]))
    assert "names run 'q'" in reason_of(certificate_of(value_of(run_id="q"), KEYS[:2]))
    assert "incarnation 2" in reason_of(certificate_of(value_of(incarnation=2), KEYS[:2]))
    stale = certificate_of(value_of(roster_directive_number=3), KEYS[:2])
    assert "names roster 3, not 4" in reason_of(stale)
    for field, changed in (
        ("contributions", b"x"),
        ("attempt", 3),
        ("value", value_of(outer_step=8)),
    ):
        forged = rounds_pb2.Certificate()
        forged.CopyFrom(good)
        setattr(forged, field, changed)
        assert reason_of(forged) != "", field
    twice = rounds_pb2.Certificate()
    twice.CopyFrom(good)
    twice.votes[1].CopyFrom(twice.votes[0])
    assert "no quorum" in reason_of(twice)
    renamed = rounds_pb2.Certificate()
    renamed.CopyFrom(good)
    renamed.votes[0].voter = COORDINATOR_VOTER
    assert "is not valid" in reason_of(renamed)


def test_garbage_in_a_certificate_is_a_reason_not_a_crash() -> None:
    garbage = certificate_of(value_of(), KEYS[:2])
    garbage.value = b"\xff\xff\xff"
    assert reason_of(garbage) != ""


def test_votes_are_bound_to_voter_value_and_attempt() -> None:
    vote = KEYS[0].vote(value_of(), 2, KEYS[0].peer_id)
    assert is_valid_vote(vote, KEYS[0].public_key)
    assert not is_valid_vote(vote, KEYS[1].public_key)
    vote.attempt = 1
    assert not is_valid_vote(vote, KEYS[0].public_key)


def test_certificate_needs_equal_votes_and_orders_them() -> None:
    votes = [key.vote(value_of(), 2, key.peer_id) for key in KEYS[:3]]
    forward = certificate_from_votes(votes, CONTRIBUTIONS)
    assert certificate_from_votes(votes[::-1], CONTRIBUTIONS) == forward
    with pytest.raises(ValueError, match="no votes"):
        certificate_from_votes([], CONTRIBUTIONS)
    with pytest.raises(ValueError, match="differ"):
        certificate_from_votes([votes[0], KEYS[1].vote(value_of(), 3, "b")], CONTRIBUTIONS)


def test_keys_of_voters_only() -> None:
    keys = public_key_by_voter(roster_of(2, num_others=2), COORDINATOR.public_key)
    assert set(keys) == {KEYS[0].peer_id, KEYS[1].peer_id, COORDINATOR_VOTER}
