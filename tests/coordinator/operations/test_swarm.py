"""The life of a run told as short stories with virtual time: start, joiners, losses, rollbacks,
recovery, pause, end.
"""

from dataclasses import replace

import pytest

from coordinator.domain.policy import SwarmPolicy
from coordinator.operations import admin, ledger_verify, membership, states
from coordinator.operations.common import BeginRecovery, begin_recovery
from coordinator.operations.requests import Claims, HeartbeatRequest, PeerExitedRequest
from coordinator.operations.requests_admin import EvictPeerRequest, RunRequest
from coordinator.operations.requests_ledger import VerifyLedgerRequest
from protos.contract.certificate import Tag
from protos.contract.errors import ErrorCode, MusterError
from protos.contract.signing import has_valid_signature
from protos.contract.telemetry import RunState
from protos.muster.v1 import common_pb2
from tests.coordinator.operations.swarm_world import (
    RUN_ID,
    SEQ_LEN,
    SwarmWorld,
    digest_of,
)

PATIENT = SwarmPolicy(checkpoint_interval_seconds=1e6)


def exited(world: SwarmWorld, *indices: int) -> None:
    for index in indices:
        request = PeerExitedRequest(peer_id=world.id_of(index), reason="killed")
        world.do(membership.peer_exited, request)
        world.peers = [peer for peer in world.peers if peer.index != index]


def assert_books_are_right(world: SwarmWorld) -> None:
    found = world.do(ledger_verify.verify_ledger, VerifyLedgerRequest(run_id=RUN_ID))
    assert found.violations == ()


def test_a_run_starts_when_enough_peers_attest_the_initial_state() -> None:
    world = SwarmWorld.create(min_peers=2)
    assert world.tick(1.0) == ()
    world.join(0)
    world.attest(0)
    world.tick(1.0)
    assert world.status().state == RunState.WAITING_FOR_PEERS
    assert "1 of at least 2" in world.status().state_reason
    assert not world.acquire(0)
    world.join(1)
    world.attest(1)
    world.tick(1.0)
    assert world.status().state == RunState.RUNNING
    assert world.voters() == [0, 1]
    reply = world.beat(0)
    assert reply.incarnation_record is not None and reply.directive is not None
    record = common_pb2.IncarnationRecord.FromString(reply.incarnation_record.payload)
    assert (record.incarnation, record.base_incarnation) == (1, 0)
    assert record.base_state_digest == digest_of(0, 0)
    assert record.directive == reply.directive
    key = world.context.signing_key.public_key
    assert has_valid_signature(
        key, Tag.DIRECTIVE, reply.directive.payload, reply.directive.signature
    )
    signed = reply.incarnation_record
    assert has_valid_signature(key, Tag.INCARNATION, signed.payload, signed.signature)
    directive = common_pb2.Directive.FromString(reply.directive.payload)
    assert [entry.round_tokens for entry in directive.roster] == [4 * SEQ_LEN] * 2
    assert directive.cooldown_start_tokens == round(0.8 * world.status().budget_tokens)
    assert world.acquire(0)
    reply = world.beat(0)
    assert reply.incarnation_record is None and reply.directive is None


def test_a_run_starts_with_fewer_after_the_grace() -> None:
    world = SwarmWorld.create(min_peers=3)
    world.join(0)
    world.attest(0)
    world.tick(59.0)
    world.beat(0)
    assert world.status().incarnation == 0
    world.tick(1.0)
    assert world.status().incarnation == 1 and world.voters() == [0]


def test_a_joiner_gets_tokens_and_a_vote_after_it_attests() -> None:
    world = SwarmWorld.create(policy=PATIENT)
    world.start(2)
    world.commit()
    world.join(2)
    world.tick(2.0)
    assert len(world.directive().roster) == 3 and world.voters() == [0, 1]
    world.beat(2)
    assert not world.acquire(2)
    world.peer(2).outer_step = 1
    world.attest(2)
    assert world.row(2).state == "SYNCED"
    world.tick(2.0)
    assert world.voters() == [0, 1, 2] and world.row(2).state == "VOTER"
    assert sum(entry.round_tokens for entry in world.directive().roster) == 8 * SEQ_LEN
    world.commit([0, 1])
    assert world.acquire(2)


