"""Hoffmann's approach 2: IsoFLOP parabolas (2203.15556, section 3.2), with rejections.

At one compute the loss over ln N is a parabola near its minimum; the minima of several computes
give ln N = ln k + a ln C. A budget is rejected, with the reason, when its minimum is not interior,
when its curvature or its tokens per parameter lie more than 3 MAD from those of the others: on the
Chinchilla points one budget of nine is such a case and moves the law. Biased even without noise
when alpha != beta or the grid is off centre (2603.22339): a picture and a check, not the decision.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from coordinator.scaling.approach1 import size_groups
from coordinator.scaling.frontier import NEAR_RATIO
from coordinator.scaling.laws import AllocationLaw
from protos.contract.errors import UsageError

Array = NDArray[np.float64]

_BUDGET_WIDTH_LOG = 0.1
_MIN_SIZES = 4
_MIN_BUDGETS = 3
_MAD_LIMIT_RATIO = 3.0
_MAD_TO_SIGMA = 1.4826
_LEAST_SPREAD_LOG = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """One compute: loss = loss_nats + curvature (ln N - ln params_n)^2, and its verdict."""

    compute_flop: float
    params_n: float
    tokens_d: float
    loss_nats: float
    curvature: float
    num_sizes: int
    is_accepted: bool
    reason: str
    rows: tuple[int, ...]
    """Which rows of the table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IsoFlopFit:
    """N_opt(C) through the accepted minima."""

    law: AllocationLaw
    exponent_error: float
    """Standard error of the exponent."""
    budgets: tuple[Budget, ...]
    reason: str


def fit_isoflop(
    params_n: Array, tokens_d: Array, compute_flop: Array, loss_nats: Array
) -> IsoFlopFit:
    """Fit from rows at shared computes. Raises UsageError when fewer than 3 budgets are good."""
    groups = size_groups(params_n)
    budgets = [
        _parabola(rows, groups, params_n, tokens_d, compute_flop, loss_nats)
        for rows in _budgets(groups, compute_flop)
    ]
    budgets = _reject_outliers(budgets)
    good = [budget for budget in budgets if budget.is_accepted]
    if len(good) < _MIN_BUDGETS:
        found = "; ".join(f"{b.compute_flop:.3g} FLOP: {b.reason}" for b in budgets[:8])
        raise UsageError(
            f"{len(good)} good IsoFLOP budgets of {len(budgets)}"
            + (f" ({found})" if found else ""),
            allowed=f"at least {_MIN_BUDGETS}, each with {_MIN_SIZES} sizes round a minimum",
            remedy="add sizes at equal compute",
        )
    log_c = np.log([budget.compute_flop for budget in good])
    log_n = np.log([budget.params_n for budget in good])
    exponent, offset = np.polyfit(log_c, log_n, 1)
    rest = log_n - exponent * log_c - offset
    degrees = max(len(good) - 2, 1)
    error = np.sqrt((rest**2).sum() / degrees / ((log_c - log_c.mean()) ** 2).sum())
    return IsoFlopFit(
        law=AllocationLaw(coefficient=float(np.exp(offset)), exponent=float(exponent)),
        exponent_error=float(error),
        budgets=tuple(budgets),
        reason=f"{len(good)} of {len(budgets)} budgets have an interior minimum like the others'",
    )


def _budgets(groups: NDArray[np.int64], compute_flop: Array) -> list[NDArray[np.int64]]:
    """Rows of equal compute (within 10 %), the windows with most sizes first taken."""
    log_c = np.log(compute_flop)
    left = np.ones(len(log_c), dtype=bool)
    found = []
    while left.any():
        best: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        best_count = 0
        for begin in np.unique(log_c[left]):
            rows = np.flatnonzero(left & (log_c >= begin) & (log_c <= begin + _BUDGET_WIDTH_LOG))
            count = len(np.unique(groups[rows]))
            if count > best_count:
                best, best_count = rows, count
        if best_count < _MIN_SIZES:
            break
        found.append(best)
        left[best] = False
    return sorted(found, key=lambda rows: float(log_c[rows].mean()))


