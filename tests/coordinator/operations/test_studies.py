"""Studies over the store: fenced hand-outs, deaths, refusals, every trial counted once, stages."""

import hashlib
import json
import math
from dataclasses import replace
from typing import Any

import pytest

from coordinator.operations import admin, duties, membership, studies
from coordinator.operations.requests import (
    PeerExitedRequest,
    ReportDutyRequest,
    TrialPointResult,
    TrialResult,
)
from coordinator.operations.requests_admin import RunRequest
from coordinator.operations.requests_studies import CreateStudyRequest, StudyRequest, StudyStatus
from protos.contract.errors import RefusedError, UsageError
from protos.contract.model_shape import ModelShape
from protos.contract.run_spec import RunSpec
from tests.coordinator.operations.swarm_world import RUN_ID, SwarmWorld

SMALL = CreateStudyRequest(
    num_sizes=3, min_params=8e3, max_params=3e4, flop=1e10, seq_len=16, batch_tokens=64,
    warmup_steps=2, num_repeats=1,
)  # fmt: skip


def paused(num_peers: int = 2) -> SwarmWorld:
    world = SwarmWorld.create()
    world.start(num_peers)
    world.do(admin.pause_run, RunRequest(reason="a study"))
    world.tick(1.0)
    for index in range(num_peers):  # the run's own first evaluation comes before trials
        reply = world.beat(index, world.peer(index).attestation(1, 0))
        if reply.duty is not None and reply.duty.kind == "EVALUATE":
            world.finish_evaluation(index)
    return world


def found(world: SwarmWorld, study_id: str = "") -> StudyStatus:
    with world.store.read() as tx:
        return studies.study_status(
            tx, StudyRequest(study_id=study_id), context=world.context, now_unix_seconds=world.now
        )


def result_of(order: Any, *, loss: float = 2.0, **changes: Any) -> TrialResult:
    spec = RunSpec.from_wire(order.trial_spec)
    shape = ModelShape.from_spec(spec.model)
    values: dict[str, Any] = {
        "run_digest": spec.run_digest,
        "seed": spec.seed,
        "convention": "matmul",
        "params_n": shape.num_matmul_parameters,
        "flop_per_token": shape.flop_per_token(),
        "points": tuple(
            TrialPointResult(
                tokens=mark, total_nats=loss * 100 * (1 + 1e3 / mark), num_tokens=100, num_bytes=90
            )
            for mark in order.mark_tokens
        ),
        "params_digest": hashlib.sha256(order.duty_id.encode()).digest(),
        "train_seconds": 2.0,
    }
    return TrialResult(**values | changes)


def report(world: SwarmWorld, index: int, order: Any, result: TrialResult | None = None) -> Any:
    return world.do(
        duties.report_duty,
        ReportDutyRequest(
            run_id=RUN_ID,
            peer_id=world.id_of(index),
            duty_id=order.duty_id,
            fence=order.fence,
            trial=result or result_of(order),
        ),
    )


def test_a_dataset_of_answers_is_refused() -> None:
    world = paused(num_peers=1)
    data = world.context.run_data_by_run[RUN_ID]
    manifest = replace(data.manifest, answer_seq_len=data.spec.model.seq_len)
    world.context.run_data_by_run[RUN_ID] = replace(data, manifest=manifest)
    with pytest.raises(UsageError, match="prompts and answers"):
        world.do(studies.create_study, SMALL)


def test_trials_are_handed_out_while_the_run_does_not_train() -> None:
    world = SwarmWorld.create()
    world.start(2)
    world.do(studies.create_study, SMALL)
    assert found(world).waiting_reason.endswith("is RUNNING; pause it to hand them out")
    reply = world.beat(1)
    assert reply.duty is None or reply.duty.kind != "TRIAL"
    world.do(admin.pause_run, RunRequest(reason="a study"))
    world.attest(0)
    order = world.beat(1).duty
    assert order is not None and order.kind == "TRIAL" and order.trial_spec
    assert world.beat(1).duty == order  # told again, the same one under the same fence
    spec = RunSpec.from_wire(order.trial_spec)
    assert spec.budget_tokens == order.mark_tokens[-1]
    assert spec.data.dataset_id == found(world).dataset_id
    assert found(world).waiting_reason == ""


