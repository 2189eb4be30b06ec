"""How sure a fit is: bootstrap intervals of its constants, 90 % bands of its predictions.

A bootstrap knows the noise of the rows and not that the form is wrong; on public sweeps its nominal
90 % band covered less than 80 % of the dearer half in 8 of 18 cases. So a prediction's band adds,
as variances:

- what the same procedure was wrong by when it extrapolated inside the table (`selection.py`), per
  unit of `error_scale`: a law whose curvature is wrong, fitted over a span w of ln compute, is off
  by a multiple of h (1 + h / w) at a distance h beyond it, so errors grow faster than the distance
  and the more, the shorter the span was;
- what it was wrong by away from the frontier, per ln of how far above it a row lies;
- how far apart the forms are, by their shares, and the draws of the bootstrap.

The errors of one cut hang together, so a cut counts once, whatever its rows. With a handful of cuts
the first variance is itself uncertain: Student's t, beginning with what public sweeps showed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coordinator.scaling.laws import Form
from coordinator.scaling.parametric import LawFit
from coordinator.scaling.selection import Errors
from coordinator.scaling.solver import DRAWN_ROWS, MANY_ROWS, Table, solve

Array = NDArray[np.float64]

LEVEL_RATIO = 0.9
"""Nominal share of predictions that a band holds."""
INTERVAL_LEVEL_RATIO = 0.95
"""Of the intervals of constants."""
FLOOR_RATIO = 0.005
"""Least half-width: seeds alone differ by a tenth of it."""
PUBLIC_SCALE_RATIO = 0.0035
"""Of `error_scale`: over eleven public sweeps the median error of the general form on the dearer
half was 0.99 % (root mean square about 1.3 %), at a mean scale of 3.9."""
PUBLIC_OFF_RATIO = 0.15
"""Of ln(loss / best loss at that compute), before a table shows its own."""
_PUBLIC_CUTS = 2
"""How many independent cuts the public sweeps count for: they differ by three times."""
_CUT_SHARE = 0.5
"""Cuts are nested and share most of their rows: two count as one."""
_T_95 = (2.920, 2.558, 2.353, 2.222, 2.132, 2.066, 2.015, 1.975, 1.943)
"""95 % quantile of Student's t with 2, 2.5, 3, ... degrees of freedom: of 0, 1, 2, ... cuts."""
_NORMAL_95 = 1.645
_NEAR_HORIZON_LOG = float(np.log(2.0))
_LEAST_OFF_LOG = 0.1
_MIN_OFF_ROWS = 2
LEAST_DRAWS = 20
"""Behind any interval: fewer have no 2.5 % tail."""
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


def pooled_interval(
    draws: Sequence[Array], shares: Sequence[float], level_ratio: float = INTERVAL_LEVEL_RATIO
) -> tuple[float, float]:
    """Central interval of several sets of draws, each weighing its share."""
    values = np.concatenate(draws)
    weights = np.concatenate(
        [np.full(len(one), share / len(one)) for one, share in zip(draws, shares, strict=True)]
    )
    order = np.argsort(values)
    below = (np.cumsum(weights[order]) - weights[order] / 2) / weights.sum()
    tail = (1 - level_ratio) / 2
    low, high = np.interp([tail, 1 - tail], below, values[order])
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
    """Refit `num_draws` resamples of the rows, all from the fit's optimum, batched.

    Of more than 4,000 rows a resample has 2,000 (m out of n bootstrap, Bickel 1997): what its theta
    is off by shrinks by sqrt(m / n), the ratio of the sampling errors.
    """
    table = Table.of(params_n, tokens_d, loss_nats)
    num_rows = len(params_n)
    generator = np.random.default_rng(seed)
    if num_rows > MANY_ROWS:
        found = [
            _drawn(table, fit, generator.integers(0, num_rows, DRAWN_ROWS), weights)
            for _ in range(num_draws)
        ]
        off = np.array(found).reshape(-1, len(fit.theta)) - fit.theta
        return _constants(table, fit.theta + np.sqrt(DRAWN_ROWS / num_rows) * off, fit.form)
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


