"""From a table of observations to laws, optima and predictions, with a reason for every choice.

Two ways in. A named additive or tied form is the literature's fit: all rows, equal weights. A named
general form, and `auto`, fit for extrapolation: rows near the frontier, the dearest
counting most, near-duplicates sharing one weight. `auto` names the form that extrapolated
best inside the table, predicts with all forms mixed by those errors (their mistakes differ, so the
mix beats each), and takes N_opt from the tied general form, whose N_opt moved least, unless the
form that it names missed the dearer rows by less than a quarter as much. Intervals of N_opt hold
the draws of all forms by their shares in the mix.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from coordinator.scaling.bands import (
    LEAST_DRAWS,
    Bootstrap,
    ErrorBand,
    bootstrap,
    pooled_interval,
    spread_log,
)
from coordinator.scaling.determined import (
    check_losses,
    explained_ratio,
    filtered_error,
    fit_warnings,
    undetermined_reason,
)
from coordinator.scaling.frontier import NEAR_RATIO, is_near_frontier
from coordinator.scaling.laws import Form, Optimum
from coordinator.scaling.observations import Observations
from coordinator.scaling.parametric import LawFit, Loss, fit_law
from coordinator.scaling.selection import (
    Errors,
    backtests,
    form_errors,
    form_weights,
    impossible_rows,
    off_frontier_log,
    row_weights,
)
from protos.contract.errors import UsageError

Array = NDArray[np.float64]

AUTO = "auto"
_TIED_REASON = (
    "; that form assumes alpha = beta, so N_opt ~ C^0.5 is an assumption here, not a finding"
)
_CLEAR_RATIO = 0.25
"""Of the tied general form's error: what a chosen form must stay below to give N_opt."""
DEFAULT_DRAWS = 400


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimumBand:
    """N_opt, D_opt and the loss there, with the 95 % interval of N (None below 20 draws), from the
    bootstrap draws of all forms by their shares, and the band of loss."""

    optimum: Optimum
    params_low: float | None
    params_high: float | None
    loss_low_nats: float
    loss_high_nats: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictions:
    """Losses of (N, D) points and their band, (m,) each."""

    loss_nats: Array
    low_nats: Array
    high_nats: Array


@dataclass(frozen=True, kw_only=True)
class StudyFit:
    """Everything that one table said."""

    observations: Observations
    """The rows that were fitted."""
    num_rows: int
    """Of the table, before anything was left out."""
    fit: LawFit
    """The chosen form: its constants are those shown."""
    fits: Mapping[Form, LawFit]
    weights: Mapping[Form, float]
    """Shares of the forms in a prediction."""
    allocation: LawFit
    """Where N_opt and D_opt come from."""
    held_out_errors: Mapping[Form, float]
    """Mean absolute error of each form on dearer rows than it had seen; nan when untested."""
    boots: Mapping[Form, Bootstrap]
    band: ErrorBand
    reasons: tuple[str, ...]
    warnings: tuple[str, ...]
    undetermined_reason: str
    """Why these rows do not say what N is best; "" if they do."""
    flop_per_param_token: float

    @property
    def smallest_flop(self) -> float:
        """Smallest compute that was fitted."""
        return float(self.observations.compute_flop.min())

    @property
    def largest_flop(self) -> float:
        """Largest compute that was fitted."""
        return float(self.observations.compute_flop.max())

    def predict(self, params_n: Array, tokens_d: Array, compute_flop: Array) -> Predictions:
        """Losses of points (m,) with a 90 % band."""
        used = [form for form in self.fits if self.weights.get(form, 0.0) > 0]
        shares = np.array([self.weights[form] for form in used])
        logs = np.array([np.log(self.fits[f].law.loss_nats(params_n, tokens_d)) for f in used])
        drawn = np.zeros_like(logs)
        for row, form in zip(drawn, used, strict=True):
            boot = self.boots.get(form)
            if boot is not None and len(boot.alpha) >= LEAST_DRAWS:
                low, high = np.percentile(boot.log_loss(params_n, tokens_d), [5, 95], axis=0)
                row[:] = (high - low) / 2
        log_loss = shares @ logs
        half = self.band.half_width_log(
            np.log(compute_flop / self.largest_flop),
            off_frontier_log(self.fit.law, params_n, tokens_d, compute_flop),
            span_log=float(np.log(self.largest_flop / self.observations.compute_flop.min())),
            other_std_log=spread_log(logs, shares, drawn),
        )
        return Predictions(
            loss_nats=np.exp(log_loss),
            low_nats=np.exp(log_loss - half),
            high_nats=np.exp(log_loss + half),
        )

    def optimum(self, compute_flop: float) -> OptimumBand:
        """The best N and D of a compute, the loss there, and how sure that is."""
        k = self.flop_per_param_token
        best = self.allocation.law.optimum(compute_flop, flop_per_param_token=k)
        at = self.predict(
            np.array([best.params_n]), np.array([best.tokens_d]), np.array([compute_flop])
        )
        low = high = None
        used = [form for form in self.boots if len(self.boots[form].alpha) >= LEAST_DRAWS]
        if used:
            drawn = pooled_interval(
                [self.boots[form].log_optimal_params(compute_flop, k) for form in used],
                [self.weights[form] for form in used],
            )
            low = min(float(np.exp(drawn[0])), best.params_n)
            high = max(float(np.exp(drawn[1])), best.params_n)
        return OptimumBand(
            optimum=replace(best, loss_nats=float(at.loss_nats[0])),
            params_low=low,
            params_high=high,
            loss_low_nats=float(at.low_nats[0]),
            loss_high_nats=float(at.high_nats[0]),
        )