def test_a_joiner_waits_for_no_tick() -> None:
    """The answers to Join and to its attestation bring the rosters with it."""
    world = SwarmWorld.create(policy=PATIENT)
    world.start(1)
    world.commit()
    world.now += 2.0
    first = common_pb2.Directive.FromString(world.join(1).directive.payload)
    assert [entry.peer_id in (world.id_of(0), world.id_of(1)) for entry in first.roster] == [
        True
    ] * 2
    tokens_by_peer = {entry.peer_id: entry.round_tokens for entry in first.roster}
    assert tokens_by_peer == {world.id_of(0): 8 * SEQ_LEN, world.id_of(1): 0}
    world.beat(1)
    world.now += 2.0
    world.peer(1).outer_step = 1
    world.attest(1)
    reply = world.peer(1).reply
    assert reply is not None and reply.directive is not None
    second = common_pb2.Directive.FromString(reply.directive.payload)
    assert second.directive_number == first.directive_number + 1
    assert [entry.has_vote for entry in second.roster] == [True, True]
    assert [entry.round_tokens for entry in second.roster] == [4 * SEQ_LEN] * 2
    assert world.row(1).state == "VOTER" and world.voters() == [0, 1]
    assert world.tick(0.0) == ()


def test_a_crowd_is_admitted_together_by_the_tick() -> None:
    world = SwarmWorld.create(policy=PATIENT)
    world.start(1)
    world.now += 2.0
    for index in range(1, 5):
        world.join(index)
    assert len(world.directive().roster) == 2
    world.tick(1.0)
    assert len(world.directive().roster) == 2
    world.tick(1.0)
    assert len(world.directive().roster) == 5


def test_the_report_of_a_step_brings_a_directive_that_it_does_not_name() -> None:
    """A member that trains hears of a joiner with its next step, not with its next heartbeat."""
    world = SwarmWorld.create(policy=PATIENT)
    world.start(1)
    world.commit()
    assert world.report is not None and world.report.directive is None
    named = world.directive().directive_number
    world.now += 2.0
    world.join(1)
    world.commit([0], next_directive_number=named)
    assert world.report.directive is not None
    brought = common_pb2.Directive.FromString(world.report.directive.payload)
    assert brought == world.directive() and len(brought.roster) == 2
    world.commit([0])
    assert world.report.directive is None


def test_a_silent_peer_is_lost_and_may_come_back() -> None:
    world = SwarmWorld.create(policy=PATIENT)
    world.start(3)
    world.acquire(2)
    for _ in range(6):
        world.now += 10.0
        world.attest(0, 1)
        world.tick()
    assert world.row(2).state == "LOST" and "no heartbeat" in world.row(2).state_reason
    assert world.voters() == [0, 1]
    assert world.num_active_leases(2) == 0
    assert world.status().state == RunState.RUNNING and world.status().incarnation == 1
    world.beat(2)
    assert world.row(2).state == "JOINED"
    world.attest(2)
    world.tick(2.0)
    assert world.voters() == [0, 1, 2]
    assert_books_are_right(world)


def test_a_seen_exit_changes_the_roster_at_once() -> None:
    world = SwarmWorld.create(policy=PATIENT)
    world.start(3)
    world.acquire(2)
    exited(world, 2)
    assert world.num_active_leases(2) == 0
    world.tick()
    assert world.voters() == [0, 1]
    with pytest.raises(MusterError) as caught:
        world.do(
            membership.heartbeat,
            HeartbeatRequest(run_id=RUN_ID, peer_id=world.id_of(2), claims=Claims()),
        )
    assert caught.value.code is ErrorCode.SESSION_INVALID


def test_lost_quorum_begins_an_incarnation_at_the_survivors_state() -> None:
    world = SwarmWorld.create(policy=PATIENT)
    world.start(3)
    world.commit()
    world.commit()
    world.attest()
    exited(world, 1, 2)
    world.tick()
    status = world.status()
    assert (status.incarnation, status.outer_step, status.rolled_back_tokens) == (2, 2, 0)
    assert world.voters() == [0]
    reply = world.beat(0)
    assert reply.incarnation_record is not None
    record = common_pb2.IncarnationRecord.FromString(reply.incarnation_record.payload)
    assert record.base_state_digest == digest_of(1, 2), "one survivor's word, now signed: a proof"
    world.attest(0)
    world.commit()
    assert world.status().outer_step == 3
    world.join(3)  # a newcomer takes the survivor's state, attests it, and has a vote
    world.beat(3)
    world.peer(3).outer_step = 3
    world.attest(0, 3)
    world.tick(2.0)
    assert world.voters() == [0, 3] and world.status().state == RunState.RUNNING
    assert_books_are_right(world)