def _parabola(
    rows: NDArray[np.int64],
    groups: NDArray[np.int64],
    params_n: Array,
    tokens_d: Array,
    compute_flop: Array,
    loss_nats: Array,
) -> Budget:
    near = rows[loss_nats[rows] <= loss_nats[rows].min() * (1 + NEAR_RATIO)]
    if len(np.unique(groups[near])) < _MIN_SIZES:
        near = rows[np.argsort(loss_nats[rows])][: max(_MIN_SIZES, len(near))]
    log_n = np.log(params_n[near])
    middle = log_n.mean()
    num_sizes = len(np.unique(groups[near]))
    compute = float(np.exp(np.log(compute_flop[rows]).mean()))
    product = float(np.median(params_n[rows] * (tokens_d[rows] / compute_flop[rows]))) * compute
    budget = Budget(
        compute_flop=compute,
        params_n=float(params_n[near][np.argmin(loss_nats[near])]),
        tokens_d=float("nan"),
        loss_nats=float(loss_nats[near].min()),
        curvature=float("nan"),
        num_sizes=num_sizes,
        is_accepted=False,
        reason=f"{num_sizes} sizes near the minimum, {_MIN_SIZES} are needed",
        rows=tuple(int(row) for row in near),
    )
    if num_sizes < _MIN_SIZES:
        return budget
    curvature, slope, offset = np.polyfit(log_n - middle, loss_nats[near], 2)
    if curvature <= 0:
        return replace(budget, curvature=float(curvature), reason="no minimum: curvature <= 0")
    log_best = middle - slope / (2 * curvature)
    sizes = np.unique(groups[near])
    size_logs = np.array([log_n[groups[near] == size].mean() for size in sizes])
    below, above = int((size_logs < log_best).sum()), int((size_logs > log_best).sum())
    best = float(np.exp(np.clip(log_best, log_n.min() - 5, log_n.max() + 5)))
    is_interior = below >= 1 and above >= 1
    return replace(
        budget,
        params_n=best,
        tokens_d=product / best,
        loss_nats=float(offset - slope**2 / (4 * curvature)),
        curvature=float(curvature),
        is_accepted=is_interior,
        reason=f"minimum between {below} smaller and {above} larger sizes"
        if is_interior
        else f"the minimum is not interior: {below} smaller and {above} larger sizes",
    )


def _reject_outliers(budgets: list[Budget]) -> list[Budget]:
    """Curvature and tokens per parameter against the other accepted budgets."""
    good = [budget for budget in budgets if budget.is_accepted]
    if len(good) < _MIN_BUDGETS + 1:
        return budgets
    log_c = np.log([budget.compute_flop for budget in good])
    bad: dict[float, str] = {}
    for title, values in (
        ("curvature", np.log([budget.curvature for budget in good])),
        ("tokens per parameter", np.log([b.tokens_d / b.params_n for b in good])),
    ):
        rest = _off_trend(log_c, values)
        spread = max(_MAD_TO_SIGMA * float(np.median(np.abs(rest))), _LEAST_SPREAD_LOG)
        for budget, off in zip(good, rest, strict=True):
            if abs(off) > _MAD_LIMIT_RATIO * spread:
                bad[budget.compute_flop] = (
                    f"{title} is {np.exp(off):.2f} times what the other budgets say, "
                    f"beyond {_MAD_LIMIT_RATIO:.0f} MAD"
                )
    return [
        replace(budget, is_accepted=False, reason=bad[budget.compute_flop])
        if budget.is_accepted and budget.compute_flop in bad
        else budget
        for budget in budgets
    ]


def _off_trend(x: Array, y: Array) -> Array:
    """Residuals from the Theil-Sen line: the median slope over all pairs."""
    first, second = np.triu_indices(len(x), k=1)
    steps = x[second] - x[first]
    slope = float(np.median((y[second] - y[first]) / np.where(steps == 0, np.inf, steps)))
    rest = y - slope * x
    return np.asarray(rest - np.median(rest))
