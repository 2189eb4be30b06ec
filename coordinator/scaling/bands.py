"""How sure a fit is: bootstrap intervals of its constants, conformal bands of its predictions.

A bootstrap knows the noise of the rows and not that the form is wrong; on public sweeps its nominal
90 % band covered less than 80 % of the dearer half in 8 of 18 cases. So a prediction's band comes
from errors that the same procedure made when it extrapolated inside the table (`selection.py`),
grown with the horizon, and is never narrower than the bootstrap or a floor.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coordinator.scaling.frontier import NEAR_RATIO
from coordinator.scaling.laws import Form
from coordinator.scaling.parametric import LawFit
from coordinator.scaling.selection import Errors
from coordinator.scaling.solver import Table, solve

Array = NDArray[np.float64]

LEVEL_RATIO = 0.9
"""Nominal share of predictions that a band holds."""
_SCORE_LEVEL_RATIO = 0.95
INTERVAL_LEVEL_RATIO = 0.95
"""Of the intervals of constants."""
FLOOR_RATIO = 0.005
"""Least half-width: seeds alone differ by a tenth of it."""
UNTESTED_RATIO = 0.02
"""Half-width per e-fold of compute when a table is too small to be tested."""
_NEAR_HORIZON_LOG = float(np.log(2.0))
_MAX_STEPS = 60
_TOLERANCE = 1e-6
_LEAST_DELTA = 1e-5
"""Near enough to least absolute deviations for an interval, and quick."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bootstrap:
    """Constants of every draw, (K,) each, in the units of the table."""

    e_nats: Array
    log_a: Array
    log_b: Array
    alpha: Array
    beta: Array
    kappa: Array

    def log_loss(self, params_n: Array, tokens_d: Array) -> Array:
        """ln of the predicted loss of every draw, (K, m)."""
        terms = np.logaddexp(
            self.log_a[:, None] - self.alpha[:, None] * np.log(params_n),
            self.log_b[:, None] - self.beta[:, None] * np.log(tokens_d),
        )
        return np.asarray(np.log(self.e_nats[:, None] + np.exp(self.kappa[:, None] * terms)))

    def log_optimal_params(self, compute_flop: float, flop_per_param_token: float) -> Array:
        """ln N_opt of every draw at one compute, (K,)."""
        log_ratio = np.log(self.alpha) + self.log_a - np.log(self.beta) - self.log_b
        log_product = np.log(compute_flop / flop_per_param_token)
        return np.asarray((log_ratio + self.beta * log_product) / (self.alpha + self.beta))

    def intervals(self) -> dict[str, tuple[float, float]]:
        """95 % percentile intervals of the constants and of the exponent of N_opt."""
        columns = {
            "E": self.e_nats,
            "A": np.exp(self.log_a),
            "B": np.exp(self.log_b),
            "alpha": self.alpha,
            "beta": self.beta,
            "kappa": self.kappa,
            "params_exponent": self.beta / (self.alpha + self.beta),
        }
        return {name: percentile_interval(values) for name, values in columns.items()}


def percentile_interval(
    values: Array, level_ratio: float = INTERVAL_LEVEL_RATIO
) -> tuple[float, float]:
    """Central interval of draws."""
    tail = 50 * (1 - level_ratio)
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)


def bootstrap(
    fit: LawFit,
    params_n: Array,
    tokens_d: Array,
    loss_nats: Array,
    *,
    num_draws: int,
    seed: int,
    weights: Array | None = None,
) -> Bootstrap:
    """Refit `num_draws` resamples of the rows, all from the fit's optimum, batched."""
    table = Table.of(params_n, tokens_d, loss_nats)
    num_rows = len(params_n)
    generator = np.random.default_rng(seed)
    counts = generator.multinomial(num_rows, np.full(num_rows, 1 / num_rows), size=num_draws)
    draws = counts * (np.ones(num_rows) if weights is None else weights)
    begin = np.repeat(fit.theta[None], num_draws, axis=0)
    theta, _ = solve(
        table,
        begin,
        form=fit.form,
        delta=max(fit.loss.delta, _LEAST_DELTA),
        weights=draws,
        max_steps=_MAX_STEPS,
        tolerance=_TOLERANCE,
    )
    return _constants(table, theta, fit.form)


