"""The forecast of a run under way, on curves whose end is known: recorded ones and made-up ones."""

from dataclasses import replace

import numpy as np
import pytest

from coordinator.scaling.forecast import Points
from coordinator.scaling.live import (
    COOLDOWN_GAIN_RATIO,
    SLOPE,
    Evaluated,
    RunNow,
    curve_of,
    live_forecast,
    young_curve,
)
from protos.contract.errors import UsageError
from tests.coordinator.scaling.tables import TRUTH

# Held-out losses of one default run that no constant was taken from (seed 0), and of the three that
# they were taken from: tokens, nats; the last line is the end, after the cooldown.
RECORDED: dict[int, tuple[tuple[float, float], ...]] = {
    10: (
        (32_768, 6.931),
        (65_536, 6.412),
        (81_920, 6.156),
        (94_208, 6.062),
        (110_592, 5.922),
        (126_976, 5.855),
        (159_744, 5.799),
        (188_416, 5.684),
        (221_184, 5.62),
        (253_952, 5.525),
        (315_392, 5.77),
        (376_832, 5.416),
        (503_808, 5.144),
        (626_688, 5.02),
        (753_664, 5.01),
        (802_816, 5.021),
        (999_936, 4.635),
    ),
    11: (
        (32_768, 6.853),
        (65_536, 6.707),
        (81_920, 6.482),
        (94_208, 6.442),
        (110_592, 6.14),
        (126_976, 6.044),
        (159_744, 5.856),
        (188_416, 6.034),
        (221_184, 5.762),
        (253_952, 6.166),
        (315_392, 5.633),
        (376_832, 5.46),
        (503_808, 5.254),
        (626_688, 5.04),
        (753_664, 4.96),
        (802_816, 4.961),
        (999_936, 4.751),
    ),
    12: (
        (32_768, 7.079),
        (65_536, 6.658),
        (81_920, 6.461),
        (94_208, 6.273),
        (110_592, 6.042),
        (126_976, 5.942),
        (159_744, 5.758),
        (188_416, 6.273),
        (221_184, 6.038),
        (253_952, 5.63),
        (315_392, 5.577),
        (376_832, 5.409),
        (503_808, 5.19),
        (626_688, 5.107),
        (753_664, 4.87),
        (802_816, 5.223),
        (999_936, 4.674),
    ),
}


# One-process default runs whose corpus was drawn with their own seed; nothing was chosen by them.
UNSEEN: dict[int, tuple[tuple[float, float], ...]] = {
    31: (
        (65_536, 6.33),
        (94_208, 6.155),
        (126_976, 6.251),
        (159_744, 5.687),
        (188_416, 5.676),
        (221_184, 5.694),
        (253_952, 5.438),
        (999_936, 4.282),
    ),
    32: (
        (65_536, 6.303),
        (94_208, 5.927),
        (126_976, 5.86),
        (159_744, 5.832),
        (188_416, 5.54),
        (221_184, 5.295),
        (253_952, 5.225),
        (999_936, 4.405),
    ),
    33: (
        (65_536, 6.474),
        (94_208, 6.074),
        (126_976, 5.768),
        (159_744, 5.782),
        (188_416, 5.593),
        (221_184, 5.631),
        (253_952, 5.841),
        (999_936, 4.675),
    ),
}


def run_now(points: list[tuple[float, float]], *, budget: float = 999_936.0) -> RunNow:
    return RunNow(
        params_n=1.6e6,
        flop_per_token=1.2e7,
        evaluations=tuple(Evaluated(tokens_d=t, loss_nats=loss) for t, loss in points),
        spent_tokens=max(t for t, _ in points),
        budget_tokens=budget,
        warmup_tokens=32_768.0,
        cooldown_start_tokens=0.8 * budget,
        cooldown_ratio=0.2,
        tokens_per_second=7_000.0,
    )


@pytest.mark.parametrize("seed", sorted(RECORDED))
def test_recorded_runs_are_forecast_from_their_first_quarter(seed: int) -> None:
    *points, (end_tokens, end_loss) = RECORDED[seed]
    said = live_forecast(run_now([p for p in points if p[0] <= 0.25 * end_tokens]))
    assert said.loss_nats == pytest.approx(end_loss, rel=0.03)
    assert said.low_nats <= end_loss <= said.high_nats
    assert said.half_width_ratio <= 0.05
    assert "prior" in said.reason and "lower edge" in said.reason


