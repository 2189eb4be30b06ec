"""Fits and replays as plain data: what the command line prints and the API serves."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from typing import Any

import numpy as np

from coordinator.scaling.approach1 import fit_envelope
from coordinator.scaling.approach2 import IsoFlopFit, fit_isoflop
from coordinator.scaling.bands import INTERVAL_LEVEL_RATIO, LEAST_DRAWS, LEVEL_RATIO
from coordinator.scaling.columns import ALL, Selection
from coordinator.scaling.constants import GROUPS
from coordinator.scaling.determined import interval_warning
from coordinator.scaling.extrapolation import check_extrapolation
from coordinator.scaling.forecast import MIN_POINTS, Points, forecast_run, known_at, past_errors
from coordinator.scaling.laws import Form, LossLaw
from coordinator.scaling.observations import Convention, Observations, points_from_csv
from coordinator.scaling.study_fit import StudyFit
from protos.contract.errors import UsageError

_MAX_REPLAY_POINTS = 40
_RISE_RATIO = 0.02
"""Of the loss, above its lowest: more than evaluations on the same text differ by."""
_HORIZON_RATIOS = (2.0, 4.0, 8.0)


def chosen_value(flag: str, text: str, allowed: Sequence[str]) -> str:
    """`text` if it is allowed. Raises UsageError."""
    if text not in allowed:
        raise UsageError(f"{flag} {text}", allowed=", ".join(allowed), remedy="choose one of them")
    return text


def constants_of(law: LossLaw) -> dict[str, float]:
    """By the letters of the literature."""
    return {
        "E": law.e_nats,
        "A": law.a,
        "B": law.b,
        "alpha": law.alpha,
        "beta": law.beta,
        "kappa": law.kappa,
        "params_exponent": law.params_exponent,
    }


def published_rows() -> list[dict[str, Any]]:
    """Every published law as plain data, by group."""
    return [
        {
            "group": group,
            "name": name,
            "constants": _numbers(published.law),
            "unit": published.unit,
            "source": published.source,
            "confidence": published.confidence.value,
            "counting": published.counting,
            "note": published.note,
        }
        for group, table in GROUPS.items()
        for name, published in table.items()
    ]


def _numbers(law: Any) -> dict[str, float]:
    """Constants by name; those of a law inside a law as well."""
    if not is_dataclass(law):
        return {"value": float(law)}
    out: dict[str, float] = {}
    for field in fields(law):
        value = getattr(law, field.name)
        if is_dataclass(value):
            out |= _numbers(value)
        else:
            out[field.name] = float(value)
    return out


def isoflop_or_reason(table: Observations) -> tuple[IsoFlopFit | None, str]:
    """Approach 2, or why it cannot be had."""
    try:
        fit = fit_isoflop(table.params_n, table.tokens_d, table.compute_flop, table.loss_nats)
    except UsageError as error:
        return None, error.found
    return fit, fit.reason


def fit_report(
    study: StudyFit, compute_flop: Sequence[float], *, is_forced: bool = True
) -> dict[str, Any]:
    """A whole fit with optima at the computes asked for. Raises UsageError beyond what was measured
    unless forced.
    """
    said = [_extrapolation(study, compute, is_forced) for compute in compute_flop]
    optima = [_optimum(study, compute) for compute in compute_flop]
    said += [interval_warning(row["flop"], row["n_opt_low"], row["n_opt_high"]) for row in optima]
    assumed = assumed_constants(study.fit.form)
    return {
        "form": study.fit.form.value,
        "loss": study.fit.loss.value,
        "constants": constants_of(study.fit.law),
        "intervals": _intervals(study, assumed),
        "assumed": assumed,
        "interval_level_ratio": INTERVAL_LEVEL_RATIO,
        "objective": study.fit.objective,
        "num_starts": study.fit.num_starts,
        "num_starts_agreed": study.fit.num_starts_agreed,
        "num_rows": study.num_rows,
        "num_fitted": len(study.observations),
        "convention": study.observations.convention.value,
        "flop_per_param_token": study.flop_per_param_token,
        "largest_flop": study.largest_flop,
        "reasons": list(study.reasons),
        "forms": {
            form.value: {
                "constants": constants_of(fit.law),
                "objective": fit.objective,
                "held_out_error_ratio": _plain(study.held_out_errors[form]),
                "share": study.weights[form],
            }
            for form, fit in study.fits.items()
        },
        "allocation": {
            "form": study.allocation.form.value,
            "is_exponent_assumed": study.allocation.form.is_tied,
            "params_exponent": study.allocation.law.params_exponent,
            "tokens_exponent": study.allocation.law.tokens_exponent,
        },
        "band": {
            "level_ratio": LEVEL_RATIO,
            "scale_ratio": study.band.scale_ratio,
            "off_ratio": study.band.off_ratio,
            "num_past_errors": study.band.num_past_errors,
            "num_cuts": study.band.num_cuts,
        },
        "optima": optima,
        "warnings": [*study.warnings, *(text for text in said if text)],
        **_other_approaches(study.observations),
    }


def assumed_constants(form: Form) -> list[str]:
    """What a form fixes: the same in every draw, so not a finding of the table."""
    return ["kappa"] * (not form.is_general) + ["params_exponent"] * form.is_tied


def _intervals(study: StudyFit, assumed: Sequence[str]) -> dict[str, list[float]]:
    """Of the constants that were fitted; none below the least number of draws."""
    boot = study.boots.get(study.fit.form)
    if boot is None or len(boot.alpha) < LEAST_DRAWS:
        return {}
    return {name: list(ends) for name, ends in boot.intervals().items() if name not in assumed}


def _extrapolation(study: StudyFit, compute_flop: float, is_forced: bool) -> str:
    measured = study.smallest_flop, study.largest_flop
    return check_extrapolation(compute_flop, measured, law="this table", is_forced=is_forced)


def _optimum(study: StudyFit, compute_flop: float) -> dict[str, Any]:
    """N, D and losses are None where the table does not determine them."""
    if study.undetermined_reason:
        sizes = ("n_opt", "n_opt_low", "n_opt_high", "d_opt", "tokens_per_param")
        names = (*sizes, "loss", "loss_low", "loss_high")
        return {"flop": compute_flop, "is_determined": False, **dict.fromkeys(names)}
    found = study.optimum(compute_flop)
    best = found.optimum
    return {
        "flop": compute_flop,
        "is_determined": True,
        "n_opt": best.params_n,
        "n_opt_low": found.params_low,
        "n_opt_high": found.params_high,
        "d_opt": best.tokens_d,
        "tokens_per_param": best.tokens_d / best.params_n,
        "loss": best.loss_nats,
        "loss_low": found.loss_low_nats,
        "loss_high": found.loss_high_nats,
    }


def _other_approaches(table: Observations) -> dict[str, Any]:
    try:
        envelope = fit_envelope(table.params_n, table.compute_flop, table.loss_nats)
        first: dict[str, Any] = {
            "coefficient": envelope.law.coefficient,
            "exponent": envelope.law.exponent,
            "reason": envelope.reason,
        }
    except UsageError as error:
        first = {"refused": f"{error.found}; allowed: {error.allowed}"}
    isoflop, why = isoflop_or_reason(table)
    if isoflop is None:
        return {"approach1": first, "approach2": {"refused": why}}
    second = {
        "coefficient": isoflop.law.coefficient,
        "exponent": isoflop.law.exponent,
        "exponent_error": isoflop.exponent_error,
        "reason": isoflop.reason,
        "budgets": [
            {key: _plain(value) for key, value in asdict(budget).items() if key != "rows"}
            for budget in isoflop.budgets
        ],
    }
    return {"approach1": first, "approach2": second}


def predict_rows(
    study: StudyFit, text: str, *, name: str, is_forced: bool, selection: Selection = ALL
) -> dict[str, Any]:
    """Predicted losses of a table's rows, in its order, and how good they were where it says.

    N is counted as the fitted table counts it. Raises UsageError where rows that count otherwise do
    not know their head.
    """
    table, losses = points_from_csv(text, name=name, selection=selection)
    table, said_of_count = _counted_alike(table, study.observations.convention)
    params_n, tokens_d, compute_flop = table.params_n, table.tokens_d, table.compute_flop
    ends = (float(compute_flop.max()), float(compute_flop.min()))
    warnings = [said_of_count, *(_extrapolation(study, end, is_forced) for end in ends)]
    said = study.predict(params_n, tokens_d, compute_flop)
    rows = [
        {
            "N": float(params_n[i]),
            "D": float(tokens_d[i]),
            "C": float(compute_flop[i]),
            "loss_predicted": float(said.loss_nats[i]),
            "low": float(said.low_nats[i]),
            "high": float(said.high_nats[i]),
            "loss": None if losses is None else float(losses[i]),
        }
        for i in range(len(params_n))
    ]
    out: dict[str, Any] = {
        "predictions": rows,
        "warnings": [f"{name}: {text}" for text in warnings if text],
    }
    if losses is not None:
        error = np.abs(said.loss_nats / losses - 1)
        is_inside = (losses >= said.low_nats) & (losses <= said.high_nats)
        out["prediction_summary"] = {
            "num_rows": len(rows),
            "mean_abs_error_percent": 100 * float(error.mean()),
            "median_abs_error_percent": 100 * float(np.median(error)),
            "worst_abs_error_percent": 100 * float(error.max()),
            "coverage_ratio": float(is_inside.mean()),
            "mean_half_width_percent": 100
            * float(((said.high_nats - said.low_nats) / (2 * said.loss_nats)).mean()),
        }
    return out


def _counted_alike(table: Observations, wanted: Convention) -> tuple[Observations, str]:
    """(`table` counted the way of the fit, what is to be said of that). Raises UsageError."""
    own = table.convention
    if own is wanted:
        return table, ""
    if Convention.UNSTATED in (own, wanted):
        return table, (
            f"counts N as {own.value}, the fitted table as {wanted.value}: taken as the same, "
            "which is wrong by the head if it is not (a column convention says it)"
        )
    return table.converted(wanted), f"N and C are converted from {own.value} to {wanted.value}"


def points_of(table: Observations) -> Points:
    """As arrays."""
    return Points(
        params_n=table.params_n,
        tokens_d=table.tokens_d,
        compute_flop=table.compute_flop,
        loss_nats=table.loss_nats,
    )


def curve_warnings(points: Points) -> list[str]:
    """What is odd about one curve, in order of tokens. Raises UsageError where its loss rises on
    the whole: no law through it forecasts anything.
    """
    loss, tokens = points.loss_nats, points.tokens_d
    part = max(1, len(loss) // 4)
    first, last = float(np.median(loss[:part])), float(np.median(loss[-part:]))
    if last >= first:
        raise UsageError(
            f"a curve whose loss goes from {first:.4f} (first {part} of {len(loss)} points) to "
            f"{last:.4f} (last {part})",
            allowed="losses that fall with tokens: what rises, or stands, cannot be forecast",
            remedy="check the column and the order, or look at why the run diverges",
        )
    lowest = int(np.argmin(loss))
    if loss[-1] < loss[lowest] * (1 + _RISE_RATIO):
        return []
    return [
        f"the loss rises from {loss[lowest]:.4f} at {tokens[lowest]:.4g} tokens to {loss[-1]:.4f} "
        f"at the end, {tokens[-1]:.4g}: laws only fall, so forecasts from there on mean little"
    ]


@np.errstate(all="ignore")  # methods that fail on a piece of curve get no weight
def replay_report(
    curve: Observations, others: Observations | None
) -> tuple[dict[str, Any], Points]:
    """The run is the largest N of `curve`; its other sizes and `others` are what was known."""
    everything = curve
    if others is not None:
        everything = Observations.of(
            [*curve.rows, *others.rows],
            notes=dict.fromkeys([*curve.notes, *others.notes]),
            warnings=dict.fromkeys([*curve.warnings, *others.warnings]),
        )
    largest = float(curve.params_n.max())
    is_run = np.abs(np.log(curve.params_n / largest)) < 1e-3
    run = curve.where(is_run)
    rest = [row for row in everything.rows if abs(math.log(row.params_n / largest)) >= 1e-3]
    order = np.argsort(run.tokens_d)
    points = points_of(Observations(rows=tuple(run.rows[i] for i in order)))
    thin = np.unique(
        np.round(np.linspace(0, len(order) - 1, min(len(order), _MAX_REPLAY_POINTS))).astype(int)
    )
    points = points.where(np.isin(np.arange(len(order)), thin))
    if len(points.tokens_d) <= MIN_POINTS:
        raise UsageError(
            f"a curve of {len(points.tokens_d)} points of the largest size, {largest:.4g}",
            allowed=f"more than {MIN_POINTS} points of one run",
            remedy="record more evaluations",
        )
    warnings = [*everything.warnings, *curve_warnings(points)]
    known = points_of(Observations(rows=tuple(rest))) if rest else None
    all_past = past_errors(points, known, horizon_ratios=_HORIZON_RATIOS)
    final_tokens, final_loss = float(points.tokens_d[-1]), float(points.loss_nats[-1])
    rows = []
    laws: Mapping[Form, LossLaw] = {}
    for index in range(MIN_POINTS, len(points.tokens_d)):
        seen = points.where(np.arange(len(points.tokens_d)) < index)
        past = [error for error in all_past if error.truth_tokens <= seen.tokens_d[-1]]
        said = forecast_run(seen, final_tokens, others=known_at(known, seen), past=past, warm=laws)
        laws = said.laws
        rows.append(
            {
                "seen_tokens": float(seen.tokens_d[-1]),
                "seen_ratio": float(seen.tokens_d[-1]) / final_tokens,
                "loss_predicted": said.loss_nats,
                "low": said.low_nats,
                "high": said.high_nats,
                "error_percent": 100 * (said.loss_nats / final_loss - 1),
                "is_inside": bool(said.low_nats <= final_loss <= said.high_nats),
                "floor": said.floor_nats,
                "reason": said.reason,
            }
        )
    report = {
        "params_n": largest,
        "final_tokens": final_tokens,
        "final_loss": final_loss,
        "num_other_rows": len(rest),
        "forecasts": rows,
        "warnings": warnings,
        "notes": list(everything.notes),
        "by_horizon": [row for ratio in _HORIZON_RATIOS for row in _by_horizon(all_past, ratio)],
    }
    return report, points


def _by_horizon(past: Sequence[Any], ratio: float) -> list[dict[str, Any]]:
    errors: dict[str, list[float]] = {}
    for error in past:
        if abs(error.horizon_log - math.log(ratio)) <= 0.35:
            errors.setdefault(error.method, []).append(abs(error.error_log))
    return [
        {
            "horizon_ratio": ratio,
            "method": method,
            "num_forecasts": len(values),
            "median_abs_error_percent": 100 * float(np.median(values)),
        }
        for method, values in errors.items()
    ]


def _plain(value: Any) -> Any:
    """None for numbers that JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
