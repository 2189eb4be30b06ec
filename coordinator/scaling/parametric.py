"""Hoffmann's approach 3: a law L(N, D) fitted to all rows at once (2203.15556, section 3.3).

Three losses on the log residuals: Huber with knee 1e-3 (Hoffmann's), least absolute deviations
(what Besiroglu 2024 published: their fitted scale pushes the knee to 5e-9), least squares. From 24
random starts in centred coordinates all reach one optimum; how many did is part of the result.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coordinator.scaling.laws import Form, LossLaw, RepetitionLaw
from coordinator.scaling.solver import (
    DRAWN_ROWS,
    MANY_ROWS,
    NUM_STARTS,
    Table,
    huber,
    solve,
    starts,
)
from protos.contract.errors import UsageError

Array = NDArray[np.float64]

HUBER_DELTA = 1e-3
_LAD_DELTAS = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9)
_AGREE_RATIO = 1e-5
_NUM_POLISHED = 3
"""Of the starts on the drawn rows of a long table, the best are solved on all."""
_SOME_TOLERANCE = 1e-7
_LONG_TOLERANCE = 1e-8


class Loss(StrEnum):
    """How a log residual counts."""

    HUBER = "huber"
    LAD = "lad"
    LS = "ls"

    @property
    def delta(self) -> float:
        """Knee of Huber's function of which this is a case."""
        return {Loss.HUBER: HUBER_DELTA, Loss.LAD: _LAD_DELTAS[-1], Loss.LS: float("inf")}[self]


@dataclass(frozen=True, slots=True, kw_only=True)
class LawFit:
    """One law through one table."""

    law: LossLaw
    form: Form
    loss: Loss
    objective: float
    """Sum over rows of Huber's rho (knee 1e-3), of |r| (lad) or of r^2 / 2 (ls)."""
    num_rows: int
    num_starts: int
    num_starts_agreed: int
    """Starts whose objective is within 1e-5 of the best."""
    theta: Array
    """The solver's own constants: a warm start for the same table."""


def check_rows(params_n: Array, tokens_d: Array, form: Form) -> None:
    """Raises UsageError when the rows cannot fix the constants of a form."""
    num_rows = len(params_n)
    points = np.round(np.log(params_n), 6) + 1j * np.round(np.log(tokens_d), 6)
    num_points = len(np.unique(points))
    if num_points < form.num_constants:
        raise UsageError(
            f"{num_points} different points (N, D) in {num_rows} rows for the {form.value} form",
            allowed=f"at least as many as it has constants: {form.num_constants}",
            remedy="add observations, or choose a form with fewer constants (tied has 4)",
        )
    for title, values in (("N", params_n), ("D", tokens_d)):
        num_values = len(np.unique(np.round(np.log(values), 2)))
        if num_values < 3:
            raise UsageError(
                f"{num_values} different {title} in {num_rows} rows",
                allowed="at least 3 different N and 3 different D: each has an exponent",
                remedy=f"add observations with other {title}",
            )


def fit_law(
    params_n: Array,
    tokens_d: Array,
    loss_nats: Array,
    *,
    form: Form,
    loss: Loss = Loss.HUBER,
    seed: int = 0,
    weights: Array | None = None,
    warm: LossLaw | None = None,
    tolerance: float = 1e-10,
    num_starts: int = NUM_STARTS,
) -> LawFit:
    """Fit one form to rows (n,). With `warm` only from there (about 2 ms), else from 24 starts; of
    a table beyond 4,000 rows 2,000 serve the starts, and the 3 best are solved on all.

    Raises UsageError when the rows cannot fix the constants.
    """
    check_rows(params_n, tokens_d, form)
    table = Table.of(params_n, tokens_d, loss_nats)
    begin = starts(table, seed, num_starts=num_starts) if warm is None else table.theta(warm)[None]
    deltas = _LAD_DELTAS if loss is Loss.LAD else (loss.delta,)
    if len(begin) > _NUM_POLISHED and len(params_n) > MANY_ROWS:
        begin = _best_of_some(table, begin, form=form, delta=deltas[0], weights=weights, seed=seed)
        tolerance = max(tolerance, _LONG_TOLERANCE)
    theta, objective = begin, np.zeros(len(begin))
    for delta in deltas:
        theta, objective = solve(
            table, theta, form=form, delta=delta, weights=weights, tolerance=tolerance
        )
    best = int(np.argmin(objective))
    law = table.law(theta[best], form)
    scale = 1 / loss.delta if loss is Loss.LAD else 1.0
    return LawFit(
        law=law,
        form=form,
        loss=loss,
        objective=float(objective[best] * scale),
        num_rows=len(params_n),
        num_starts=len(begin),
        num_starts_agreed=int((objective <= objective[best] * (1 + _AGREE_RATIO)).sum()),
        theta=theta[best],
    )


