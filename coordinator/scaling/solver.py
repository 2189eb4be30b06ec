"""Many fits of one table at once: damped Gauss-Newton on re-weighted log residuals, in numpy.

Written for a batch, because everything that is slow about fitting is a batch: 24 starts of one fit,
thousands of bootstrap draws. The classic grid of 4,500 L-BFGS starts is slow and misses the optimum
19 times out of 20 because ln N and ln D are not centred; here they are, and the terms are written

    L = E + (T1^(1/kappa) + T2^(1/kappa))^kappa,  ln T1 = p - u x,  ln T2 = q - v y,
    x = ln N - mean, y = ln D - mean,

so that p, q stay on the scale of the loss, u = kappa alpha and v = kappa beta are the exponents
that one sees, and kappa -> 0 is merely the larger of the two terms.
theta = (ln E, p, u, q, v, ln kappa).

The objective is the weighted sum of rho(ln L_predicted - ln L): Huber's with knee delta (Hoffmann
2022, eq. 3), whose limits are least absolute deviations (delta -> 0) and least squares.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coordinator.scaling.laws import Form, LossLaw

Array = NDArray[np.float64]

NUM_STARTS = 24
MANY_ROWS = 4_000
"""Tables beyond it are fitted by way of drawn rows, whose sampling error is small."""
DRAWN_ROWS = 2_000
MIN_EXPONENT, MAX_EXPONENT = 1e-3, 4.0
_MIN_LOG_KAPPA, _MAX_LOG_KAPPA = float(np.log(0.05)), float(np.log(4.0))
_MIN_LOG_E_RATIO = float(np.log(1e-4))
_E, _P, _U, _Q, _V, _KAPPA = range(6)
_LARGEST_BATCH_NUMBERS = 16_000
"""Rows times draws that are worked on together, so that they stay in the cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Logarithms of a table of observations, centred; (n,) each."""

    x: Array
    y: Array
    log_loss: Array
    mean_log_n: float
    mean_log_d: float

    @classmethod
    def of(cls, params_n: Array, tokens_d: Array, loss_nats: Array) -> "Table":
        """From positive numbers."""
        log_n, log_d = np.log(params_n), np.log(tokens_d)
        return cls(
            x=log_n - log_n.mean(),
            y=log_d - log_d.mean(),
            log_loss=np.log(loss_nats),
            mean_log_n=float(log_n.mean()),
            mean_log_d=float(log_d.mean()),
        )

    def some(self, rows: NDArray[np.int64]) -> "Table":
        """Some rows, centred as the whole: a theta of them is one of the whole."""
        return replace(self, x=self.x[rows], y=self.y[rows], log_loss=self.log_loss[rows])

    def law(self, theta: Array, form: Form) -> LossLaw:
        """The law of one theta, in the units of the table."""
        kappa = float(np.exp(theta[_KAPPA])) if form.is_general else 1.0
        alpha, beta = float(theta[_U] / kappa), float(theta[_V] / kappa)
        return LossLaw(
            e_nats=float(np.exp(theta[_E])),
            a=float(np.exp(theta[_P] / kappa + alpha * self.mean_log_n)),
            b=float(np.exp(theta[_Q] / kappa + beta * self.mean_log_d)),
            alpha=alpha,
            beta=alpha if form.is_tied else beta,
            kappa=kappa,
        )

    def theta(self, law: LossLaw) -> Array:
        """The theta of a law: a warm start."""
        kappa = law.kappa
        return np.array(
            [
                np.log(max(law.e_nats, 1e-9)),
                kappa * (np.log(law.a) - law.alpha * self.mean_log_n),
                kappa * law.alpha,
                kappa * (np.log(law.b) - law.beta * self.mean_log_d),
                kappa * law.beta,
                np.log(kappa),
            ]
        )


def starts(table: Table, seed: int, *, num_starts: int = NUM_STARTS) -> Array:
    """(num_starts, 6): E from 30 to 95 % of the least loss, exponents 0.15 to 0.6."""
    generator = np.random.default_rng(seed)
    least = float(np.exp(table.log_loss.min()))
    middle = float(np.exp(np.median(table.log_loss)))
    e_nats = least * generator.uniform(0.3, 0.95, num_starts)
    share = generator.uniform(0.2, 0.8, num_starts)
    log_kappa = generator.uniform(np.log(0.3), np.log(1.2), num_starts)
    kappa = np.exp(log_kappa)
    gain = np.maximum(middle - e_nats, 1e-3 * least)
    return np.stack(
        [
            np.log(e_nats),
            np.log(gain) + kappa * np.log(share),
            generator.uniform(0.15, 0.6, num_starts),
            np.log(gain) + kappa * np.log(1 - share),
            generator.uniform(0.15, 0.6, num_starts),
            log_kappa,
        ],
        axis=1,
    )


def solve(
    table: Table,
    begin: Array,
    *,
    form: Form,
    delta: float,
    weights: Array | None = None,
    max_steps: int = 200,
    tolerance: float = 1e-10,
) -> tuple[Array, Array]:
    """Minimise from every row of `begin` (K, 6); weights (K, n) or (n,), all 1 without them.

    Returns (theta (K, 6), objective (K,)); the objective is the weighted sum of Huber's rho with
    knee `delta` (inf: least squares). `tolerance` is the relative fall of the objective that ends.
    """
    num_rows = len(table.x)
    per_row = np.ones(num_rows) if weights is None else weights
    per_row = np.broadcast_to(per_row, (len(begin), num_rows))
    chunk = max(1, _LARGEST_BATCH_NUMBERS // num_rows)
    thetas, objectives = [], []
    for first in range(0, len(begin), chunk):
        batch = _Batch(table, form, delta, per_row[first : first + chunk])
        theta, objective = batch.run(begin[first : first + chunk], max_steps, tolerance)
        thetas.append(theta)
        objectives.append(objective)
    return np.concatenate(thetas), np.concatenate(objectives)


def huber(residuals: Array, delta: float) -> Array:
    """rho: r^2 / 2 within `delta`, delta (|r| - delta / 2) beyond."""
    size = np.abs(residuals)
    if np.isinf(delta):
        return 0.5 * size**2
    return np.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta))


class _Batch:
    """Levenberg-Marquardt of K fits side by side, each with its own damping."""

    def __init__(self, table: Table, form: Form, delta: float, weights: Array) -> None:
        self.table, self.form, self.delta, self.weights = table, form, delta, weights
        least = float(table.log_loss.min())
        self.low = np.array(
            [least + _MIN_LOG_E_RATIO, -40.0, MIN_EXPONENT, -40.0, MIN_EXPONENT, _MIN_LOG_KAPPA]
        )
        self.high = np.array([least - 1e-6, 40.0, MAX_EXPONENT, 40.0, MAX_EXPONENT, _MAX_LOG_KAPPA])
        self.free = [_E, _P, _U, _Q]
        if not form.is_tied:
            self.free.append(_V)
        if form.is_general:
            self.free.append(_KAPPA)

    def clip(self, theta: Array) -> Array:
        """Into the box, with what the form ties."""
        theta = np.clip(theta, self.low, self.high)
        if self.form.is_tied:
            theta[:, _V] = theta[:, _U]
        if not self.form.is_general:
            theta[:, _KAPPA] = 0.0
        return theta

    def residuals(self, theta: Array, rows: Any) -> tuple[Array, tuple[Array, ...]]:
        """ln L_predicted - ln L, (K, n), and what the Jacobian needs."""
        e, p, u, q, v, log_kappa = (theta[:, [i]] for i in range(6))
        kappa = np.exp(log_kappa)
        t1, t2 = p - u * self.table.x, q - v * self.table.y
        difference = (t1 - t2) / kappa
        soft = np.exp(-np.abs(difference))
        lse = np.maximum(t1, t2) + kappa * np.log1p(soft)
        larger = 1 / (1 + soft)
        s1 = np.where(difference > 0, larger, 1 - larger)
        log_pred = np.logaddexp(e, lse)
        return log_pred - self.table.log_loss, (s1, t1, t2, lse, np.exp(lse - log_pred))

    def columns(self, parts: tuple[Array, ...]) -> Array:
        """Jacobian of the residuals in the free directions, (K, p, n)."""
        s1, t1, t2, lse, share = parts
        first, second = share * s1, share * (1 - s1)
        by_u, by_v = -self.table.x * first, -self.table.y * second
        columns = [1 - share, first, by_u + by_v if self.form.is_tied else by_u, second]
        if not self.form.is_tied:
            columns.append(by_v)
        if self.form.is_general:
            columns.append(share * (lse - s1 * t1 - (1 - s1) * t2))
        return np.stack(columns, axis=1)

    def run(self, begin: Array, max_steps: int, tolerance: float) -> tuple[Array, Array]:
        """Steps until every fit has stopped falling."""
        theta = self.clip(begin.copy())
        damping = np.full(len(theta), 1e-2)
        all_rows = np.arange(len(theta))
        residual, parts = self.residuals(theta, all_rows)
        objective = (self.weights * huber(residual, self.delta)).sum(axis=1)
        active = all_rows
        stalls = np.zeros(len(theta), dtype=int)
        for _ in range(max_steps):
            step = self._step(residual, parts, damping[active], self.weights[active])
            tried = theta[active].copy()
            tried[:, self.free] += step
            tried = self.clip(tried)
            new_residual, new_parts = self.residuals(tried, active)
            new_objective = (self.weights[active] * huber(new_residual, self.delta)).sum(axis=1)
            fell = objective[active] - new_objective
            better = fell > 0
            small = fell <= tolerance * objective[active]
            theta[active[better]] = tried[better]
            objective[active[better]] = new_objective[better]
            factor = np.where(better, 0.2, 8.0)
            damping[active] = np.clip(damping[active] * factor, 1e-8, 1e9)
            stalls[active] = np.where(small, stalls[active] + 1, 0)
            residual = np.where(better[:, None], new_residual, residual)
            parts = tuple(
                np.where(better[:, None], new, old)
                for new, old in zip(new_parts, parts, strict=True)
            )
            keep = (stalls[active] < 4) & (damping[active] < 1e8)
            if not keep.all():
                active, residual = active[keep], residual[keep]
                parts = tuple(part[keep] for part in parts)
                if not len(active):
                    break
        return theta, objective

    def _step(
        self, residual: Array, parts: tuple[Array, ...], damping: Array, weights: Array
    ) -> Array:
        """One damped Gauss-Newton step on the re-weighted residuals."""
        size = np.abs(residual)
        if not np.isinf(self.delta):
            weights = weights * np.minimum(1.0, self.delta / np.maximum(size, 1e-300))
        jacobian = self.columns(parts)
        weighted = jacobian * weights[:, None, :]
        normal = weighted @ jacobian.transpose(0, 2, 1)
        gradient = (weighted @ residual[:, :, None])[:, :, 0]
        diagonal = np.einsum("kii->ki", normal)
        scale = diagonal + 1e-9 * diagonal.max(axis=1, keepdims=True) + 1e-300
        index = np.arange(normal.shape[1])
        normal[:, index, index] += damping[:, None] * scale
        return np.asarray(-np.linalg.solve(normal, gradient[:, :, None])[:, :, 0])
