"""Members' states and reasons, transition by transition."""

import math
from dataclasses import replace

import pytest

from coordinator.domain.membership import (
    MAX_STEPS_BEHIND,
    Member,
    after_attestation,
    after_directive,
    after_end,
    after_heartbeat,
    after_incarnation,
    after_join,
    after_refused_attestation,
    after_silence,
    after_state_loss,
    claim_problem,
    missing_capability,
)
from protos.contract.telemetry import PeerState

DIGEST = b"d" * 32


def joined() -> Member:
    return after_join(None, peer_id="a", now_unix_seconds=100.0)


def voter() -> Member:
    member = after_attestation(
        joined(),
        incarnation=1,
        outer_step=5,
        state_digest=DIGEST,
        current_incarnation=1,
        certified_outer_step=5,
    )
    return after_directive(member, has_vote=True, directive_number=3)


def test_join_attest_vote() -> None:
    member = joined()
    assert member.state is PeerState.JOINED and not member.has_vote
    member = after_attestation(
        member,
        incarnation=1,
        outer_step=5,
        state_digest=DIGEST,
        current_incarnation=1,
        certified_outer_step=5,
    )
    assert member.state is PeerState.SYNCED and "outer step 5" in member.state_reason
    member = after_directive(member, has_vote=True, directive_number=3)
    assert member.state is PeerState.VOTER and "directive 3" in member.state_reason


def test_an_attestation_of_an_older_incarnation_is_kept_but_gives_no_rights() -> None:
    member = after_attestation(
        joined(),
        incarnation=0,
        outer_step=0,
        state_digest=DIGEST,
        current_incarnation=1,
        certified_outer_step=5,
    )
    assert member.state is PeerState.JOINED and member.attested_incarnation == 0


def test_silence_is_lost_and_a_word_brings_back_without_state() -> None:
    assert after_silence(voter(), now_unix_seconds=159.0, ttl_seconds=60.0).is_live
    member = after_silence(voter(), now_unix_seconds=160.0, ttl_seconds=60.0)
    assert member.state is PeerState.LOST and not member.is_gone_for_sure
    assert "60 s" in member.state_reason
    assert after_silence(member, now_unix_seconds=999.0, ttl_seconds=60.0) is member
    member = after_heartbeat(member, now_unix_seconds=170.0)
    assert member.state is PeerState.JOINED and member.attested_incarnation == -1
    assert member.last_heartbeat_unix_seconds == 170.0


def test_a_lost_state_is_as_a_join_that_keeps_the_vote() -> None:
    """Nobody goes back to a state that its only holder no longer has."""
    member = after_state_loss(voter(), now_unix_seconds=150.0)
    assert member.state is PeerState.JOINED and member.has_vote
    assert not member.has_attested(1) and member.join_unix_seconds == 150.0
    assert "ended" in member.state_reason
    gone = after_end(voter(), state=PeerState.LEFT, reason="left")
    assert after_state_loss(gone, now_unix_seconds=150.0) == gone


def test_a_restart_keeps_the_vote_until_it_attests() -> None:
    member = after_join(voter(), peer_id="a", now_unix_seconds=200.0)
    assert member.state is PeerState.JOINED and member.has_vote
    member = after_attestation(
        member,
        incarnation=1,
        outer_step=4,
        state_digest=DIGEST,
        current_incarnation=1,
        certified_outer_step=5,
    )
    assert member.state is PeerState.VOTER


@pytest.mark.parametrize(
    ("outer_step", "has_vote", "state"),
    [
        (100 - MAX_STEPS_BEHIND, False, PeerState.SYNCED),
        (99 - MAX_STEPS_BEHIND, False, PeerState.JOINED),
        (0, False, PeerState.JOINED),
        (0, True, PeerState.VOTER),
    ],
)
def test_a_joiner_has_no_part_before_it_is_as_far_as_the_others(
    outer_step: int, has_vote: bool, state: PeerState
) -> None:
    """One that still catches up would be waited for; who has a vote already is."""
    member = after_attestation(
        replace(joined(), has_vote=has_vote),
        incarnation=1,
        outer_step=outer_step,
        state_digest=DIGEST,
        current_incarnation=1,
        certified_outer_step=100,
    )
    assert member.state is state
    assert member.attested_outer_step == outer_step
    assert ("catches up" in member.state_reason) == (state is PeerState.JOINED)


@pytest.mark.parametrize("state", [PeerState.LEFT, PeerState.EVICTED, PeerState.LOST])
def test_a_certain_end_takes_the_vote_with_a_later_join(state: PeerState) -> None:
    member = after_end(voter(), state=state, reason="why")
    assert member.is_gone_for_sure and not member.is_live and member.state_reason == "why"
    assert not after_join(member, peer_id="a", now_unix_seconds=300.0).has_vote


def test_a_wrong_state_sends_back_to_joined() -> None:
    member = after_refused_attestation(voter(), reason="other digest")
    assert member.state is PeerState.JOINED and member.state_reason == "other digest"
    assert not member.attested_digest and member.has_vote


def test_a_new_incarnation_makes_voters_of_those_with_a_vote_only() -> None:
    assert after_incarnation(voter(), incarnation=2, has_vote=True).state is PeerState.VOTER
    other = after_incarnation(voter(), incarnation=2, has_vote=False)
    assert other.state is PeerState.JOINED and not other.has_vote


@pytest.mark.parametrize(
    ("numbers", "problem"),
    [
        ({"loss_nats": 2.0, "clock_offset_seconds": -0.5}, ""),
        ({"loss_nats": math.nan}, "loss_nats = nan"),
        ({"tokens_per_second": -1.0}, "numbers from 0"),
        ({"trained_tokens": 1e30}, "finite numbers up to"),
    ],
)
def test_claims_that_cannot_be_true(numbers: dict[str, float], problem: str) -> None:
    found = claim_problem(numbers)
    assert problem in found and bool(problem) == bool(found)


def test_a_missing_capability_is_named_with_what_is_offered() -> None:
    needs = (("codec", "fp32", ["fp32"]), ("strategy", "sync", ["diloco"]))
    assert missing_capability(needs=needs) == "strategy 'sync' is needed, this peer offers diloco"
    assert missing_capability(needs=needs[:1]) == ""