def _best_of_some(
    table: Table, begin: Array, *, form: Form, delta: float, weights: Array | None, seed: int
) -> Array:
    """The best few of many starts, (_NUM_POLISHED, 6), solved on rows drawn from a long table."""
    size = len(table.x)
    chosen = np.random.default_rng(seed).choice(size, DRAWN_ROWS, replace=False)
    theta, objective = solve(
        table.some(chosen),
        begin,
        form=form,
        delta=delta,
        weights=None if weights is None else weights[chosen],
        tolerance=_SOME_TOLERANCE,
    )
    return theta[np.argsort(objective)[:_NUM_POLISHED]]


def huber_objective(
    law: LossLaw, params_n: Array, tokens_d: Array, loss_nats: Array, delta: float = HUBER_DELTA
) -> float:
    """Sum of Huber's rho of the log residuals of a law."""
    residuals = np.log(law.loss_nats(params_n, tokens_d)) - np.log(loss_nats)
    return float(huber(residuals, delta).sum())


def anchored(
    repetition: RepetitionLaw,
    params_n: Array,
    tokens_d: Array,
    unique_tokens: Array,
    loss_nats: Array,
    *,
    loss: Loss = Loss.HUBER,
) -> RepetitionLaw:
    """The repetition law re-anchored on own runs: E, A, B are refitted, exponents and R* kept.

    Absolute constants do not transfer between set-ups; refitting R* as well was worse on held-out
    runs. Re-weighted linear least squares in (E, A, B), the best of all sets of them that are
    kept above 0. Raises UsageError below 3 rows.
    """
    if len(params_n) < 3:
        raise UsageError(
            f"{len(params_n)} rows to re-anchor a repetition law",
            allowed="at least 3: E, A and B are fitted",
            remedy="add observations",
        )
    law = repetition.law
    fitted = law
    for _ in range(20):  # N' depends on A and B through U_N
        current = RepetitionLaw(
            law=fitted,
            tokens_half_life=repetition.tokens_half_life,
            params_half_life=repetition.params_half_life,
        )
        counted_n = current.effective_params(params_n, unique_tokens)
        counted_d = current.effective_tokens(tokens_d, unique_tokens)
        columns = np.stack(
            [np.ones_like(loss_nats), counted_n**-law.alpha, counted_d**-law.beta], axis=1
        )
        constants = _positive_least(columns, loss_nats, loss.delta)
        fitted = LossLaw(
            e_nats=float(constants[0]),
            a=float(max(constants[1], 1e-12)),
            b=float(max(constants[2], 1e-12)),
            alpha=law.alpha,
            beta=law.beta,
        )
    return RepetitionLaw(
        law=fitted,
        tokens_half_life=repetition.tokens_half_life,
        params_half_life=repetition.params_half_life,
    )


def _positive_least(columns: Array, target: Array, delta: float) -> Array:
    """Coefficients >= 0 of least Huber loss of relative residuals, over all sign patterns."""
    best: tuple[float, Any] = (np.inf, None)
    relative = columns / target[:, None]
    for kept in ([0, 1, 2], [1, 2], [0, 1], [0, 2], [0]):
        chosen = relative[:, kept]
        weights = np.ones(len(target))
        solution = np.zeros(len(kept))
        for _ in range(50):
            root = np.sqrt(weights)
            solution = np.linalg.lstsq(chosen * root[:, None], root, rcond=None)[0]
            size = np.abs(chosen @ solution - 1)
            if not np.isinf(delta):
                weights = np.minimum(1.0, delta / np.maximum(size, 1e-12))
        objective = float(huber(chosen @ solution - 1, delta).sum())
        if (solution >= 0).all() and objective < best[0]:
            constants = np.zeros(3)
            constants[kept] = solution
            best = (objective, constants)
    return np.asarray(best[1])
