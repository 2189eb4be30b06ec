"""What the page shows of a study: trials by size, and the law once it can be fitted."""

import json
import math
from collections.abc import Callable

import pytest

from coordinator.operations import studies
from coordinator.operations.requests_studies import RunStudiesRequest, StudyRequest, StudyStatus
from coordinator.scaling.observations import Observation, Observations
from coordinator.web import study_view
from coordinator.web.study_view import StudyViews, plain_views
from protos.contract.errors import UsageError
from protos.contract.model_shape import ModelShape
from protos.contract.run_spec import RunSpec
from tests.coordinator.operations.swarm_world import RUN_ID, SwarmWorld
from tests.coordinator.operations.test_studies import SMALL, all_done, paused, report


def look(world: SwarmWorld) -> tuple[StudyStatus, Observations | UsageError]:
    values = {"context": world.context, "now_unix_seconds": world.now}
    with world.store.read() as tx:
        (study,) = studies.run_studies(tx, RunStudiesRequest(run_id=RUN_ID), **values).studies
        assert studies.run_studies(tx, RunStudiesRequest(run_id="other"), **values).studies == ()
        try:
            return study, studies.study_observations(tx, StudyRequest(), **values)
        except UsageError as error:
            return study, error


def test_trials_are_counted_by_size_and_the_law_comes_with_the_results(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world, views = paused(), StudyViews()
    world.do(studies.create_study, SMALL)
    order = world.beat(0).duty
    before = views.view(*look(world))
    assert before.fit is None and "no result of a size yet" in before.fit_reason
    assert sum(size.num_open for size in before.sizes) == before.num_trials == 4
    assert report(world, 0, order).is_accepted
    middle = views.view(*look(world))
    assert sum(size.num_done for size in middle.sizes) == 1 and len(middle.curves) == 1
    assert middle.fit is None and middle.fit_reason

    def loss_of(spec: RunSpec) -> float:
        return 1.0 + 8.0 * ModelShape.from_spec(spec.model).num_matmul_parameters ** -0.2

    assert all_done(world, loss_of=loss_of).stage == "DONE"
    after = views.view(*look(world))
    assert after.fit is not None and after.fit_reason == "" and len(after.curves) == 3
    assert [size.num_done for size in after.sizes] == [1, 2, 1]
    frontier = after.fit["frontier"]
    fitted = sorted(curve["params_n"] for curve in after.curves)
    assert all(math.isfinite(v) for row in frontier for v in row)
    assert all(fitted[0] <= row[2] <= fitted[-1] for row in frontier)
    is_outside = any("outside those fitted" in reason for reason in after.fit["reasons"])
    assert is_outside == (len(frontier) < 24)
    assert json.loads(json.dumps(plain_views((after,))))["studies"][0]["stage"] == "DONE"
    monkeypatch.setattr(study_view, "fit_observations", None)  # not made twice
    assert views.view(*look(world)) == after


def test_what_diverged_or_was_given_up_is_told_apart() -> None:
    world = paused()
    world.do(studies.create_study, SMALL)
    world.tick(1.0)
    assert all_done(world, loss_of=lambda spec: math.inf).stage == "FAILED"
    view = StudyViews().view(*look(world))
    assert [size.num_diverged for size in view.sizes] == [1, 2, 1]
    assert all(size.num_done == 0 and size.loss_nats == 0 for size in view.sizes)


@pytest.mark.parametrize(
    ("loss_of", "sizes", "span"),
    [
        (lambda n, c: 4 + math.log10(n) / 5 - math.log10(c) / 50, (1e5, 2e5, 4e5), 10.0),
        (lambda n, c: 2 + math.log10(c) / 5, (1e5, 2e5, 4e5), 2.0),
    ],
)
def test_a_table_without_a_law_has_a_reason_that_is_found_once(
    loss_of: Callable[[float, float], float],
    sizes: tuple[float, ...],
    span: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world, views = paused(), StudyViews()
    world.do(studies.create_study, SMALL)
    study, _ = look(world)
    rows = [
        Observation(
            params_n=n, tokens_d=c / (6 * n), compute_flop=c, loss_nats=loss_of(n, c), seed=0
        )
        for n in sizes
        for c in (1e6 * n * span**power for power in range(4))
    ]
    table = Observations.of(rows)
    view = views.view(study, table)
    assert (
        view.fit is None
        and "of the spread of their losses" in view.fit_reason
        and len(view.curves) == len(sizes)
    )
    json.dumps(plain_views((view,)), allow_nan=False)
    monkeypatch.setattr(study_view, "fit_observations", None)  # not made twice
    assert views.view(study, table) == view
