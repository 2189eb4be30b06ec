"""Duties over the store: evaluation, checkpoints, fences, and the end of a run that waits for
both.
"""

from dataclasses import replace
from typing import Any

from coordinator.domain.duties import MAX_DUTY_ATTEMPTS
from coordinator.domain.policy import SwarmPolicy
from coordinator.operations import duties, membership, status
from coordinator.operations.requests import (
    BeginUploadRequest,
    FindCheckpointRequest,
    FinishUploadRequest,
    PeerExitedRequest,
    ReportDutyRequest,
)
from coordinator.operations.requests_admin import EventsRequest, PeersRequest, SeriesRequest
from protos.contract.telemetry import RunState
from tests.coordinator.operations.swarm_world import RUN_ID, SwarmWorld, digest_of

POLICY = SwarmPolicy(checkpoint_interval_seconds=20.0)


def begin(world: SwarmWorld, index: int, *, digest: bytes | None = None, step: int = -1) -> Any:
    peer = world.peer(index)
    assert peer.reply is not None and peer.reply.duty is not None
    outer_step = peer.outer_step if step < 0 else step
    request = BeginUploadRequest(
        run_id=RUN_ID,
        peer_id=peer.peer_id,
        duty_id=peer.reply.duty.duty_id,
        fence=peer.reply.duty.fence,
        attestation=peer.attestation(peer.incarnation, outer_step, digest),
        total_bytes=1000,
    )
    return world.do(duties.begin_upload, request)


def finish(world: SwarmWorld, index: int, begun: Any) -> Any:
    peer = world.peer(index)
    assert peer.reply is not None and peer.reply.duty is not None
    request = FinishUploadRequest(
        run_id=RUN_ID,
        peer_id=peer.peer_id,
        duty_id=peer.reply.duty.duty_id,
        fence=peer.reply.duty.fence,
        incarnation=begun.incarnation,
        outer_step=begun.outer_step,
        state_digest=begun.state_digest,
        path=begun.path,
        total_bytes=1000,
    )
    return world.do(duties.finish_upload, request)


def started(num_peers: int = 2, **changes: Any) -> SwarmWorld:
    world = SwarmWorld.create(policy=replace(POLICY, **changes))
    world.start(num_peers)
    world.attest()
    return world


def checkpoint(world: SwarmWorld) -> Any:
    with world.store.read() as tx:
        return duties.find_checkpoint(
            tx, FindCheckpointRequest(), context=world.context, now_unix_seconds=world.now
        ).checkpoint


def test_the_first_state_is_evaluated_by_one_member() -> None:
    world = started()
    holders = [peer for peer in world.peers if peer.reply and peer.reply.duty]
    assert len(holders) == 1
    assert world.beat(holders[0].index).duty == holders[0].reply.duty
    report = world.finish_evaluation(holders[0].index, loss_nats=3.5)
    assert report.is_accepted
    assert world.finish_evaluation(holders[0].index).reason == "accepted before"
    evaluation = world.status().first_evaluation
    assert evaluation is not None and evaluation.loss_nats == 3.5
    assert evaluation.bits_per_byte > 0


def test_a_lost_holder_is_replaced_and_its_late_result_refused() -> None:
    world = started()
    first, second = (0, 1) if world.peer(0).reply.duty else (1, 0)
    lost = world.peer(first)
    world.do(membership.peer_exited, PeerExitedRequest(peer_id=lost.peer_id, reason="killed"))
    world.tick(1.0)
    duty = world.beat(second).duty
    assert duty is not None and duty.fence == 2
    assert not world.finish_evaluation(first).is_accepted
    assert world.finish_evaluation(second).is_accepted


def test_slow_work_is_kept_by_heartbeats_and_handed_on_without_them() -> None:
    world = started(peer_ttl_seconds=600.0, checkpoint_interval_seconds=1e6)
    first, second = (0, 1) if world.peer(0).reply.duty else (1, 0)
    duty = world.peer(first).reply.duty
    for _ in range(5):  # more than twice the TTL of 120 s
        world.tick(55.0)
        assert world.beat(second).duty is None
        assert world.beat(first, works_on=(duty.duty_id, duty.fence)).duty == duty
    for _ in range(2):
        world.tick(55.0)
        assert world.beat(first).duty == duty, "alive, but it does not say that it works"
    assert any("has not said for 125 s" in change for change in world.tick(15.0))
    taken = world.beat(second).duty
    assert taken is not None and (taken.duty_id, taken.fence) == (duty.duty_id, 2)
    assert not world.finish_evaluation(first).is_accepted
    assert world.beat(first, works_on=(duty.duty_id, duty.fence)).duty is None
    assert world.finish_evaluation(second).is_accepted