def test_silent_quorum_is_waited_for_and_the_run_is_stalled_meanwhile() -> None:
    policy = replace(PATIENT, peer_ttl_seconds=20.0)
    world = SwarmWorld.create(policy=policy)
    world.start(3)
    world.commit()
    for _ in range(3):
        world.now += 10.0
        world.attest(0)
        world.tick()
    assert world.status().state == RunState.STALLED and "no quorum" in world.status().state_reason
    assert world.status().incarnation == 1
    for _ in range(3):
        world.now += 10.0
        world.attest(0)
        world.tick()
    assert world.status().incarnation == 2 and world.status().state == RunState.RUNNING


def test_when_all_die_the_run_goes_back_to_what_comes_back() -> None:
    world = SwarmWorld.create(policy=PATIENT)
    world.start(3)
    for _ in range(3):
        world.commit()
        world.attest()
    credited_tokens = world.status().credited_tokens
    exited(world, 0, 1, 2)
    world.tick(1.0)
    assert world.status().state == RunState.STALLED
    assert "no live peer" in world.status().state_reason
    world.now += 100.0
    world.join(0)
    world.join(1)
    for index, outer_step in ((0, 2), (1, 1)):
        peer = world.peer(index)
        peer.incarnation, peer.outer_step = 1, outer_step
        world.attest(index)
    world.tick(1.0)
    status = world.status()
    assert (status.incarnation, status.outer_step) == (2, 2)
    assert status.rolled_back_tokens == credited_tokens // 3
    assert status.credited_tokens == credited_tokens - status.rolled_back_tokens
    assert "goes back 1 steps to outer step 2" in " ".join(_events(world))
    assert world.voters() == [0]
    world.notice()
    world.attest(0)
    world.commit([0])
    assert_books_are_right(world)


def test_voters_that_live_but_lost_the_state_do_not_hold_the_last_holder_up() -> None:
    """Two of three lose it at once, before they could attest it: alone, the third proves nothing to
    them and has no quorum, until an incarnation begins from what it holds.
    """
    world = SwarmWorld.create()
    world.start(3)
    for _ in range(3):
        world.commit()
    world.attest(0)
    for index in (1, 2):
        world.join(index)
        world.peer(index).outer_step, world.peer(index).incarnation = 1, 1
        world.attest(index)
    for _ in range(20):
        world.tick(5.0)
        for index in range(3):
            world.beat(index)
        if world.status().incarnation == 2:
            break
    status = world.status()
    assert (status.incarnation, status.outer_step, status.rolled_back_tokens) == (2, 3, 0)
    assert "1 of 3 voters hold the state of outer step 3" in " ".join(_events(world))
    assert world.voters() == [0]
    world.notice()
    world.attest()  # the record proves the state: the others take it from its holder
    world.tick(3.0)
    world.notice()
    assert world.voters() == [0, 1, 2]
    world.commit([0])  # hands over to the roster with three votes
    world.commit()
    assert_books_are_right(world)


def _events(world: SwarmWorld) -> list[str]:
    with world.store.read() as tx:
        return [row.text for row in tx.newest_events(RUN_ID, num_events=1000)]


def test_evicting_the_majority_begins_an_incarnation_without_it() -> None:
    world = SwarmWorld.create(policy=PATIENT)
    world.start(3)
    world.commit()
    world.attest()
    for index in (1, 2):
        world.do(admin.evict_peer, EvictPeerRequest(peer_id=world.id_of(index)))
    world.tick()
    assert world.status().incarnation == 2 and world.voters() == [0]


def test_a_peer_is_evicted_by_its_name_if_that_is_unmistakable() -> None:
    world = SwarmWorld.create(policy=PATIENT)
    world.join(0, name="anna")
    world.join(1, name="ben")
    world.join(2, name="ben")
    for wanted in ("ben", "nobody", ""):
        with pytest.raises(MusterError) as refused:
            world.do(admin.evict_peer, EvictPeerRequest(peer_id=wanted, reason="test"))
        assert refused.value.allowed and refused.value.remedy
    found = world.do(admin.evict_peer, EvictPeerRequest(peer_id="anna", reason="test"))
    assert found.peer_id == world.id_of(0) and world.row(0).state == "EVICTED"