def _drawn(table: Table, fit: LawFit, rows: NDArray[np.int64], weights: Array | None) -> Array:
    """theta (6,) of some rows, from the fit's."""
    theta, _ = solve(
        table.some(rows),
        fit.theta[None],
        form=fit.form,
        delta=max(fit.loss.delta, _LEAST_DELTA),
        weights=None if weights is None else weights[rows],
        max_steps=_MAX_STEPS,
        tolerance=_TOLERANCE,
    )
    return np.asarray(theta[0])


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


def error_scale(horizon_log: Array, span_log: float) -> Array:
    """What errors near the frontier are measured in, from the distance ln(C / largest fitted), (m,)
    and the span ln(largest / least fitted); a span below a doubling counts as one."""
    horizon = np.maximum(horizon_log, 0.0)
    return (_NEAR_HORIZON_LOG + horizon) * (1 + horizon / max(span_log, _NEAR_HORIZON_LOG))


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorBand:
    """Standard deviations of ln loss from past errors."""

    scale_ratio: float
    """Per unit of `error_scale`."""
    off_ratio: float
    """Per ln of how far a row lies above the frontier."""
    num_past_errors: int
    num_cuts: int

    @classmethod
    def of(cls, past: Sequence[Errors]) -> "ErrorBand":
        """From the errors of the procedure that predicts, one item per cut."""
        scales, offs = [], []
        for errors in past:
            square = errors.error_log**2
            scale = error_scale(errors.horizon_log, errors.span_log)
            near = errors.is_near if errors.is_near.any() else np.ones_like(errors.is_near)
            scales.append(float((square / scale**2)[near].mean()))
            if (~near).sum() >= _MIN_OFF_ROWS:
                rest = np.maximum(square - (PUBLIC_SCALE_RATIO * scale) ** 2, 0.0)
                off = np.maximum(errors.off_log, _LEAST_OFF_LOG)
                offs.append(float((rest / off**2)[~near].mean()))
        return cls(
            scale_ratio=_pooled(scales, PUBLIC_SCALE_RATIO),
            off_ratio=_pooled(offs, PUBLIC_OFF_RATIO),
            num_past_errors=sum(len(errors.error_log) for errors in past),
            num_cuts=len(past),
        )

    def half_width_log(
        self, horizon_log: Array, off_log: Array, *, span_log: float, other_std_log: Array
    ) -> Array:
        """(m,) half-widths of ln loss, at least the floor; `other_std_log` (m,) is what forms and
        draws differ by."""
        std = np.sqrt(
            (self.scale_ratio * error_scale(horizon_log, span_log)) ** 2
            + (self.off_ratio * off_log) ** 2
            + other_std_log**2
        )
        quantile = _T_95[min(self.num_cuts, len(_T_95) - 1)]
        return np.asarray(np.maximum(quantile * std, FLOOR_RATIO))

    @property
    def reason(self) -> str:
        """For people."""
        said = (
            f"{100 * self.scale_ratio:.2f} % (standard deviation) per unit of (ln 2 + h)(1 + h / w)"
            ", h the distance beyond the fitted compute and w the span fitted, in logarithms; "
            f"{100 * self.off_ratio:.0f} % of the distance above the frontier; the spread of forms "
            "and draws"
        )
        if not self.num_cuts:
            return f"too few rows to be tested by extrapolation inside the table: {said}"
        return (
            f"{said}: from {self.num_past_errors} errors of {self.num_cuts} extrapolations inside "
            "the table and from public sweeps"
        )


def _pooled(squares: Sequence[float], public_ratio: float) -> float:
    """Root mean square of the cuts' own and of the public sweeps'."""
    total = _CUT_SHARE * sum(squares) + _PUBLIC_CUTS * public_ratio**2
    return float(np.sqrt(total / (_CUT_SHARE * len(squares) + _PUBLIC_CUTS)))


def spread_log(log_losses: Array, shares: Array, half_widths: Array) -> Array:
    """Standard deviation of a mix of forms, (m,): between the forms, (F, m) with shares (F,), and
    within them, from the 90 % half-widths of their draws, (F, m)."""
    middle = shares @ log_losses
    within = shares @ half_widths / _NORMAL_95
    return np.asarray(np.sqrt(shares @ (log_losses - middle) ** 2 + within**2))