def test_unseen_runs_are_forecast_within_three_percent_but_not_all_of_them() -> None:
    """Seed 31, whose held-out text falls faster than any other's, is missed by 7.4 %."""
    errors = {}
    for seed, (*points, (_, end_loss)) in UNSEEN.items():
        errors[seed] = live_forecast(run_now(points)).loss_nats / end_loss - 1
    assert abs(errors[32]) < 0.01 and abs(errors[33]) < 0.03
    assert errors[31] == pytest.approx(0.074, abs=0.005)


def test_a_point_far_above_its_curve_does_not_move_it() -> None:
    tokens = np.array([9e4, 1.2e5, 1.5e5, 1.9e5, 2.2e5])
    losses = 6.0 * (tokens / 9e4) ** -SLOPE
    slope, level = young_curve(tokens, losses)
    assert slope == pytest.approx(SLOPE, abs=2e-3)
    odd = losses.copy()
    odd[3] *= 1.08
    assert young_curve(tokens, odd)[1] == pytest.approx(level, abs=4e-3)


def test_what_is_left_out_of_the_curve() -> None:
    points = [(0.0, 8.3), (5e4, 6.6), (1e5, 6.0), (2e5, 5.6), (3e5, 5.4), (5e5, 5.2), (9e5, 4.8)]
    assert curve_of(run_now(points)).tokens_d.tolist() == [1e5, 2e5, 3e5, 5e5]
    with pytest.raises(UsageError, match="2 evaluations between 81,920 and 799,949 tokens"):
        live_forecast(run_now(points[:4]))


def test_a_long_smooth_run_is_forecast_by_its_own_law_and_a_study_brings_the_best_size() -> None:
    def points(params_n: float, last: int) -> Points:
        tokens = params_n * np.geomspace(1, 100, 24)[:last]
        sizes = np.full(last, params_n)
        return Points(
            params_n=sizes,
            tokens_d=tokens,
            compute_flop=6 * sizes * tokens,
            loss_nats=np.asarray(TRUTH.loss_nats(sizes, tokens)),
        )

    seen = points(3e8, 16)
    run = replace(
        run_now(list(zip(seen.tokens_d, seen.loss_nats, strict=True)), budget=3e10),
        params_n=3e8,
        flop_per_token=1.8e9,
        warmup_tokens=0.0,
        cooldown_start_tokens=3e10,
    )
    truth = float(TRUTH.loss_nats(3e8, 3e10))
    alone = live_forecast(run)
    assert alone.loss_nats == pytest.approx(truth, rel=0.03)
    assert "published law" in alone.law
    curves = [points(size, 24) for size in (1e7, 2e7, 4e7, 8e7)]
    names = ("params_n", "tokens_d", "compute_flop", "loss_nats")
    others = Points(**{n: np.concatenate([getattr(c, n) for c in curves]) for n in names})
    said = live_forecast(run, others=others)
    assert said.loss_nats == pytest.approx(truth, rel=0.01)
    assert "study" in said.law
    assert said.n_opt == pytest.approx(TRUTH.optimum(5.4e19).params_n, rel=0.3)
    assert 0 < said.efficiency_ratio <= 1


def test_a_study_of_too_few_sizes_changes_nothing() -> None:
    *points, (end, _) = RECORDED[12]
    run = run_now([p for p in points if p[0] <= 0.25 * end])
    sizes, tokens = np.full(5, 1e4), np.geomspace(1e5, 1e6, 5)
    few = Points(
        params_n=sizes,
        tokens_d=tokens,
        compute_flop=6 * sizes * tokens,
        loss_nats=np.asarray(TRUTH.loss_nats(sizes, tokens)),
    )
    assert live_forecast(run, others=few).loss_nats == live_forecast(run).loss_nats


def test_advice_and_eta() -> None:
    *points, (end, _) = RECORDED[11]
    run = run_now([p for p in points if p[0] <= 0.5 * end])
    said = live_forecast(run)
    assert said.eta_seconds == pytest.approx((end - run.spent_tokens) / 7_000)
    assert not said.is_cooldown_due and said.is_restart_better
    assert "published law 'chinchilla'" in said.restart_reason
    late = live_forecast(replace(run, spent_tokens=0.81 * end, tokens_per_second=0.0))
    assert late.is_cooldown_due and late.eta_seconds < 0
    assert not late.is_restart_better
    plain = live_forecast(replace(run, cooldown_start_tokens=end))
    assert said.loss_nats == pytest.approx(plain.loss_nats * (1 - COOLDOWN_GAIN_RATIO))
