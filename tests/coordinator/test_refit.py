"""The refitter: what it finds it forecasts and stores, beside the writer thread."""

import asyncio
import threading

import pytest

from coordinator.operations.forecasts import RefitTask
from coordinator.operations.writer import Writer
from coordinator.refit import Refitter, make_forecast
from tests.coordinator.operations.swarm_world import RUN_ID, SEQ_LEN, SwarmWorld
from tests.coordinator.operations.test_forecasts import evaluate, refits, with_schedule


def world_with_evaluations(losses: tuple[float, ...]) -> SwarmWorld:
    world = SwarmWorld.create(budget_windows=64)
    with_schedule(world, lr_warmup_tokens=0)
    world.start(1)
    for step, loss in enumerate(losses, start=1):
        world.commit(num_windows=2)
        evaluate(world, step * SEQ_LEN, loss, step=step)
    return world


def test_every_new_evaluation_is_forecast_once_off_the_writer_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = world_with_evaluations((6.0, 5.5, 5.2, 5.0))
    threads: list[str] = []

    def noted(task: RefitTask) -> object:
        threads.append(threading.current_thread().name)
        return make_forecast(task)

    monkeypatch.setattr("coordinator.refit.make_forecast", noted)
    writer = Writer(world.store, context=world.context, clock=lambda: world.now).start()
    refitter = Refitter(writer)
    for _ in range(2):
        asyncio.run(refitter.turn())
    writer.stop()
    assert len(threads) == 1 and threads[0] != "store-writer"
    with world.store.read() as tx:
        (row,) = tx.forecasts(RUN_ID)
    assert row.forecast_json


def test_a_fit_that_fails_is_a_reason() -> None:
    (task,) = refits(world_with_evaluations((6.0, 5.5, 5.2, float("inf"))))
    found = make_forecast(task)
    assert found.forecast is None and found.reason
