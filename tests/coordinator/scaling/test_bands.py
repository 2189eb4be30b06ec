"""Bands: what they are made of, and how many dearer rows they hold where the truth is known."""

from pathlib import Path

import numpy as np
import pytest

from coordinator.scaling.bands import (
    FLOOR_RATIO,
    PUBLIC_OFF_RATIO,
    PUBLIC_SCALE_RATIO,
    ErrorBand,
    conformal_quantile,
    error_scale,
    spread_log,
)
from coordinator.scaling.laws import LossLaw
from coordinator.scaling.observations import Observations
from coordinator.scaling.selection import Errors
from coordinator.scaling.study_fit import fit_observations
from tests.coordinator.scaling.tables import PORIAN_CSV, TINY_CSV, TRUTH, made_up, read

LAWS = (
    TRUTH,
    LossLaw(e_nats=1.8, a=480.0, b=2100.0, alpha=0.35, beta=0.37),
    LossLaw(e_nats=1.2, a=4e3, b=9e4, alpha=0.55, beta=0.6, kappa=0.5),
)


def forecast(table: Observations, cut_quantile: float) -> tuple[float, float, float]:
    """(share inside, median half-width, median error) of the rows above a quantile of the
    distinct computes, from those below."""
    budgets = np.unique(np.round(np.log(table.compute_flop), 2))
    cut = float(np.exp(np.quantile(budgets, cut_quantile, method="lower") + 0.006))
    study = fit_observations(table, max_flop=cut, num_draws=30)
    dear = table.where(table.compute_flop > cut)
    said = study.predict(dear.params_n, dear.tokens_d, dear.compute_flop)
    error = np.abs(np.log(said.loss_nats / dear.loss_nats))
    half = np.log(said.high_nats / said.loss_nats)
    return float((error <= half).mean()), float(np.median(half)), float(np.median(error))


def test_bands_hold_what_they_claim_and_are_not_wide_everywhere() -> None:
    found = [
        forecast(made_up(law, num_budgets=9, noise_ratio=noise, seed=seed), 0.5)
        for seed, law in enumerate(LAWS)
        for noise in (0.002, 0.01)
    ]
    coverage, half, error = np.array(found).T
    assert coverage.mean() >= 0.9 and coverage.min() >= 0.8
    assert np.median(half) <= 0.08 and np.median(half[::2]) < np.median(half[1::2])


@pytest.mark.parametrize(
    ("path", "cut_quantile", "most"),
    [
        (TINY_CSV, 0.5, 0.15),
        (TINY_CSV, 0.75, 0.09),
        (PORIAN_CSV, 0.25, 0.35),
        (PORIAN_CSV, 0.5, 0.12),
    ],
)  # fmt: skip
def test_bands_of_measured_sweeps(path: Path, cut_quantile: float, most: float) -> None:
    coverage, half, _ = forecast(read(path), cut_quantile)
    assert coverage >= 0.85 and half <= most


def errors(scale: float, *, span_log: float = 2.0, off: float = 0.0) -> Errors:
    """Errors of `scale` units near the frontier, and `off` times the distance far from it."""
    horizon = np.array([0.5, 1.0, 2.0, 1.0, 1.0])
    off_log = np.array([0.0, 0.0, 0.0, 0.2, 0.3])
    is_near = off_log == 0
    error = np.where(is_near, scale * error_scale(horizon, span_log), off * off_log)
    return Errors(
        cut_flop=1.0, span_log=span_log, horizon_log=horizon, off_log=off_log, error_log=error,
        is_near=is_near,
    )  # fmt: skip


def test_errors_grow_faster_than_the_distance_and_with_a_short_span() -> None:
    near, far = error_scale(np.array([1.0, 4.0]), 2.0)
    assert far > 4 * near
    assert error_scale(np.array([4.0]), 1.0) > error_scale(np.array([4.0]), 6.0)
    assert error_scale(np.array([-3.0]), 2.0) == pytest.approx(np.log(2))
    assert error_scale(np.array([1.0]), 0.0) == error_scale(np.array([1.0]), np.log(2))


def test_a_band_is_of_the_tables_errors_and_of_public_ones() -> None:
    public = ErrorBand.of([])
    assert (public.scale_ratio, public.off_ratio) == pytest.approx(
        (PUBLIC_SCALE_RATIO, PUBLIC_OFF_RATIO)
    )
    assert "too few rows" in public.reason
    worse = ErrorBand.of([errors(0.01, off=0.5)] * 4)
    assert worse.scale_ratio == pytest.approx(np.sqrt((2 * 0.01**2 + 2 * 0.0035**2) / 4))
    assert worse.off_ratio > 0.3 and worse.num_cuts == 4 and worse.num_past_errors == 20
    assert "4 extrapolations" in worse.reason
    at = {"horizon_log": np.array([2.0]), "span_log": 2.0}
    zero = np.zeros(1)
    plain = public.half_width_log(off_log=zero, other_std_log=zero, **at)
    assert plain == pytest.approx(2.92 * 0.0035 * error_scale(np.array([2.0]), 2.0))
    assert (public.half_width_log(off_log=zero + 0.1, other_std_log=zero, **at) > plain).all()
    assert (public.half_width_log(off_log=zero, other_std_log=zero + 0.1, **at) > plain).all()
    sure = ErrorBand.of([errors(0.0)] * 9)
    assert (
        sure.half_width_log(np.array([0.0]), zero, span_log=9.0, other_std_log=zero) == FLOOR_RATIO
    )


def test_a_mix_is_as_unsure_as_its_forms_differ() -> None:
    logs = np.array([[0.0, 1.0], [0.0, 3.0]])
    shares = np.array([0.5, 0.5])
    assert spread_log(logs, shares, np.zeros((2, 2))) == pytest.approx([0.0, 1.0])
    assert spread_log(logs[:1], np.ones(1), np.full((1, 2), 1.645)) == pytest.approx([1.0, 1.0])


def test_conformal_quantile_covers() -> None:
    generator = np.random.default_rng(0)
    scores = np.abs(generator.standard_normal((2000, 21)))
    inside = [s[20] <= conformal_quantile(s[:20]) for s in scores]
    assert 0.88 <= np.mean(inside) <= 0.94
