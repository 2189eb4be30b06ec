"""Forecasts over the store: made after an evaluation, kept, announced, shown; budgets that follow
their pool, through directives.
"""

from dataclasses import replace
from typing import Any

import pytest

from coordinator.domain.duties import DutyKind, DutyState
from coordinator.operations.common import load_run
from coordinator.operations.forecasts import FindRefitsRequest, find_refits, save_forecast
from coordinator.operations.requests_admin import EventsRequest, SeriesRequest
from coordinator.operations.status import events, series
from coordinator.refit import make_forecast
from coordinator.store.rows_membership import EvaluationRow
from coordinator.web.samples import forecast_samples
from protos.contract.run_spec import RunSpec, ScheduleSpec
from tests.coordinator.operations.ledger_world import SEQ_LEN
from tests.coordinator.operations.swarm_world import RUN_ID, SwarmWorld


def evaluate(world: SwarmWorld, tokens: int, loss_nats: float, *, step: int) -> None:
    """An accepted evaluation, at its place on the curve."""
    with world.store.write() as tx:
        tx.put_evaluation(
            EvaluationRow(
                RUN_ID,
                1,
                step,
                f"u{step}",
                "p",
                b"d",
                loss_nats * 100,
                100,
                300,
                tokens,
                int(world.now * 1000),
            )  # fmt: skip
        )
    world.now += 1


def refits(world: SwarmWorld) -> Any:
    with world.store.read() as tx:
        return find_refits(
            tx, FindRefitsRequest(), context=world.context, now_unix_seconds=world.now
        )


def texts(world: SwarmWorld, kind: str) -> list[str]:
    with world.store.read() as tx:
        found = events(tx, EventsRequest(), context=world.context, now_unix_seconds=world.now)
    return [event.text for event in found.events if event.kind == kind]


def with_schedule(world: SwarmWorld, **changes: Any) -> None:
    """Change the schedule of the world's run, before it starts."""
    data = world.context.run_data_by_run[RUN_ID]
    spec = replace(data.spec, schedule=ScheduleSpec(**changes))
    world.context.run_data_by_run[RUN_ID] = replace(data, spec=spec)
    with world.store.write() as tx:
        tx.update_run(replace(load_run(tx, RUN_ID), spec=spec.to_wire()))


def test_a_forecast_is_made_kept_and_told_after_every_evaluation() -> None:
    world = SwarmWorld.create(budget_windows=64)
    with_schedule(world, lr_warmup_tokens=0)
    world.start(1)
    assert "no evaluation" in world.status().forecast.reason
    assert refits(world) == ()
    for _ in range(4):
        world.commit(num_windows=2)
    for step, loss in enumerate((6.0, 5.5, 5.2), start=1):
        evaluate(world, step * SEQ_LEN, loss, step=step)
    (task,) = refits(world)
    world.do(save_forecast, make_forecast(task))
    assert refits(world) == ()
    shown = world.status().forecast
    assert shown.forecast is None and "3 evaluations" in shown.reason
    assert texts(world, "forecast") == [f"no forecast: {shown.reason}"]
    evaluate(world, 4 * SEQ_LEN, 5.0, step=4)
    (task,) = refits(world)
    assert task.run.budget_tokens == 64 * SEQ_LEN and task.run.spent_tokens == 8 * SEQ_LEN
    world.do(save_forecast, make_forecast(task))
    shown = world.status().forecast
    assert shown.forecast is not None and shown.credited_tokens == 8 * SEQ_LEN
    assert shown.forecast.low_nats < shown.forecast.loss_nats < 5.0
    assert shown.forecast.eta_seconds > 0
    assert "held-out loss at 256 tokens will be" in texts(world, "forecast")[-1]
    with world.store.read() as tx:
        assert [row.schedule_tokens for row in tx.forecasts(RUN_ID)] == [3 * SEQ_LEN, 4 * SEQ_LEN]
        curves = series(tx, SeriesRequest(), context=world.context, now_unix_seconds=world.now)
    assert [point.loss_nats for point in curves.forecasts] == [shown.forecast.loss_nats]