def test_a_failure_is_handed_on() -> None:
    world = started(num_peers=1)
    duty = world.peer(0).reply.duty
    request = ReportDutyRequest(
        run_id=RUN_ID,
        peer_id=world.id_of(0),
        duty_id=duty.duty_id,
        fence=duty.fence,
        failure_reason="out of memory",
    )
    assert world.do(duties.report_duty, request).is_accepted
    assert not world.do(duties.report_duty, request).is_accepted
    assert world.beat(0).duty.fence == 2


def test_an_evaluation_of_another_state_is_refused() -> None:
    world = started(num_peers=1)
    world.peer(0).incarnation = 9
    assert "not on the chain" in world.finish_evaluation(0).reason


def finish_first_evaluation(world: SwarmWorld) -> None:
    index = next(peer.index for peer in world.peers if peer.reply and peer.reply.duty)
    assert world.finish_evaluation(index).is_accepted


def test_checkpoints_are_asked_for_stored_and_used_once_proved() -> None:
    world = started(num_peers=3)
    finish_first_evaluation(world)
    world.commit()
    world.tick(20.0)
    duty = world.beat(0, world.peer(0).attestation(1, 1)).duty
    assert duty is not None and duty.kind == "CHECKPOINT" and duty.min_outer_step == 1
    assert "at least 1" in begin(world, 0, step=0).reason
    begun = begin(world, 0)
    assert begun.is_accepted and begun.state_digest == digest_of(1, 1)
    assert begun.path == f"checkpoints/{RUN_ID}/1-1.safetensors"
    assert finish(world, 0, begun).is_accepted
    assert finish(world, 0, begun).reason == "accepted before"
    assert checkpoint(world) is None, "one of three attests it"
    world.attest(1)
    assert checkpoint(world).outer_step == 1


def test_an_upload_of_another_state_than_the_proved_one_is_refused() -> None:
    world = started(num_peers=2)
    finish_first_evaluation(world)
    world.commit()
    world.tick(20.0)
    world.attest(0)
    world.attest(1)
    index = 0 if world.peer(0).reply.duty else 1
    assert "not the proved" in begin(world, index, digest=b"z" * 32).reason
    with world.store.read() as tx:
        assert not tx.checkpoints(RUN_ID)


def test_three_checkpoints_are_kept() -> None:
    world = started(num_peers=1, num_evaluations=1)
    finish_first_evaluation(world)
    removed: list[str] = []
    for _ in range(5):
        world.commit(num_windows=1)
        world.tick(20.0)
        world.attest(0)
        removed += finish(world, 0, begin(world, 0)).remove_paths
    assert [path[-len("1.safetensors") :] for path in removed] == ["1.safetensors", "2.safetensors"]
    with world.store.read() as tx:
        assert [row.outer_step for row in tx.checkpoints(RUN_ID)] == [5, 4, 3]


def test_the_last_holder_of_a_state_gives_it_away_before_it_leaves() -> None:
    world = started(num_peers=2, checkpoint_interval_seconds=1e6)
    finish_first_evaluation(world)
    world.commit()
    world.attest()
    assert world.beat(0, state="DRAINING").duty is None, "the other one stays with the same state"
    world.leave(0)
    duty = world.beat(1, state="DRAINING").duty
    assert duty is not None and duty.kind == "CHECKPOINT" and duty.min_outer_step == 1
    again = world.beat(1, state="DRAINING").duty
    assert again == duty, "asked again, as after a lost answer"
    works_on = (duty.duty_id, duty.fence)
    assert world.beat(1, state="DRAINING", works_on=works_on).duty == duty
    assert finish(world, 1, begin(world, 1)).is_accepted
    assert world.beat(1, state="DRAINING").duty is None, "it is there"
    world.leave(1)
    assert checkpoint(world).outer_step == 1
    world.join(2)
    world.tick(1.0)
    world.tick(15.0)
    assert world.directive().incarnation == 2
    assert world.beat(2).incarnation_record is not None
    assert world.peer(2).outer_step == 1, "nothing is rolled back"


def test_the_fence_of_a_parting_duty_rises_until_it_is_given_up() -> None:
    world = started(num_peers=1, checkpoint_interval_seconds=1e6)
    finish_first_evaluation(world)
    world.commit()
    world.attest()
    fences = []
    while (duty := world.beat(0, state="DRAINING").duty) is not None:
        fences.append(duty.fence)
        assert len(fences) <= MAX_DUTY_ATTEMPTS, fences
        for fence in range(1, duty.fence + 1):
            report = ReportDutyRequest(
                run_id=RUN_ID,
                peer_id=world.id_of(0),
                duty_id=duty.duty_id,
                fence=fence,
                failure_reason="the upload broke off",
            )
            assert world.do(duties.report_duty, report).is_accepted == (fence == duty.fence)
    assert fences == [*range(1, MAX_DUTY_ATTEMPTS + 1)]