def test_recovering_loses_nobody_and_expires_nothing() -> None:
    world = SwarmWorld.create(policy=PATIENT)
    world.start(2)
    world.attest()
    world.acquire(0)
    world.acquire(1)
    world.now += 500.0
    world.do(begin_recovery, BeginRecovery(seconds=30.0))
    world.tick(1.0)
    status = world.status()
    assert status.coordinator_state == "RECOVERING" and status.num_live_peers == 2
    assert world.num_active_leases(0) and world.num_active_leases(1)
    assert status.state == RunState.RUNNING and status.incarnation == 1
    world.beat(0, lease_numbers=tuple(range(1, 9)))
    world.tick(30.0)
    assert world.status().coordinator_state == "SERVING"
    assert world.row(0).state == "VOTER" and world.row(1).state == "LOST"
    assert world.num_active_leases(0) and not world.num_active_leases(1)


def test_heartbeats_bring_certificates_to_members_behind() -> None:
    world = SwarmWorld.create(policy=replace(PATIENT, num_reply_certificates=2))
    world.start(3)
    for _ in range(3):
        world.commit([0, 1])
    assert world.beat(0).certificates == ()
    assert len(world.beat(2).certificates) == 2
    world.peer(2).outer_step = 2
    assert len(world.beat(2).certificates) == 1
    assert world.beat(2).outer_step == 3


def test_claims_that_cannot_be_true_are_shown_and_cost_nothing() -> None:
    world = SwarmWorld.create()
    world.start(1)
    world.peer(0).tokens_per_second = float("nan")
    world.beat(0)
    assert "claims refused: tokens_per_second = nan" in world.row(0).claims_json
    assert world.row(0).state == "VOTER"


def test_speeds_shift_round_budgets() -> None:
    world = SwarmWorld.create(policy=PATIENT)
    world.start(2)
    world.peer(0).tokens_per_second = 300.0
    world.notice()
    world.tick(11.0)
    by_peer = {entry.peer_id: entry.round_tokens for entry in world.directive().roster}
    assert by_peer == {world.id_of(0): 6 * SEQ_LEN, world.id_of(1): 2 * SEQ_LEN}


def test_pause_resume_and_stop() -> None:
    world = SwarmWorld.create(policy=PATIENT)
    world.start(2)
    assert world.do(admin.pause_run, RunRequest(reason="heat")).state == RunState.PAUSED
    world.tick()
    assert world.directive().is_paused and world.status().state_reason == "paused: heat"
    assert world.beat(0).run_state == RunState.PAUSED and not world.acquire(0)
    world.do(admin.resume_run, RunRequest())
    world.tick()
    assert not world.directive().is_paused and world.status().state == RunState.RUNNING
    world.do(admin.stop_run, RunRequest())
    world.tick(1.0)
    assert world.status().state == RunState.STOPPED
    assert world.beat(0).is_run_over
    with pytest.raises(MusterError, match="STOPPED"):
        world.do(admin.resume_run, RunRequest())


def test_unequal_states_are_seen_and_the_wrong_one_resynchronises() -> None:
    world = SwarmWorld.create(policy=PATIENT)
    world.start(3)
    world.commit()
    world.attest(0, 1)
    assert world.status().state_digests_equal
    world.beat(2, world.peer(2).attestation(1, 1, b"z" * 32))
    assert not world.status().state_digests_equal
    assert world.row(2).state == "JOINED" and "resynchronise" in world.row(2).state_reason


def test_unequal_states_are_seen_when_the_certificate_comes_later() -> None:
    world = SwarmWorld.create(policy=PATIENT)
    world.start(2)
    world.beat(1, world.peer(1).attestation(1, 0, b"z" * 32))
    world.tick(1.0)
    assert world.status().state_digests_equal
    world.commit()
    world.tick(1.0)
    assert not world.status().state_digests_equal


def test_attestations_ahead_of_the_certificates_are_bounded() -> None:
    world = SwarmWorld.create()
    world.start(1)
    peer, before = world.peer(0), world.status().num_attestations
    for step in (states.MAX_STEPS_AHEAD + 1, 10**9, 2**63, 2**64 - 1):
        world.beat(0, peer.attestation(peer.incarnation, step))
    assert world.status().num_attestations == before
    world.beat(0, *[peer.attestation(peer.incarnation, step) for step in range(100, 300)])
    assert world.status().num_attestations == before + states.MAX_ATTESTATIONS_AHEAD
    with world.store.read() as tx:
        assert tx.attestations(RUN_ID, peer.incarnation, 299)
        assert not tx.attestations(RUN_ID, peer.incarnation, 100)