def test_a_fixed_budget_stays_and_its_cooldown_is_told_once() -> None:
    world = SwarmWorld.create(budget_windows=20)
    world.start(1)
    for _ in range(5):
        world.commit(num_windows=4)
        world.tick(1.0)
        world.notice()
    assert world.status().budget_tokens == 20 * SEQ_LEN
    (told,) = texts(world, "budget")
    assert "the cooldown begins at 64 tokens" in told and "0.25 of the spent" in told
    assert world.directive().cooldown_start_tokens == 64


@pytest.mark.parametrize(("deadline", "is_longer"), [(1000.0, True), (85.0, False)])
def test_a_budget_follows_the_pool_through_a_directive(deadline: float, is_longer: bool) -> None:
    world = SwarmWorld.create(budget_windows=48)
    with_schedule(world, deadline_seconds=deadline)
    world.start(1)
    for _ in range(7):
        world.commit(num_windows=4)
        world.tick(10.0)
        world.notice()
        budgets_are_whole(world)
    found = world.status()
    assert (found.budget_tokens > 48 * SEQ_LEN) is is_longer
    assert "the budget follows the pool" in texts(world, "budget")[0]
    assert world.directive().budget_tokens == found.budget_tokens
    assert "budget_tokens" in texts(world, "directive")[-1]


def budgets_are_whole(world: SwarmWorld) -> None:
    found = world.status()
    assert found.budget_tokens % SEQ_LEN == 0
    assert found.granted_tokens <= found.budget_tokens


def test_a_run_that_follows_its_pool_cools_down_and_ends_at_its_budget() -> None:
    world = SwarmWorld.create(budget_windows=64)
    with_schedule(world, deadline_seconds=130.0)
    world.start(1)
    for _ in range(40):
        if world.status().credited_tokens >= world.status().budget_tokens:
            break
        world.commit(num_windows=2)
        world.tick(7.0)
        world.notice()
    found = world.status()
    assert found.credited_tokens == found.budget_tokens < 64 * SEQ_LEN
    assert "the cooldown begins" in texts(world, "budget")[-1]
    start = world.directive().cooldown_start_tokens
    assert 0.7 * found.budget_tokens <= start < found.budget_tokens
    with world.store.read() as tx:
        kinds = {row.kind for row in tx.duties(RUN_ID) if row.state != DutyState.FAILED}
    assert DutyKind.EVALUATE in kinds
    assert RunSpec.from_wire(load(world).spec).budget_tokens == 64 * SEQ_LEN


def load(world: SwarmWorld) -> Any:
    with world.store.read() as tx:
        return load_run(tx, RUN_ID)


def test_advice_and_cooldown_are_told_in_status_event_log_and_metrics() -> None:
    world = SwarmWorld.create(budget_windows=64)
    with_schedule(world, lr_warmup_tokens=0)
    world.start(1)
    for step, loss in enumerate((6.0, 5.5, 5.2, 5.0), start=1):
        world.commit(num_windows=2)
        evaluate(world, step * SEQ_LEN, loss, step=step)
    (task,) = refits(world)
    made = make_forecast(task)
    assert made.forecast is not None
    for is_better in (False, True, True, False):
        said = replace(made.forecast, is_restart_better=is_better, is_cooldown_due=not is_better)
        world.do(save_forecast, replace(made, forecast=said))
        shown = world.status().forecast.forecast
        assert shown is not None and shown.restart_reason and shown.cooldown_reason
        values = {sample.metric.name: sample.value for sample in forecast_samples(world.status())}
        assert values["muster_coordinator_restart_advised"] == float(is_better)
        assert values["muster_coordinator_cooldown_due"] == float(not is_better)
    assert texts(world, "advice") == [f"restart advice: {made.forecast.restart_reason}"] * 2
