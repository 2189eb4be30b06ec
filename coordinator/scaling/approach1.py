"""Hoffmann's approach 1: the envelope of training curves (2203.15556, section 3.1).

At every compute the size of least loss among the curves; then ln N = ln k + a ln C through them.
Computes at which the smallest or the largest size wins say only that a better one may lie outside,
and are left out.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coordinator.scaling.laws import AllocationLaw
from protos.contract.errors import UsageError

Array = NDArray[np.float64]

_NUM_COMPUTES = 1500
_MIN_SIZES = 3
_SAME_SIZE_LOG = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvelopeFit:
    """N_opt(C) through the envelope, and the envelope: (m,) each."""

    law: AllocationLaw
    compute_flop: Array
    params_n: Array
    loss_nats: Array
    num_sizes: int
    reason: str


def size_groups(params_n: Array, tolerance_log: float = _SAME_SIZE_LOG) -> NDArray[np.int64]:
    """Number of the size that each row belongs to: sizes within 1 % are one, (n,)."""
    order = np.argsort(params_n)
    gaps = np.diff(np.log(params_n[order])) > tolerance_log
    groups = np.empty(len(params_n), dtype=np.int64)
    groups[order] = np.concatenate([[0], np.cumsum(gaps)])
    return groups


def fit_envelope(params_n: Array, compute_flop: Array, loss_nats: Array) -> EnvelopeFit:
    """Fit from curves: rows of one N at several C. Raises UsageError when there is no envelope."""
    log_c, log_l = np.log(compute_flop), np.log(loss_nats)
    grid = np.linspace(log_c.min(), log_c.max(), _NUM_COMPUTES)
    groups = size_groups(params_n)
    sizes, curves = [], []
    for group in range(groups.max() + 1):
        rows = np.flatnonzero(groups == group)
        rows = rows[np.argsort(log_c[rows])]
        if len(np.unique(log_c[rows])) < 2:
            continue
        curve = np.interp(grid, log_c[rows], log_l[rows], left=np.inf, right=np.inf)
        sizes.append(float(np.exp(np.log(params_n[rows]).mean())))
        curves.append(curve)
    if len(sizes) < _MIN_SIZES:
        raise UsageError(
            f"training curves of {len(sizes)} sizes",
            allowed=f"at least {_MIN_SIZES} sizes with two or more computes each",
            remedy="give every size at several computes",
        )
    stacked = np.stack(curves)
    is_covered = np.isfinite(stacked).sum(axis=0) >= 2
    winner = np.argmin(stacked, axis=0)
    is_inner = is_covered & (winner > 0) & (winner < len(sizes) - 1)
    won = np.unique(winner[is_inner])
    if len(won) < 2:
        raise UsageError(
            f"an envelope on which {len(won)} inner sizes win",
            allowed="at least 2 besides the smallest and the largest",
            remedy="train sizes on both sides of the best one",
        )
    params = np.array(sizes)[winner]
    exponent, offset = np.polyfit(grid[is_inner], np.log(params[is_inner]), 1)
    return EnvelopeFit(
        law=AllocationLaw(coefficient=float(np.exp(offset)), exponent=float(exponent)),
        compute_flop=np.exp(grid[is_inner]),
        params_n=params[is_inner],
        loss_nats=np.exp(stacked.min(axis=0)[is_inner]),
        num_sizes=len(sizes),
        reason=f"{len(won)} of {len(sizes)} sizes win somewhere inside the envelope, "
        f"from {np.exp(grid[is_inner][0]):.3g} to {np.exp(grid[is_inner][-1]):.3g} FLOP",
    )