def test_a_trial_is_counted_once_whoever_reports_it() -> None:
    world = paused()
    world.do(studies.create_study, SMALL)
    first = world.beat(0).duty
    other = world.beat(1).duty
    assert first.duty_id != other.duty_id
    world.do(
        membership.peer_exited,
        PeerExitedRequest(peer_id=world.id_of(0), reason="killed"),
    )
    world.tick(1.0)
    assert report(world, 1, other).is_accepted
    assert report(world, 1, other).reason == "accepted before"
    handed = world.beat(1).duty
    held = [handed]
    while handed.duty_id != first.duty_id:
        assert report(world, 1, handed).is_accepted
        handed = world.beat(1).duty
        held.append(handed)
    assert handed.fence == first.fence + 1
    late = report(world, 0, first)
    assert not late.is_accepted and "stale" in late.reason
    assert report(world, 1, handed).is_accepted
    again = report(world, 0, first)
    assert not again.is_accepted
    world.tick(1.0)
    while (order := world.beat(1).duty) is not None:
        assert report(world, 1, order).is_accepted
    world.tick(1.0)
    status = found(world)
    assert status.stage == "DONE" and status.num_done == status.num_trials == 4
    assert len({trial.params_digest for trial in status.trials}) == 4
    assert [trial.num_handouts for trial in status.trials].count(2) == 1
    with world.store.read() as tx:
        rows = [tx.trial(row.trial_id) for row in tx.trials("study-1")]
        assert sorted(row.fence for row in rows if row) == [1, 1, 1, 2]
        table = studies.study_observations(
            tx, StudyRequest(), context=world.context, now_unix_seconds=world.now
        )
    assert len(set(table.params_n.tolist())) == 3
    assert table.convention == "matmul" and {row.seed for row in table.rows} == {0}
    assert all(row.run_digest and row.head_params > 0 for row in table.rows)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"run_digest": "f" * 64}, "was asked for"),
        ({"seed": 77}, "was asked for"),
        ({"params_n": 5}, "not as matmul does"),
        ({"convention": "all"}, "not as matmul does"),
        ({"points": ()}, "it was evaluated at"),
        ({"params_digest": b""}, "digest of the parameters"),
        ({"train_seconds": float("nan")}, "digest of the parameters"),
    ],
)
def test_results_that_cannot_be_right_are_refused_and_handed_on(
    changes: dict[str, Any], words: str
) -> None:
    world = paused()
    world.do(studies.create_study, SMALL)
    order = world.beat(0).duty
    refused = report(world, 0, order, result_of(order, **changes))
    assert not refused.is_accepted and words in refused.reason
    assert found(world).num_done == 0
    handed = {world.beat(index).duty.duty_id: index for index in (1, 0)}
    assert order.duty_id in handed


def test_impossible_losses_are_refused() -> None:
    world = paused()
    world.do(studies.create_study, SMALL)
    order = world.beat(0).duty
    good = result_of(order)
    for nats in (float("nan"), -1.0, 1e9):
        order = world.beat(0).duty
        bad = replace(result_of(order).points[-1], total_nats=nats)
        points = (*result_of(order).points[:-1], bad)
        refused = report(world, 0, order, replace(result_of(order), points=points))
        assert not refused.is_accepted and "not possible" in refused.reason
    assert good.points


def test_learning_rates_first_then_sizes_then_repeats_elsewhere() -> None:
    world = paused()
    world.do(studies.create_study, replace(SMALL, learning_rates=(1e-3, 4e-3, 9e-3)))
    assert found(world).stage == "RATES" and found(world).num_trials == 6
    losses = {1e-3: 2.2, 4e-3: 2.0, 9e-3: 2.1}
    for step in range(40):
        world.tick(1.0)
        for index in (0, 1):
            order = world.beat(index).duty
            if order is None:
                continue
            rate = RunSpec.from_wire(order.trial_spec).optimizer.peak_lr
            loss = losses[rate] * (1 + 1e-3 * step)
            assert report(world, index, order, result_of(order, loss=loss)).is_accepted
        if found(world).stage == "DONE":
            break
    status = found(world)
    assert status.stage == "DONE"
    sizes = [trial for trial in status.trials if trial.purpose == "SIZE"]
    assert len(sizes) == 3 and {trial.learning_rate for trial in sizes} == {4e-3}
    (repeat,) = [trial for trial in status.trials if trial.purpose == "REPEAT"]
    original = next(t for t in sizes if t.params_n == repeat.params_n)
    assert repeat.peer_id != original.peer_id and repeat.seed != original.seed
    assert 0 < status.seed_noise_ratio < 0.1
    with world.store.read() as tx:
        texts = [row.text for row in tx.newest_events(RUN_ID, num_events=500)]
    assert any("learning rate 0.004: mean excess" in text for text in texts)


def all_done(world: SwarmWorld, *, loss_of: Any) -> StudyStatus:
    """Do every trial as it is handed out; `loss_of` (spec) gives its loss, infinite = diverged."""
    for _ in range(40):
        world.tick(1.0)
        for index in (0, 1):
            order = world.beat(index).duty
            if order is None:
                continue
            loss = loss_of(RunSpec.from_wire(order.trial_spec))
            result = result_of(order, loss=min(loss, 9.0))
            if math.isinf(loss):
                result = replace(result, points=(), divergence="loss or gradient not finite")
            assert report(world, index, order, result).is_accepted
        if found(world).stage in ("DONE", "FAILED"):
            break
    return found(world)