def _constants(table: Table, theta: Array, form: Form) -> Bootstrap:
    kappa = np.exp(theta[:, 5]) if form.is_general else np.ones(len(theta))
    alpha = theta[:, 2] / kappa
    beta = alpha if form.is_tied else theta[:, 4] / kappa
    return Bootstrap(
        e_nats=np.exp(theta[:, 0]),
        log_a=theta[:, 1] / kappa + alpha * table.mean_log_n,
        log_b=theta[:, 3] / kappa + beta * table.mean_log_d,
        alpha=alpha,
        beta=beta,
        kappa=kappa,
    )


def conformal_quantile(scores: Array, level_ratio: float = LEVEL_RATIO) -> float:
    """The ceil((n + 1) level)-th smallest score: with n exchangeable past scores the next one is
    below it with probability >= level. The largest when n is too small for that level."""
    if not len(scores):
        return float("nan")
    rank = min(int(np.ceil((len(scores) + 1) * level_ratio)), len(scores))
    return float(np.sort(scores)[rank - 1])


def error_scale(horizon_log: Array, off_log: Array) -> Array:
    """What errors are measured in: they grow with the horizon and away from the frontier."""
    horizon = _NEAR_HORIZON_LOG + np.maximum(horizon_log, 0.0)
    return np.asarray(horizon * (1 + off_log / NEAR_RATIO))


def _scores(errors: Errors, *, is_near: bool) -> Array:
    """Scaled sizes of the errors near the frontier (of all, if none is), or of all."""
    is_split = is_near and bool(errors.is_near.any())
    rows = errors.is_near if is_split else np.ones_like(errors.is_near)
    scale = error_scale(errors.horizon_log, errors.off_log)
    return np.asarray((np.abs(errors.error_log) / scale)[rows])


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorBand:
    """Half-widths of ln loss from past errors."""

    score_ratio: float
    """Half-width per unit of `error_scale`, for rows near the frontier."""
    far_score_ratio: float
    """The same for rows more than 15 % above it, where no simple law holds."""
    num_past_errors: int
    num_cuts: int

    @classmethod
    def of(cls, past: Sequence[Errors]) -> "ErrorBand":
        """From the errors of the procedure that predicts; without any, a stated default.

        The errors of one cut hang together, so the number of cuts counts, not that of rows: the
        95 % quantile of the worst cut, widened by 1 / cuts.
        """
        if not past:
            return cls(
                score_ratio=UNTESTED_RATIO,
                far_score_ratio=UNTESTED_RATIO,
                num_past_errors=0,
                num_cuts=0,
            )
        near = max(conformal_quantile(_scores(e, is_near=True), _SCORE_LEVEL_RATIO) for e in past)
        far = max(conformal_quantile(_scores(e, is_near=False), _SCORE_LEVEL_RATIO) for e in past)
        widened = 1 + 1 / len(past)
        return cls(
            score_ratio=near * widened,
            far_score_ratio=max(near, far) * widened,
            num_past_errors=sum(len(errors.error_log) for errors in past),
            num_cuts=len(past),
        )

    def half_width_log(self, horizon_log: Array, off_log: Array) -> Array:
        """(m,) half-widths of ln loss, at least the floor."""
        is_near = off_log <= np.log1p(NEAR_RATIO)
        score = np.where(is_near, self.score_ratio, self.far_score_ratio)
        return np.maximum(score * error_scale(horizon_log, off_log), FLOOR_RATIO)

    @property
    def reason(self) -> str:
        """For people."""
        if not self.num_cuts:
            return (
                f"too few rows to be tested by extrapolation inside the table: "
                f"{100 * UNTESTED_RATIO:.0f} % per e-fold of compute, and the bootstrap"
            )
        return (
            f"{self.num_past_errors} errors of {self.num_cuts} extrapolations inside the table; "
            f"the worst cut's {100 * _SCORE_LEVEL_RATIO:.0f} % quantile, widened as there are only "
            f"{self.num_cuts}, is {100 * self.score_ratio:.2f} % per e-fold of compute"
        )
