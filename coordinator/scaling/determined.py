"""What a table does not tell: fits that explain nothing are refused, unfounded optima are named.

A law always comes out of a fit. Whether the losses follow it at all, and whether the best N is
inside what was tried, is looked at here.
"""

import numpy as np
from numpy.typing import NDArray

from coordinator.scaling.laws import PLAIN_FLOP_PER_PARAM_TOKEN
from coordinator.scaling.observations import Observations
from coordinator.scaling.parametric import LawFit
from coordinator.scaling.solver import MAX_EXPONENT, MIN_EXPONENT
from protos.contract.errors import UsageError

Array = NDArray[np.float64]

_LEAST_SPREAD_RATIO = 1e-3
"""Losses that differ by less are one loss: seeds differ by as much."""
_LEAST_EXPLAINED_RATIO = 0.25
_WELL_EXPLAINED_RATIO = 0.6
_TOGETHER_CORRELATION = 0.995
_ODD_PRODUCT_RATIO = 2.0
"""Of C to 6 N D, either way."""
_MOST_OUTSIDE_RATIO = 10.0
_AT_BOUND_RATIO = 1.01
_WIDE_INTERVAL_RATIO = 100.0


def check_losses(table: Observations) -> None:
    """Raises UsageError when all losses are the same."""
    low, high = float(table.loss_nats.min()), float(table.loss_nats.max())
    if len(table) > 1 and high / low - 1 < _LEAST_SPREAD_RATIO:
        raise UsageError(
            f"{len(table)} losses between {low:.6g} and {high:.6g}",
            allowed="losses that fall with N and with D; these do not depend on either",
            remedy="check the column, or measure models that differ more",
        )


def explained_ratio(fit: LawFit, table: Observations) -> float:
    """1 - median |ln predicted / measured| over the median deviation of ln loss from its median."""
    logs = np.log(table.loss_nats)
    spread = float(np.median(np.abs(logs - np.median(logs))))
    predicted = fit.law.loss_nats(table.params_n, table.tokens_d)
    missed = float(np.median(np.abs(np.log(predicted) - logs)))
    return 1 - missed / spread if spread > 0 and np.isfinite(missed) else 0.0


def fit_warnings(fit: LawFit, table: Observations) -> list[str]:
    """What a fit leaves open. Raises UsageError when it explains nothing."""
    explained = explained_ratio(fit, table)
    if explained < _LEAST_EXPLAINED_RATIO:
        raise UsageError(
            f"the best {fit.form.value} law through {len(table)} rows explains {explained:.0%} of "
            "the spread of their losses",
            allowed=f"at least {_LEAST_EXPLAINED_RATIO:.0%}: losses that fall with N and with D",
            remedy="look for wrong columns, mixed experiments or diverged runs; other losses and "
            "forms (--form, --near-ratio) may find more in them",
        )
    found = []
    if explained < _WELL_EXPLAINED_RATIO:
        found.append(
            f"the law explains only {explained:.0%} of the spread of the losses: noise, or several "
            "experiments in one table"
        )
    per_token = table.flop_per_param_token()
    if not 1 / _ODD_PRODUCT_RATIO <= per_token / PLAIN_FLOP_PER_PARAM_TOKEN <= _ODD_PRODUCT_RATIO:
        found.append(
            f"C is {per_token:.3g} N D in these rows (median), far from the usual 6 N D: it is "
            "taken as it stands; check units and what N, D and C count"
        )
    return found


def undetermined_reason(fit: LawFit, table: Observations, flop_per_param_token: float) -> str:
    """Why the table does not say what N is best; "" if it does."""
    exponents = {"N": fit.theta[2]} if fit.form.is_tied else {"N": fit.theta[2], "D": fit.theta[4]}
    for title, exponent in exponents.items():
        if exponent <= MIN_EXPONENT * _AT_BOUND_RATIO:
            return f"the losses do not fall with {title}: its exponent is at the bound of the fit"
        if exponent >= MAX_EXPONENT / _AT_BOUND_RATIO:
            return f"the exponent of {title} is at the bound of the fit, {MAX_EXPONENT:g}"
    together = float(np.corrcoef(np.log(table.params_n), np.log(table.tokens_d))[0, 1])
    if together >= _TOGETHER_CORRELATION:
        return (
            f"N and D rise together (correlation {together:.3f}): losses can be predicted along "
            "that line, but what N would be best is not in these rows"
        )
    middle = float(np.exp(np.log(table.compute_flop).mean()))
    try:
        best = fit.law.optimum(middle, flop_per_param_token=flop_per_param_token).params_n
    except UsageError as error:
        return error.found
    low, high = float(table.params_n.min()), float(table.params_n.max())
    if not low / _MOST_OUTSIDE_RATIO <= best <= high * _MOST_OUTSIDE_RATIO:
        return (
            f"the fit puts the best N of {middle:.3g} FLOP at {best:.3g}, far from every size that "
            f"was measured ({low:.3g} to {high:.3g})"
        )
    return ""


def interval_warning(compute_flop: float, low: float | None, high: float | None) -> str:
    """ "" unless an interval of N_opt says nothing."""
    if low is None or high is None or high <= low * _WIDE_INTERVAL_RATIO:
        return ""
    return (
        f"the best N of {compute_flop:.3g} FLOP is hardly determined: between {low:.3g} and "
        f"{high:.3g} (95 %)"
    )


def filtered_error(
    error: UsageError, num_near: int, num_within: int, num_rows: int, near_ratio: float
) -> UsageError:
    """`error` of the rows near the frontier, which names the filter if that took rows away."""
    if num_near == num_within:
        return error
    return UsageError(
        f"{error.found}, after {num_within - num_near} of {num_rows} rows were left out because "
        f"they lie more than {100 * near_ratio:.3g} % above the best loss at their compute"
        + (f" ({num_rows - num_within} others for other reasons)" * (num_rows > num_within)),
        allowed=error.allowed,
        remedy="keep more rows with --near-ratio (inf: all), choose --form tied or additive, which "
        "take all, or add rows near the frontier",
    )
