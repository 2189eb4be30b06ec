"""A law to plan with, fitted on own runs."""

import numpy as np

from coordinator.scaling.laws import AllocationLaw
from coordinator.scaling.observations import Convention, Observations
from coordinator.scaling.plan_law import PlanLaw
from coordinator.scaling.study_fit import StudyFit, fit_observations
from protos.contract.errors import UsageError


def observed_law(table: Observations, *, name: str, seed: int = 0) -> PlanLaw:
    """Fit a table and plan with it: N from the fit's allocation, loss and bands from its forms.

    N must be counted as Muster counts it, so a table without the head is converted. Raises
    UsageError for rows that cannot be converted or cannot fix the constants.
    """
    if table.convention is Convention.NON_EMBEDDING:
        table = table.converted(Convention.MATMUL)
    fit = fit_observations(table, seed=seed)
    if fit.undetermined_reason:
        raise UsageError(
            f"{name} does not say what N is best: {fit.undetermined_reason}",
            allowed="rows of at least three sizes on both sides of the best, at several computes",
            remedy="add such rows (study create measures them), or plan with a published --law",
        )
    warnings = fit.warnings
    if table.convention is Convention.UNSTATED:
        warnings = (
            *warnings,
            f"{name} does not say what N counts; taken as matrices and head without the input "
            "embedding, as Muster counts",
        )
    return PlanLaw(
        name=name,
        loss_law=fit.fit.law,
        allocation=_allocation(fit),
        smallest_flop=fit.smallest_flop,
        largest_flop=fit.largest_flop,
        source=f"{len(fit.observations)} of {fit.num_rows} rows of own runs; N from the "
        f"{fit.allocation.form.value} form, loss from the {fit.fit.form.value} form",
        band_ratio_at=lambda compute_flop: _band_ratio(fit, compute_flop),
        band_reason="the band comes from how far such fits missed dearer runs of the same table",
        params_interval_at=lambda compute_flop: _interval(fit, compute_flop),
        fit_reasons=tuple(fit.reasons),
        warnings=warnings,
    )


def _allocation(fit: StudyFit) -> AllocationLaw:
    """N_opt of C with the table's own C / (N D), which counts attention where the table does: the
    planner, which searches with 6, gets the same N as `study fit` shows."""
    law = fit.allocation.law
    one = law.optimum(fit.largest_flop, flop_per_param_token=fit.flop_per_param_token).params_n
    exponent = law.params_exponent
    return AllocationLaw(coefficient=one / fit.largest_flop**exponent, exponent=exponent)


def _band_ratio(fit: StudyFit, compute_flop: float) -> float:
    k = fit.flop_per_param_token
    best = fit.allocation.law.optimum(compute_flop, flop_per_param_token=k)
    found = fit.predict(
        np.array([best.params_n]), np.array([best.tokens_d]), np.array([compute_flop])
    )
    width = float(found.high_nats[0] - found.low_nats[0])
    return width / 2 / float(found.loss_nats[0])


def _interval(fit: StudyFit, compute_flop: float) -> tuple[float, float]:
    best = fit.optimum(compute_flop)
    assert best.params_low is not None and best.params_high is not None  # of 400 draws
    return best.params_low, best.params_high
