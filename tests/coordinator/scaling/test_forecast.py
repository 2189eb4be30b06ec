"""Live forecasts on curves whose end is known."""

import numpy as np
import pytest

from coordinator.scaling.forecast import (
    PUBLIC_SCORE_RATIO,
    Points,
    cooldown_advice,
    forecast_run,
    forecasts_by_method,
    joint_laws,
    own_forecast,
    past_errors,
    restart_advice,
)
from coordinator.scaling.laws import Form
from coordinator.scaling.observations import Observations
from coordinator.scaling.report import points_of, replay_report
from protos.contract.errors import UsageError
from tests.coordinator.scaling.tables import TINY_CSV, TRUTH, read


def curve(params_n: float, *, num_points: int = 24, noise_ratio: float = 0.001) -> Points:
    """A run of the true law from 1 to 100 tokens per parameter."""
    generator = np.random.default_rng(int(params_n) % 1000)
    tokens = params_n * np.geomspace(1, 100, num_points)
    noise = np.exp(noise_ratio * generator.standard_normal(num_points))
    sizes = np.full(num_points, params_n)
    return Points(
        params_n=sizes,
        tokens_d=tokens,
        compute_flop=6 * sizes * tokens,
        loss_nats=np.asarray(TRUTH.loss_nats(sizes, tokens)) * noise,
    )


def together(curves: list[Points]) -> Points:
    """All rows of several curves."""
    names = ("params_n", "tokens_d", "compute_flop", "loss_nats")
    return Points(**{n: np.concatenate([getattr(c, n) for c in curves]) for n in names})


def test_a_lone_curve() -> None:
    run = curve(1e8, noise_ratio=0.0)
    seen = run.where(np.arange(24) < 12)
    loss, floor = own_forecast(seen.tokens_d, seen.loss_nats, float(run.tokens_d[-1]))
    assert loss == pytest.approx(run.loss_nats[-1], rel=0.02)
    assert 0 <= floor < run.loss_nats[-1]


def test_with_other_sizes_the_forecast_is_better_and_has_reasons() -> None:
    run = curve(3e8)
    others = together([curve(size) for size in (1e7, 2e7, 4e7, 8e7)])
    seen = run.where(np.arange(24) < 14)
    past = past_errors(seen, others)
    said = forecast_run(seen, float(run.tokens_d[-1]), others=others, past=past)
    assert said.loss_nats == pytest.approx(run.loss_nats[-1], rel=0.01)
    assert said.low_nats <= run.loss_nats[-1] <= said.high_nats
    assert said.half_width_ratio < 0.1
    assert sum(said.weight_by_method.values()) == pytest.approx(1.0)
    assert {"general", "general-tied", "hybrid"} == set(said.loss_by_method)
    assert set(said.laws) == {Form.GENERAL, Form.GENERAL_TIED}
    assert "per e-fold" in said.reason


def test_young_runs_have_no_hybrid() -> None:
    others = together([curve(size) for size in (1e7, 2e7, 4e7, 8e7)])
    run = curve(3e8)
    laws = joint_laws(others)
    young, _ = forecasts_by_method(run.where(np.arange(24) < 8), laws, 3e10)
    old, _ = forecasts_by_method(run.where(np.arange(24) < 16), laws, 3e10)
    joint = {"general", "general-tied"}
    assert (set(young), set(old)) == (joint, joint | {"hybrid"})


def test_past_errors_use_nothing_from_the_future() -> None:
    run = curve(1e8)
    before = past_errors(run.where(np.arange(24) < 12))
    assert before == [e for e in past_errors(run) if e.truth_tokens <= run.tokens_d[11]]
    assert before


def test_methods_that_were_wrong_count_less_and_widen_the_band() -> None:
    run = curve(1e8)
    seen = run.where(np.arange(24) < 16)
    calm = forecast_run(seen, float(run.tokens_d[-1]), past=past_errors(seen))
    worse = [
        type(e)(
            method=e.method, horizon_log=e.horizon_log, error_log=0.2, truth_tokens=e.truth_tokens
        )
        for e in past_errors(seen)
    ] * 2
    wild = forecast_run(seen, float(run.tokens_d[-1]), past=worse)
    assert wild.half_width_ratio > 2 * calm.half_width_ratio
    untried = forecast_run(seen, float(seen.tokens_d[-1]) * np.e)
    assert untried.half_width_ratio == pytest.approx(np.sinh(2 * PUBLIC_SCORE_RATIO), rel=1e-6)


@pytest.mark.slow
def test_our_own_run_is_forecast_from_a_quarter() -> None:
    table = read(TINY_CSV)
    sizes = np.unique(table.params_n)
    size = sizes[np.argmin(np.abs(sizes - 167e3))]
    run = table.where(table.params_n == size)
    rest = table.where(table.params_n < size)
    report, _ = replay_report(run, rest)
    quarter = [row for row in report["forecasts"] if row["seen_ratio"] >= 0.24][0]
    assert abs(quarter["error_percent"]) < 3
    assert quarter["low"] <= report["final_loss"] <= quarter["high"]
    inside = [row["is_inside"] for row in report["forecasts"] if row["seen_ratio"] >= 0.1]
    assert np.mean(inside) >= 0.8


def test_what_cannot_be_forecast_is_refused() -> None:
    run = curve(1e8)
    with pytest.raises(UsageError, match="curve of 3 points"):
        forecast_run(run.where(np.arange(24) < 3), 1e12)
    with pytest.raises(UsageError, match="has trained"):
        forecast_run(run, 1e7)
    table = read(TINY_CSV)
    few = Observations.of(table.rows[:3])
    with pytest.raises(UsageError, match="points of the largest size"):
        replay_report(few, None)
    assert len(points_of(few).params_n) == 3


def test_advice() -> None:
    assert cooldown_advice(4e18, 1e18).is_due
    assert not cooldown_advice(4e18, 1.1e18).is_due
    assert not cooldown_advice(0.0, 1e18).is_due
    total = 1e20
    best = TRUTH.optimum(total).params_n
    for ratio, spent, is_due in ((0.25, 0.3, True), (0.25, 0.6, False), (0.9, 0.2, False)):
        said = restart_advice(
            TRUTH, best * ratio, spent * total, (1 - spent) * total, flop_per_param_token=6.0
        )
        assert said.is_due is is_due, said.reason