def test_a_learning_rate_that_diverges_is_not_chosen_and_the_study_goes_on() -> None:
    world = paused()
    world.do(studies.create_study, replace(SMALL, learning_rates=(1e-3, 4e-3, 9e-1)))
    losses = {1e-3: 2.2, 4e-3: 2.0, 9e-1: math.inf}
    status = all_done(world, loss_of=lambda spec: losses[spec.optimizer.peak_lr])
    assert status.stage == "DONE" and status.num_diverged == 2
    assert "2 diverged" in status.stage_reason
    diverged = [trial for trial in status.trials if trial.divergence]
    assert {trial.learning_rate for trial in diverged} == {9e-1}
    assert all(t.state == "DONE" and t.loss_nats == 0 and t.num_handouts == 1 for t in diverged)
    assert {t.learning_rate for t in status.trials if t.purpose != "RATE"} == {4e-3}
    with world.store.read() as tx:
        texts = [row.text for row in tx.newest_events(RUN_ID, num_events=500)]
    assert any("0.9 diverged" in text for text in texts)


def test_a_size_that_diverges_is_no_observation() -> None:
    world = paused()
    world.do(studies.create_study, replace(SMALL, num_sizes=4, max_params=6e4))
    largest = max(trial.params_n for trial in found(world).trials)
    status = all_done(
        world,
        loss_of=lambda spec: (
            math.inf if ModelShape.from_spec(spec.model).num_matmul_parameters == largest else 2.0
        ),
    )
    assert status.stage == "DONE" and "4 of 5 trials have a usable result" in status.stage_reason
    with world.store.read() as tx:
        table = studies.study_observations(
            tx, StudyRequest(), context=world.context, now_unix_seconds=world.now
        )
    assert largest not in table.params_n and len(set(table.params_n.tolist())) == 3


def test_a_study_in_which_everything_diverges_fails_with_that_reason() -> None:
    world = paused()
    world.do(studies.create_study, replace(SMALL, learning_rates=(4e-1, 9e-1)))
    status = all_done(world, loss_of=lambda spec: math.inf)
    assert status.stage == "FAILED" and "4 diverged" in status.stage_reason


def test_a_study_ends_with_its_run() -> None:
    world = paused()
    world.do(studies.create_study, SMALL)
    done, held = world.beat(0).duty, world.beat(1).duty
    assert report(world, 0, done).is_accepted
    world.do(admin.stop_run, RunRequest(reason="enough"))
    status = found(world)
    assert status.stage == "FAILED" and status.waiting_reason == "" and status.num_done == 1
    assert f"run {RUN_ID} is STOPPED: 1 sizes have a usable result" in status.stage_reason
    assert {t.state for t in status.trials} == {"DONE", "FAILED"}
    assert all("is STOPPED" in t.reason for t in status.trials if t.state == "FAILED")
    assert status.finish_unix_seconds == world.now
    late = report(world, 1, held)
    assert not late.is_accepted and "is STOPPED" in late.reason
    with pytest.raises(RefusedError, match="is STOPPED") as refused:
        world.do(studies.create_study, SMALL)
    assert "not over" in refused.value.allowed and "create a run" in refused.value.remedy


def test_the_law_of_a_study_serves_the_forecast_of_its_dataset() -> None:
    from coordinator.operations.study_results import observations_of_dataset

    world = paused()
    world.do(studies.create_study, SMALL)
    with world.store.read() as tx:
        assert observations_of_dataset(tx, found(world).dataset_id) is None
    order = world.beat(0).duty
    assert report(world, 0, order).is_accepted
    with world.store.read() as tx:
        points = observations_of_dataset(tx, found(world).dataset_id)
        assert observations_of_dataset(tx, "another") is None
    assert points is not None and len(points.params_n) == len(order.mark_tokens)


def test_what_cannot_be_studied() -> None:
    world = paused()
    for study_id in ("", "other"):
        with pytest.raises(UsageError, match="there is no study yet") as refused:
            found(world, study_id)
        assert "study create" in refused.value.remedy and "status" not in refused.value.remedy
    with pytest.raises(UsageError, match="--heldout-tokens 66.* 1 to 65"):
        world.do(studies.create_study, replace(SMALL, heldout_tokens=66))
    world.do(studies.create_study, SMALL)
    with pytest.raises(UsageError, match="'other' is not known here; one of: study-1") as refused:
        found(world, "other")
    assert "study status` without --study" in refused.value.remedy
    with pytest.raises(UsageError, match="exists already"):
        world.do(studies.create_study, replace(SMALL, study_id="study-1"))
    with pytest.raises(UsageError, match="study id"):
        world.do(studies.create_study, replace(SMALL, study_id="No Good"))
    with pytest.raises(UsageError, match="no result of a size yet"), world.store.read() as tx:
        studies.study_observations(
            tx, StudyRequest(), context=world.context, now_unix_seconds=world.now
        )
    assert json.loads(json.dumps(found(world).stage)) == "SIZES"