@np.errstate(all="ignore")  # what comes of it is looked at (determined.py)
def fit_observations(
    table: Observations,
    *,
    form: Form | None = None,
    loss: Loss = Loss.HUBER,
    max_flop: float = float("inf"),
    near_ratio: float | None = None,
    num_draws: int = DEFAULT_DRAWS,
    seed: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> StudyFit:
    """Fit a table; `form` None is auto, `near_ratio` None the way of the form (inf: all rows).

    Raises UsageError for rows that cannot fix the constants.
    """
    is_classic = form in (Form.ADDITIVE, Form.TIED)
    if near_ratio is None:
        near_ratio = float("inf") if is_classic else NEAR_RATIO
    forms = tuple(Form) if form is None else (form,)
    check_losses(table)
    within, near, reasons = _near_rows(table, max_flop, near_ratio, is_screened=not is_classic)
    weights = None if is_classic else row_weights(near.params_n, near.tokens_d, near.compute_flop)
    forms, reasons = _affordable(near, forms, form, reasons)
    progress(f"fitting {len(near):,} rows")
    try:
        fits = _fits(near, forms, loss, seed, weights)
    except UsageError as error:
        raise filtered_error(error, len(near), len(within), len(table), near_ratio) from error
    fit_warnings(max(fits.values(), key=lambda fit: explained_ratio(fit, near)), near)
    progress("trying the forms on dearer rows than they have seen")
    tests = backtests(
        within.params_n,
        within.tokens_d,
        within.compute_flop,
        within.loss_nats,
        forms=forms,
        loss=loss,
        near_ratio=near_ratio,
        is_weighted=not is_classic,
        seed=seed,
    )
    errors = form_errors(tests)
    shares = form_weights(errors, num_rows=len(near))
    chosen, why = _choose(forms, errors, form, tests)
    allocation = _allocation_form(errors, chosen, form)
    progress(f"refitting {num_draws} draws for the intervals")
    boots = {
        each: bootstrap(
            fits[each], near.params_n, near.tokens_d, near.loss_nats,
            num_draws=num_draws, seed=seed, weights=weights,
        )
        for each in forms
        if num_draws > 0 and (shares[each] > 0.01 or each in (chosen, allocation))
    }  # fmt: skip
    band = ErrorBand.of(_mixed(tests, shares))
    reasons += [why, f"bands: {band.reason}"]
    reasons += _allocation_reasons(allocation, chosen, form)
    warnings = [*table.warnings, *fit_warnings(fits[chosen], near)]
    k = near.flop_per_param_token()
    undetermined = undetermined_reason(fits[allocation], near, k)
    said = f"N_opt and D_opt are not determined by these rows: {undetermined}"
    warnings += [said] * bool(undetermined)
    return StudyFit(
        observations=near,
        num_rows=len(table),
        fit=fits[chosen],
        fits=fits,
        weights=shares,
        allocation=fits[allocation],
        held_out_errors=errors,
        boots=boots,
        band=band,
        reasons=tuple(reasons),
        warnings=tuple(warnings),
        undetermined_reason=undetermined,
        flop_per_param_token=k,
    )


def _near_rows(
    table: Observations, max_flop: float, near_ratio: float, *, is_screened: bool
) -> tuple[Observations, Observations, list[str]]:
    """(usable rows, those of them near the frontier, what was left out)."""
    within, reasons = _usable(table, max_flop, is_screened=is_screened)
    near = within.where(
        is_near_frontier(within.compute_flop, within.loss_nats, near_ratio=near_ratio)
    )
    if len(near) < len(within):
        reasons.append(
            f"{len(within) - len(near)} rows are more than {100 * near_ratio:.0f} % above the best "
            "loss at their compute and left out"
        )
    return within, near, reasons


def _fits(
    near: Observations, forms: tuple[Form, ...], loss: Loss, seed: int, weights: Array | None
) -> dict[Form, LawFit]:
    rows = near.params_n, near.tokens_d, near.loss_nats
    return {
        form: fit_law(*rows, form=form, loss=loss, seed=seed, weights=weights) for form in forms
    }


def _usable(
    table: Observations, max_flop: float, *, is_screened: bool
) -> tuple[Observations, list[str]]:
    """Rows within `max_flop` without impossible ones, and what was left out."""
    reasons = list(table.notes)
    within = table.where(table.compute_flop <= max_flop * (1 + 1e-9))
    if not len(within):
        raise UsageError(
            f"no row with at most {max_flop:.3g} FLOP; the least has "
            f"{table.compute_flop.min() if len(table) else float('nan'):.3g}",
            allowed="a --max-flop that leaves rows to fit",
            remedy="raise --max-flop",
        )
    if len(within) < len(table):
        reasons.append(f"{len(table) - len(within)} rows above {max_flop:.3g} FLOP are kept apart")
    if is_screened:
        is_bad = impossible_rows(within.compute_flop, within.loss_nats)
        if is_bad.any():
            reasons.append(
                f"{int(is_bad.sum())} rows have losses below those of all others with more "
                "compute; taken for mistakes and left out"
            )
            within = within.where(~is_bad)
    return within, reasons


def _affordable(
    near: Observations, forms: tuple[Form, ...], asked: Form | None, reasons: list[str]
) -> tuple[tuple[Form, ...], list[str]]:
    """In auto, the forms that the number of points can fix with one to spare."""
    if asked is not None:
        return forms, reasons
    cells = {
        *zip(
            np.round(np.log(near.params_n), 6).tolist(),
            np.round(np.log(near.tokens_d), 6).tolist(),
            strict=True,
        )
    }
    kept = tuple(each for each in forms if each.num_constants < len(cells))
    dropped = [each.value for each in forms if each not in kept]
    if kept and dropped:
        reasons = [
            *reasons,
            f"{len(cells)} points near the frontier are too few for: {', '.join(dropped)}",
        ]
    return kept or (Form.TIED,), reasons


def _choose(
    forms: tuple[Form, ...],
    errors: Mapping[Form, float],
    asked: Form | None,
    tests: Mapping[Form, Sequence[Errors]],
) -> tuple[Form, str]:
    num_cuts = len(next(iter(tests.values())))
    if asked is not None:
        said = (
            f" (mean error {100 * errors[asked]:.2f} % on dearer rows than it had seen, "
            f"{num_cuts} cuts)" if num_cuts else ""
        )  # fmt: skip
        return asked, f"the {asked.value} form was asked for{said}"
    if not num_cuts:
        chosen = Form.GENERAL_TIED if Form.GENERAL_TIED in forms else forms[-1]
        return chosen, (
            f"{chosen.value}: too few rows to try the forms on dearer rows than they had seen; "
            "on public sweeps it extrapolated well and has few constants"
        )
    chosen = min(forms, key=lambda each: errors[each])
    others = ", ".join(
        f"{each.value} {100 * errors[each]:.2f} %" for each in forms if each is not chosen
    )
    return chosen, (
        f"{chosen.value}: fitted to the cheaper part and tried on the dearer part of {num_cuts} "
        f"cuts of the table it was wrong by {100 * errors[chosen]:.2f} %, against {others}; "
        "predictions mix the forms by 1 / error^2, here and (from 30 rows) on public sweeps"
    )


def _allocation_form(errors: Mapping[Form, float], chosen: Form, asked: Form | None) -> Form:
    tied = Form.GENERAL_TIED
    is_clear = tied not in errors or errors[chosen] < _CLEAR_RATIO * errors[tied]
    return chosen if asked is not None or is_clear else tied


def _allocation_reasons(allocation: Form, chosen: Form, asked: Form | None) -> list[str]:
    found = f"N_opt and D_opt come from the {allocation.value} form"
    if asked is None and allocation is chosen is not Form.GENERAL_TIED:
        found += ": the others missed the dearer rows by far more, or cannot be had"
    elif asked is None:
        found += ": on public sweeps its N_opt moved least (x1.05) when the dearer half was added"
    if allocation.is_tied:
        return [found + _TIED_REASON]
    return [found] if asked is None else []


def _mixed(tests: Mapping[Form, Sequence[Errors]], shares: Mapping[Form, float]) -> list[Errors]:
    """Errors that the mix of forms would have made at every cut."""
    out = []
    first = int(np.argmax([shares[form] for form in tests]))
    for of_cut in zip(*tests.values(), strict=True):
        total = np.sum(
            [shares[form] * errors.error_log for form, errors in zip(tests, of_cut, strict=True)],
            axis=0,
        )
        out.append(replace(of_cut[first], error_log=np.asarray(total)))
    return out
