"""Which rows a fit uses, which form it takes, and how far it has been wrong: all by extrapolation.

A form is judged by what it is for: fit the cheaper part of the compute, predict the dearer part.
The additive law fits well inside and extrapolates worst; kappa free does better, tied better for
N_opt. Several cuts are made; every error made on the way is kept, because the same errors, at the
same ratio of computes, are what the prediction band is made of (`bands.py`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coordinator.scaling.approach1 import size_groups
from coordinator.scaling.frontier import is_near_frontier
from coordinator.scaling.laws import Form, LossLaw
from coordinator.scaling.parametric import Loss, check_rows, fit_law
from protos.contract.errors import UsageError

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

AGE_EXPONENT = 0.5
"""Weight of a row = (its compute / the largest)^this."""
PUBLIC_ERROR_RATIO = {
    Form.ADDITIVE: 0.0166,
    Form.TIED: 0.0160,
    Form.GENERAL: 0.0099,
    Form.GENERAL_TIED: 0.0120,
}
"""Median error over eleven public sweeps, fitted to the cheaper and tried on the dearer half."""
MIN_ROWS_FOR_PUBLIC = 30
"""With fewer rows the experience of those sweeps, which had more, does not carry over."""
CUT_QUANTILES = (0.2, 0.4, 0.6, 0.8)
"""Where the computes of a table are cut into cheaper and dearer."""
_WEIGHT_POWER = 2.0
_MIN_DEARER_ROWS = 3
_SPARE_ROWS = 3
_MIN_SPAN_LOG = 0.6
"""Nearly a doubling of compute: within one budget N and D are tied, and no law can be had."""
_TEST_STARTS = 8
_WINDOW_RATIO = 8.0
_TOP_WINDOW_RATIO = 4.0
_PIECE_LOG, _CHAIN_LOG = 0.01, 0.1
_TOO_LOW_RATIO = 0.97
_TOO_LOW_AT_TOP_RATIO = 0.75


@dataclass(frozen=True, slots=True, kw_only=True)
class Errors:
    """Errors of one form on rows that it had not seen; (m,) each."""

    cut_flop: float
    """Largest compute that it had seen."""
    span_log: float
    """ln(largest / least compute that it had seen)."""
    horizon_log: Array
    """ln(C / cut)."""
    off_log: Array
    """ln(loss / best loss at that compute): how far from the frontier the row is."""
    error_log: Array
    """ln(predicted / measured)."""
    is_near: Mask

    @property
    def mean_ratio(self) -> float:
        """Mean absolute error of the rows near the frontier (of all, if none is)."""
        rows = self.is_near if self.is_near.any() else np.ones_like(self.is_near)
        return float(np.abs(self.error_log[rows]).mean())


def impossible_rows(compute_flop: Array, loss_nats: Array) -> Mask:
    """True for rows whose loss is too low to be true: they would pull the frontier down, (n,).

    Such a row beats by 3 % every one of at least three others with up to 8 times its compute; at
    the top, where nothing dearer exists, by 25 % all with a quarter of it or more.
    """
    order = np.argsort(compute_flop)
    compute, loss = compute_flop[order], loss_nats[order]
    same = np.searchsorted(compute, compute)  # the first of the same compute
    last = np.searchsorted(compute, compute * _WINDOW_RATIO, side="right")
    clearly = np.searchsorted(compute, compute * 1.5, side="right")
    near = np.searchsorted(compute, compute / _TOP_WINDOW_RATIO)
    found = np.zeros(len(loss), dtype=bool)
    for index in range(len(loss)):
        if last[index] - same[index] - 1 >= 3:
            is_low = loss[index] < _TOO_LOW_RATIO * _least_other(
                loss, same[index], index, last[index]
            )
            found[order[index]] = is_low and last[index] - clearly[index] >= 2
        elif len(loss) - near[index] - 1 >= 3:
            least = _least_other(loss, near[index], index, len(loss))
            found[order[index]] = loss[index] < _TOO_LOW_AT_TOP_RATIO * least
    return found


def _least_other(loss: Array, first: int, index: int, last: int) -> float:
    """Least of loss[first:last] without loss[index]."""
    before, after = loss[first:index], loss[index + 1 : last]
    return min(float(part.min()) for part in (before, after) if len(part))


def row_weights(params_n: Array, tokens_d: Array, compute_flop: Array) -> Array:
    """The square root of the compute's share of the largest; near-duplicates share one, (n,).

    The law is only locally true: what lies nearest to the extrapolation counts most.
    """
    weights = (compute_flop / compute_flop.max()) ** AGE_EXPONENT
    groups = _near_groups(tokens_d)
    cells = _near_groups(params_n) * (groups.max() + 1) + groups
    _, cell, counts = np.unique(cells, return_inverse=True, return_counts=True)
    return np.asarray(weights / counts[cell])


def _near_groups(values: Array) -> NDArray[np.int64]:
    """Number of the group of near values, (n,). Where they lie so densely that neighbours chain
    into a long group, it is cut into pieces of 1 %: they are no duplicates of one another."""
    groups = size_groups(values)
    logs = np.log(values)
    low, high = np.full(groups.max() + 1, np.inf), np.full(groups.max() + 1, -np.inf)
    np.minimum.at(low, groups, logs)
    np.maximum.at(high, groups, logs)
    is_long = (high - low)[groups] > _CHAIN_LOG
    pieces = np.where(is_long, np.floor((logs - low[groups]) / _PIECE_LOG).astype(np.int64), 0)
    _, found = np.unique(groups * (pieces.max() + 1) + pieces, return_inverse=True)
    return np.asarray(found, dtype=np.int64)


def backtests(
    params_n: Array,
    tokens_d: Array,
    compute_flop: Array,
    loss_nats: Array,
    *,
    forms: Sequence[Form],
    loss: Loss,
    near_ratio: float,
    is_weighted: bool,
    seed: int,
) -> dict[Form, list[Errors]]:
    """Every form fitted below every cut and tried above it; cuts without enough rows are left out.

    All forms get the same cuts and rows. Nothing above a cut is used below it.
    """
    log_c = np.log(compute_flop)
    levels = np.unique(np.round(log_c, 2))
    cuts = np.unique([np.quantile(levels, q, method="lower") for q in CUT_QUANTILES]) + 0.006
    out: dict[Form, list[Errors]] = {form: [] for form in forms}
    needed = max(form.num_constants for form in forms) + _SPARE_ROWS
    is_near_all = is_near_frontier(compute_flop, loss_nats)
    for cut in cuts:
        below = np.flatnonzero(log_c <= cut)
        below = below[
            is_near_frontier(compute_flop[below], loss_nats[below], near_ratio=near_ratio)
        ]
        dearer = log_c > cut
        if len(below) < needed or (dearer & is_near_all).sum() < _MIN_DEARER_ROWS:
            continue
        top = float(compute_flop[below].max())
        span_log = float(np.log(top / compute_flop[below].min()))
        if span_log < _MIN_SPAN_LOG:
            continue
        rows = params_n[below], tokens_d[below]
        try:
            for form in forms:
                check_rows(*rows, form)
        except UsageError:
            continue  # a cut without enough sizes says nothing about any form
        weights = row_weights(*rows, compute_flop[below]) if is_weighted else None
        for form in forms:
            fit = fit_law(
                *rows, loss_nats[below], form=form, loss=loss, seed=seed, weights=weights,
                tolerance=1e-5, num_starts=_TEST_STARTS,
            )  # fmt: skip
            predicted = fit.law.loss_nats(params_n[dearer], tokens_d[dearer])
            out[form].append(
                Errors(
                    cut_flop=top,
                    span_log=span_log,
                    horizon_log=log_c[dearer] - np.log(top),
                    off_log=off_frontier_log(
                        fit.law, params_n[dearer], tokens_d[dearer], compute_flop[dearer]
                    ),
                    error_log=np.log(predicted / loss_nats[dearer]),
                    is_near=is_near_all[dearer],
                )
            )
    return out


def off_frontier_log(law: LossLaw, params_n: Array, tokens_d: Array, compute_flop: Array) -> Array:
    """ln(predicted loss / predicted best loss at that compute), at least 0, (n,)."""
    per_token = float(np.median(compute_flop / (params_n * tokens_d)))
    best = law.frontier_nats(compute_flop, flop_per_param_token=per_token)
    return np.asarray(np.maximum(np.log(law.loss_nats(params_n, tokens_d)) - np.log(best), 0.0))


def form_errors(tests: Mapping[Form, Sequence[Errors]]) -> dict[Form, float]:
    """Mean over the cuts of each form's error near the frontier; nan without a cut."""
    return {
        form: float(np.mean([errors.mean_ratio for errors in found])) if found else float("nan")
        for form, found in tests.items()
    }


def form_weights(errors: Mapping[Form, float], *, num_rows: int) -> dict[Form, float]:
    """Shares of the forms in a prediction; sum 1.

    Proportional to 1 / error^2 inside this table and, from 30 rows on, to 1 / error^2 on public
    sweeps as well; without any cut all errors inside the table count as equal.
    """
    raw = {}
    for form, error in errors.items():
        raw[form] = 1.0 if np.isnan(error) else max(error, 1e-4) ** -_WEIGHT_POWER
        if num_rows >= MIN_ROWS_FOR_PUBLIC:
            raw[form] *= PUBLIC_ERROR_RATIO[form] ** -_WEIGHT_POWER
    return {form: value / sum(raw.values()) for form, value in raw.items()}