def test_of_two_that_leave_at_once_the_second_gives_the_state_away() -> None:
    world = started(num_peers=2, checkpoint_interval_seconds=1e6)
    finish_first_evaluation(world)
    world.commit()
    world.attest()
    assert world.beat(0, state="DRAINING").duty is None
    assert world.beat(1, state="DRAINING").duty is not None


def test_what_one_that_leaves_is_giving_is_not_taken_from_it() -> None:
    world = started(num_peers=2, checkpoint_interval_seconds=1e6)
    finish_first_evaluation(world)
    world.commit()
    world.attest()
    assert world.beat(1, state="DRAINING").duty is None
    duty = world.beat(0, state="DRAINING").duty
    assert duty is not None and world.beat(1, state="DRAINING").duty is None
    assert world.beat(0, state="DRAINING", works_on=(duty.duty_id, duty.fence)).duty == duty
    assert finish(world, 0, begin(world, 0)).is_accepted


def test_who_leaves_without_the_newest_state_owes_nothing() -> None:
    world = started(num_peers=1, checkpoint_interval_seconds=1e6)
    assert world.finish_evaluation(0).is_accepted
    world.commit()
    assert world.beat(0, state="DRAINING").duty is None, "it has not attested step 1"
    world.attest(0)
    assert world.beat(0, state="DRAINING").duty is not None


def test_all_die_and_newcomers_go_on_from_the_checkpoint() -> None:
    world = started(num_peers=1)
    finish_first_evaluation(world)
    world.commit()
    world.tick(20.0)
    world.attest(0)
    assert finish(world, 0, begin(world, 0)).is_accepted
    world.commit()
    world.do(membership.peer_exited, PeerExitedRequest(peer_id=world.id_of(0), reason="killed"))
    world.peers.clear()
    world.tick(1.0)
    world.join(1)
    world.tick(1.0)
    assert "may still hold" in world.status().state_reason
    world.tick(15.0)
    found = world.status()
    assert (found.incarnation, found.outer_step) == (2, 1)
    assert found.rolled_back_tokens > 0 and world.voters() == [1]


def test_a_run_is_finished_after_the_final_duties_only() -> None:
    world = SwarmWorld.create(budget_windows=16, policy=POLICY)
    world.start(2)
    world.attest()
    finish_first_evaluation(world)
    while world.status().credited_tokens < world.status().budget_tokens:
        world.commit()
        world.tick(1.0)
    assert world.status().state == RunState.RUNNING and "final" in world.status().state_reason
    world.attest()
    assert not world.peer(0).reply.is_run_over
    for peer in world.peers:
        duty = peer.reply.duty
        assert duty is not None
        if duty.kind == "EVALUATE":
            assert world.finish_evaluation(peer.index, loss_nats=1.5).is_accepted
        else:
            assert finish(world, peer.index, begin(world, peer.index)).is_accepted
    world.tick(1.0)
    found = world.status()
    assert found.state == RunState.FINISHED, found.state_reason
    assert found.has_final_evaluation and found.has_final_checkpoint
    assert found.last_evaluation.loss_nats == 1.5 and found.eta_seconds == 0.0
    assert found.state_digests_equal and found.newest_checkpoint_path
    assert sum(found.credited_tokens_by_peer.values()) == found.budget_tokens
    assert world.beat(0).is_run_over
    world.tick(100.0)
    assert world.status().state == RunState.FINISHED and world.status().num_live_peers == 0


def test_readers_see_peers_events_and_curves() -> None:
    world = started(num_peers=2)
    world.commit()
    world.commit()

    def read(operation: Any, request: Any) -> Any:
        with world.store.read() as tx:
            return operation(tx, request, context=world.context, now_unix_seconds=world.now)

    peers = read(status.peers, PeersRequest()).peers
    assert [peer.name for peer in peers] == ["peer 0", "peer 1"]
    assert all(peer.is_live and peer.has_vote and peer.credited_tokens for peer in peers)
    events = read(status.events, EventsRequest()).events
    assert {"peer", "directive", "incarnation", "run"} <= {event.kind for event in events}
    later = read(status.events, EventsRequest(after_event_id=events[-2].event_id)).events
    assert later == events[-1:]
    series = read(status.series, SeriesRequest())
    assert [step.outer_step for step in series.steps] == [1, 2]
    assert series.steps[-1].credited_tokens == world.status().credited_tokens
    assert [p for p in status.decimate(range(100), max_points=4)] == [0, 33, 66, 99]
