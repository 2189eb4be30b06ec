"""The coordinator's half vote: stories, random ballots, and what a left-out rule breaks."""

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from coordinator.domain import acceptor
from coordinator.store.rows_membership import AttestationRow
from protos.contract.certificate import Tag, certificate_from_votes
from protos.contract.ids import COORDINATOR_VOTER
from protos.muster.v1 import common_pb2
from tests.coordinator.operations.acceptor_machine import AcceptorMachine
from tests.coordinator.operations.ledger_world import (
    COORDINATOR_KEY,
    PEER_KEYS,
    RUN_ID,
    World,
    lease_of,
    whole,
)

SETTINGS = settings(
    max_examples=100,
    stateful_step_count=30,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def test_the_half_completes_a_quorum_and_credits_in_the_same_step() -> None:
    world = World.create(num_peers=2)
    signed = world.acquire(0).leases[0]
    contributions = world.contributions([world.contribution(0, [whole(signed)])])
    value = world.value(contributions)
    response = world.submit(world.votes(value, [0]), contributions)
    assert COORDINATOR_VOTER in {vote.voter for vote in response.certificate.votes}
    with world.store.read() as tx:
        assert tx.book(RUN_ID).credited_tokens > 0
    again = world.submit(world.votes(value, [0]), contributions)
    assert again.certificate == response.certificate
    assert world.report(response.certificate)[0].is_stored
    answer = world.exchange(outer_step=1, attempt=3)
    assert not answer.is_promised and answer.certificate == response.certificate
    assert answer.answer.highest_vote.value == value
    assert world.verify().violations == ()


def test_the_half_is_not_given_without_a_quorum_or_below_a_promise() -> None:
    world = World.create(num_peers=4)
    contributions = world.one_range()
    value = world.value(contributions)
    response = world.submit(world.votes(value, [0]), contributions)
    assert response.certificate is None and "no quorum" in response.reason
    assert world.exchange(outer_step=1, attempt=2).is_promised
    assert not world.exchange(outer_step=1, attempt=1).is_promised
    response = world.submit(world.votes(value, [0, 1], attempt=1), contributions)
    assert response.certificate is None and "attempt 2 is promised" in response.reason
    response = world.submit(world.votes(value, [0, 1], attempt=2), contributions)
    assert len(response.certificate.votes) == 3


def test_a_half_that_is_refused_stores_nothing() -> None:
    world = World.create(num_peers=2)
    mine = [signed for _ in range(2) for signed in world.acquire(0).leases]
    theirs = world.acquire(1).leases[0]
    forged = common_pb2.Signed(payload=mine[0].payload, signature=bytes(64))
    vast = lease_of(mine[0])
    vast.range.end_window = 10_000
    vast_signed = COORDINATOR_KEY.signed(Tag.LEASE, vast.SerializeToString())
    lease, begin, end = whole(mine[0])
    torn = common_pb2.Signed(payload=b"\xff\xff")

    def listed(*ranges: tuple[common_pb2.Signed, int, int]) -> bytes:
        return world.contributions([world.contribution(0, ranges)])

    for contributions, reason in (
        (b"\xff\xff\xff", "cannot be read"),
        (listed((torn, begin, end)), "cannot be read"),
        (listed(), "no tokens"),
        (listed((forged, begin, end)), "not signed by this coordinator"),
        (listed(whole(theirs)), "not for this peer"),
        (listed((lease, begin, end + 1)), "not inside lease"),
        (listed((lease, end, begin)), "not inside lease"),
        (listed(whole(vast_signed)), "are allowed"),
        (listed(whole(mine[0]), whole(mine[0])), "repeats"),
        (world.contributions([world.contribution(0, [whole(mine[0])])] * 2), "listed twice"),
    ):
        value = world.value(contributions, content=reason.encode())
        response = world.submit(world.votes(value, [0]), contributions)
        assert response.certificate is None and reason in response.reason
        with world.store.read() as tx:
            assert tx.acceptor(RUN_ID, 1, 1) is None and tx.certificate(RUN_ID, 1, 1) is None
    proper = listed(*map(whole, mine))
    response = world.submit(world.votes(world.value(proper), [0]), proper)
    assert response.certificate is not None, response.reason
    with world.store.read() as tx:
        assert tx.acceptor(RUN_ID, 1, 1).vote_value == response.certificate.value
    assert world.verify().violations == ()


def test_the_half_is_not_given_against_a_quorums_attestations() -> None:
    world = World.create(num_peers=2)
    contributions = world.one_range()
    value = world.value(contributions)
    with world.store.write() as tx:
        for key in world.keys:
            tx.put_attestation(AttestationRow(RUN_ID, 1, 0, key.peer_id, bytes(32), b"", b"", 0))
    response = world.submit(world.votes(value, [0]), contributions)
    assert response.certificate is None and "is proved" in response.reason
    both = world.submit(world.votes(value, [0, 1]), contributions)
    assert both.certificate is not None, "members alone are proof"


def test_only_voters_ask_and_attempts_are_not_used_up() -> None:
    world = World.create(num_peers=2)
    stranger = world.exchange(outer_step=1, attempt=1, peer_id=PEER_KEYS[7].peer_id)
    assert not stranger.is_promised and "no vote in roster" in stranger.reason
    far = world.exchange(outer_step=1, attempt=2**32 - 1)
    assert not far.is_promised and "too far ahead" in far.reason
    assert world.exchange(outer_step=1, attempt=3).is_promised
    most = 3 + acceptor.MAX_ATTEMPTS_AHEAD
    assert not world.exchange(outer_step=1, attempt=most + 1).is_promised
    assert world.exchange(outer_step=1, attempt=most).is_promised


def test_a_proven_range_under_another_peers_lease_is_not_credited() -> None:
    world = World.create(num_peers=3)
    theirs = world.acquire(1).leases[0]
    (receipt,) = world.report(world.commit([world.contribution(0, [whole(theirs)])]))
    assert receipt.is_stored and receipt.credited_tokens == 0 and receipt.uncredited_tokens > 0
    assert "not in the book" in receipt.reason
    assert world.verify().violations == ()


def test_members_alone_need_no_half() -> None:
    world = World.create(num_peers=3)
    contributions = world.contributions([])
    value = world.value(contributions)
    response = world.submit(world.votes(value, [0, 1]), contributions)
    assert [vote.voter for vote in response.certificate.votes] == sorted(
        world.keys[index].peer_id for index in (0, 1)
    )
    with world.store.read() as tx:
        assert tx.acceptor(RUN_ID, 1, 1) is None


def test_votes_that_do_not_fit_are_refused_with_the_reason() -> None:
    world = World.create(num_peers=4)
    contributions = world.contributions([])
    value = world.value(contributions)
    early = world.value(contributions, outer_step=2)
    assert "missing" in world.submit(world.votes(early, [0, 1]), contributions).reason
    assert "digest" in world.submit(world.votes(value, [0, 1]), contributions + b"\x0a\x00").reason
    mixed = [*world.votes(value, [0]), *world.votes(value, [1], attempt=1)]
    assert "differ" in world.submit(mixed, contributions).reason
    assert "no votes" in world.submit([], contributions).reason
    forged = world.votes(value, [0, 1])
    forged[1].signature = bytes(64)
    assert "not counted" in world.submit(forged, contributions).reason
    own = world.context.signing_key.vote(value, 0, COORDINATOR_VOTER)
    assert world.submit([*world.votes(value, [0]), own], contributions).certificate is None


def test_two_proven_values_are_shown_as_equivocation() -> None:
    world = World.create(num_peers=3)
    contributions = world.contributions([])
    certificates = [
        certificate_from_votes(world.votes(value, [0, 1, 2]), contributions)
        for value in (world.value(contributions), world.value(contributions, content=b"other"))
    ]
    assert world.report(certificates[0])[0].is_stored
    for _ in range(2):
        receipt = world.report(certificates[1])[0]
        assert not receipt.is_stored and "two certificates" in receipt.reason
    with world.store.read() as tx:
        kinds = [event.kind for event in tx.events(RUN_ID)]
    assert kinds.count("equivocation") == 1
    assert any("two certificates" in text for text in world.verify().violations)


def test_one_value_is_decided_in_random_ballots() -> None:
    run_state_machine_as_test(AcceptorMachine, settings=SETTINGS)


def signs_early(state, *, attempt, value, voters, half_votes):
    """decide_vote without the rule that the coordinator signs last."""
    if attempt < state.promised_attempt or not voters:
        return real_decide_vote(
            state, attempt=attempt, value=value, voters=voters, half_votes=half_votes
        )
    voted = acceptor.AcceptorState(promised_attempt=attempt, vote_attempt=attempt, vote_value=value)
    return acceptor.VoteDecision(state=voted, is_certificate=True, signs=True, reason="")


def forgets_promise(state, *, attempt, value, voters, half_votes):
    """decide_vote without the durable promise."""
    return real_decide_vote(
        acceptor.AcceptorState(), attempt=attempt, value=value, voters=voters, half_votes=half_votes
    )


real_decide_vote = acceptor.decide_vote


@pytest.mark.parametrize("weakened", [signs_early, forgets_promise])
def test_without_a_rule_a_violation_is_found(weakened, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceptor, "decide_vote", weakened)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(
            AcceptorMachine,
            settings=settings(SETTINGS, phases=[Phase.generate], max_examples=2000),
        )
