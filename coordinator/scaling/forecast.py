"""The loss of a run in progress at the end of its budget, with a band, after every evaluation.

Four methods, mixed by the errors that each has made so far:

- general, general-tied: the two laws through all observations, this run's points included; those
  to trust while the run is in its steep early phase (weighing them apart, not as one mean, took
  the error from a quarter of the run from 1.70 to 1.68 % on our sweep and from 0.71 to 0.68 % on
  Porian's);
- hybrid: the floor E_N = L(N, inf) of the two laws, and (L - E_N) ~ D^-b through the run's last
  three points; best on long runs, fooled on young ones, so only from 10 tokens per parameter;
- own: L = E + K D^-b through this run alone, averaged over E by how well each E fits; all there is
  when no other size has been trained.

The band is split-conformal: the quantile of past absolute log errors per e-fold of tokens (of this
run and of others), never below what public curves showed, 1.35 % per e-fold, nor below 0.5 %.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from coordinator.scaling.bands import FLOOR_RATIO, LEVEL_RATIO, conformal_quantile
from coordinator.scaling.frontier import is_near_frontier
from coordinator.scaling.laws import Form, LossLaw
from coordinator.scaling.parametric import check_rows, fit_law
from coordinator.scaling.selection import row_weights
from protos.contract.errors import UsageError

Array = NDArray[np.float64]

MIN_POINTS = 4
HYBRID_TOKENS_PER_PARAM = 10.0
PUBLIC_SCORE_RATIO = 0.0135
"""90 % half-width per e-fold of tokens on 263 forecasts of public constant-rate curves (0.9, 1.6,
2.8 % at 2, 4, 8 times the tokens)."""
COOLDOWN_RATIO = 0.2
"""Share of the whole that the cooldown takes: it begins when a quarter of the spent remains."""
_HYBRID_POINTS = 3
_NUM_FLOORS = 60
_MIN_SIZES = 3
_NEWEST_LOG = float(np.log(8.0))
_MIN_ERRORS_FOR_CONFORMAL = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class Points:
    """Observations as arrays, (n,) each."""

    params_n: Array
    tokens_d: Array
    compute_flop: Array
    loss_nats: Array

    def where(self, mask: NDArray[np.bool_]) -> "Points":
        """The rows of a mask."""
        return Points(
            params_n=self.params_n[mask],
            tokens_d=self.tokens_d[mask],
            compute_flop=self.compute_flop[mask],
            loss_nats=self.loss_nats[mask],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PastError:
    """One forecast that has met its truth."""

    method: str
    horizon_log: float
    error_log: float
    truth_tokens: float
    """When the truth was known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunForecast:
    """Forecast of one run at `tokens_d`."""

    tokens_d: float
    loss_nats: float
    low_nats: float
    high_nats: float
    floor_nats: float
    """What this size approaches with endless data, by the method that knows most."""
    loss_by_method: Mapping[str, float] = field(default_factory=dict)
    weight_by_method: Mapping[str, float] = field(default_factory=dict)
    laws: Mapping[Form, LossLaw] = field(default_factory=dict)
    """The joint laws, where other sizes allow them: `warm` of the next forecast; N_opt is best
    taken from the tied one."""
    reason: str = ""

    @property
    def half_width_ratio(self) -> float:
        """Half of the band as a share of the forecast."""
        return (self.high_nats - self.low_nats) / (2 * self.loss_nats)


def joint_laws(points: Points, warm: Mapping[Form, LossLaw] | None = None) -> dict[Form, LossLaw]:
    """The general and the tied general law through points near the frontier; empty when the points
    hold too few sizes for one. About 2 ms each from `warm`.
    """
    near = points.where(is_near_frontier(points.compute_flop, points.loss_nats))
    if len(np.unique(np.round(np.log(near.params_n), 2))) < _MIN_SIZES:
        return {}
    laws = {}
    for form in (Form.GENERAL, Form.GENERAL_TIED):
        try:
            check_rows(near.params_n, near.tokens_d, form)
        except UsageError:
            return {}
        laws[form] = fit_law(
            near.params_n,
            near.tokens_d,
            near.loss_nats,
            form=form,
            weights=row_weights(near.params_n, near.tokens_d, near.compute_flop),
            warm=None if warm is None else warm.get(form),
            tolerance=1e-7,
        ).law
    return laws


def own_forecast(tokens_d: Array, loss_nats: Array, target_tokens: float) -> tuple[float, float]:
    """(loss at `target_tokens`, floor) of L = E + K D^-b through one curve, (n,) points.

    Every E from 0 to just below the least loss gives a straight line in ln D; predictions are
    averaged with the likelihood of their residuals, the newest points counting most.
    """
    log_d = np.log(tokens_d)
    weights = np.exp(-(log_d[-1] - log_d) / _NEWEST_LOG)
    floors = loss_nats.min() * np.linspace(0.0, 0.98, _NUM_FLOORS)
    x = log_d - np.average(log_d, weights=weights)
    target = np.log(target_tokens) - np.average(log_d, weights=weights)
    logs = np.log(loss_nats[None, :] - floors[:, None])
    middle = np.average(logs, axis=1, weights=weights)
    spread = (weights * x**2).sum()
    slope = ((logs - middle[:, None]) * x * weights).sum(axis=1) / spread
    slope = np.minimum(slope, 0.0)
    fitted = floors[:, None] + np.exp(middle[:, None] + slope[:, None] * x)
    rest = np.log(fitted) - np.log(loss_nats)
    misfit = (weights * rest**2).sum(axis=1) / weights.sum()
    noise = misfit.min() + 1e-8
    share = np.exp(-0.5 * weights.sum() * (misfit - misfit.min()) / noise)
    share /= share.sum()
    predicted = np.log(floors + np.exp(middle + slope * target))
    return float(np.exp((share * predicted).sum())), float((share * floors).sum())


def _hybrid(points: Points, laws: Mapping[Form, LossLaw], target_tokens: float) -> float | None:
    """The run's last points above the joint law's floor, extended as a power of D."""
    params_n = float(points.params_n[-1])
    if points.tokens_d[-1] < HYBRID_TOKENS_PER_PARAM * params_n:
        return None
    floor = float(np.mean([law.loss_nats(params_n, np.inf) for law in laws.values()]))
    last = slice(-_HYBRID_POINTS, None)
    if (points.loss_nats[last] <= floor).any():
        return None
    slope, offset = np.polyfit(
        np.log(points.tokens_d[last]), np.log(points.loss_nats[last] - floor), 1
    )
    return float(floor + np.exp(offset + min(slope, 0.0) * np.log(target_tokens)))


def laws_at(
    run: Points, others: Points | None, warm: Mapping[Form, LossLaw] | None = None
) -> dict[Form, LossLaw]:
    """The joint laws through a run and the other sizes; empty without enough of them."""
    if others is None or not len(others.params_n):
        return {}
    together = Points(
        **{
            name: np.concatenate([getattr(run, name), getattr(others, name)])
            for name in ("params_n", "tokens_d", "compute_flop", "loss_nats")
        }
    )
    return joint_laws(together, warm or None)


def forecasts_by_method(
    run: Points, laws: Mapping[Form, LossLaw], target_tokens: float
) -> tuple[dict[str, float], float]:
    """(loss by method, floor) at `target_tokens` from these points and joint laws alone."""
    if not laws:
        own, floor = own_forecast(run.tokens_d, run.loss_nats, target_tokens)
        return {"own": own}, floor
    params_n = float(run.params_n[-1])
    found = {
        form.value: float(law.loss_nats(params_n, target_tokens)) for form, law in laws.items()
    }
    hybrid = _hybrid(run, laws, target_tokens)
    if hybrid is not None:
        found["hybrid"] = hybrid
    floor = float(np.mean([law.loss_nats(params_n, np.inf) for law in laws.values()]))
    return found, floor


def known_at(others: Points | None, run: Points) -> Points | None:
    """Of the other sizes, what had been trained with at most the run's compute."""
    if others is None:
        return None
    return others.where(others.compute_flop <= run.compute_flop[-1])


def past_errors(
    run: Points, others: Points | None = None, *, horizon_ratios: Sequence[float] = (2.0, 4.0, 8.0)
) -> list[PastError]:
    """What every method would have said at every earlier point about later ones, already seen.

    Others are used up to the compute of that point only, as they would have been.
    """
    found = []
    laws: dict[Form, LossLaw] = {}
    for index in range(MIN_POINTS, len(run.tokens_d)):
        seen = run.where(np.arange(len(run.tokens_d)) < index)
        laws = laws_at(seen, known_at(others, seen), laws)
        for ratio in horizon_ratios:
            target = _nearest(run.tokens_d, index, ratio)
            if target is None:
                continue
            tokens_d, loss_nats = float(run.tokens_d[target]), float(run.loss_nats[target])
            said, _ = forecasts_by_method(seen, laws, tokens_d)
            horizon = float(np.log(tokens_d / seen.tokens_d[-1]))
            found += [
                PastError(
                    method=method,
                    horizon_log=horizon,
                    error_log=float(np.log(loss / loss_nats)),
                    truth_tokens=tokens_d,
                )
                for method, loss in said.items()
            ]
    return found


def _nearest(tokens_d: Array, index: int, ratio: float) -> int | None:
    """The first point at (nine tenths of) `ratio` times the tokens of the last one seen; None when
    there is none that near. What comes after it does not change the choice."""
    wanted = 0.9 * ratio * tokens_d[index - 1]
    target = int(np.searchsorted(tokens_d, wanted))
    is_there = index <= target < len(tokens_d) and tokens_d[target] <= 1.6 * wanted
    return target if is_there else None


def forecast_run(
    run: Points,
    target_tokens: float,
    *,
    others: Points | None = None,
    past: Sequence[PastError] = (),
    level_ratio: float = LEVEL_RATIO,
    warm: Mapping[Form, LossLaw] | None = None,
) -> RunForecast:
    """Forecast at `target_tokens` from what the run has shown, rows in order of tokens, one N.

    `past` are errors of earlier forecasts (of this run: `past_errors`; of others as well).
    Raises UsageError for fewer than 4 points or a target in the past.
    """
    if len(run.tokens_d) < MIN_POINTS:
        raise UsageError(
            f"a curve of {len(run.tokens_d)} points",
            allowed=f"at least {MIN_POINTS} evaluations",
            remedy="wait for more of the run, or evaluate more often",
        )
    last = float(run.tokens_d[-1])
    if target_tokens < last:
        raise UsageError(
            f"a forecast for {target_tokens:g} tokens of a run that has trained {last:g}",
            allowed="targets ahead of the newest evaluation",
            remedy="name the tokens of the whole run",
        )
    laws = laws_at(run, others, warm)
    said, floor = forecasts_by_method(run, laws, target_tokens)
    weights, why = _weights(said, past)
    loss = float(np.exp(sum(weights[m] * np.log(value) for m, value in said.items())))
    horizon = float(np.log(target_tokens / last))
    score, band_why = _score(said, weights, past, level_ratio)
    half = max(score * horizon, FLOOR_RATIO)
    return RunForecast(
        tokens_d=target_tokens,
        loss_nats=loss,
        low_nats=loss * float(np.exp(-half)),
        high_nats=loss * float(np.exp(half)),
        floor_nats=floor,
        loss_by_method=said,
        weight_by_method=weights,
        laws=laws,
        reason=f"{why}; {band_why}",
    )


def _weights(said: Mapping[str, float], past: Sequence[PastError]) -> tuple[dict[str, float], str]:
    """Shares proportional to 1 / (mean squared past error per e-fold); alike without any."""
    scores = {}
    for method in said:
        errors = [e.error_log / _scaled(e.horizon_log) for e in past if e.method == method]
        scores[method] = float(np.mean(np.square(errors))) + 1e-8 if errors else float("nan")
    known = [score for score in scores.values() if not np.isnan(score)]
    default = max(known) if known else 1.0
    raw = {method: 1 / (default if np.isnan(s) else s) for method, s in scores.items()}
    weights = {method: value / sum(raw.values()) for method, value in raw.items()}
    parts = [
        f"{method} {100 * weights[method]:.0f} % ("
        + ("untried" if np.isnan(score) else f"error {100 * np.sqrt(score):.2f} % per e-fold")
        + ")"
        for method, score in scores.items()
    ]
    return weights, "methods: " + ", ".join(parts)


def _scaled(horizon_log: float) -> float:
    return max(horizon_log, 0.25)


def _score(
    said: Mapping[str, float],
    weights: Mapping[str, float],
    past: Sequence[PastError],
    level_ratio: float,
) -> tuple[float, str]:
    """Half-width per e-fold of tokens."""
    by_method = {
        method: np.array(
            [abs(e.error_log) / _scaled(e.horizon_log) for e in past if e.method == method]
        )
        for method in said
    }
    quantiles = {
        method: conformal_quantile(scores, level_ratio)
        for method, scores in by_method.items()
        if len(scores) >= _MIN_ERRORS_FOR_CONFORMAL
    }
    if not quantiles:
        return (
            2 * PUBLIC_SCORE_RATIO,
            f"band: twice the {100 * PUBLIC_SCORE_RATIO:.2f} % per e-fold of public curves, as "
            "fewer than 9 forecasts of this kind have met their truth",
        )
    total = sum(weights[method] for method in quantiles)
    own = sum(weights[method] * value for method, value in quantiles.items()) / total
    score = max(own, PUBLIC_SCORE_RATIO)
    count = sum(len(by_method[method]) for method in quantiles)
    return score, f"band: {100 * score:.2f} % per e-fold of tokens, from {count} past errors"


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """A yes or no with the numbers that decided."""

    is_due: bool
    reason: str


def cooldown_advice(
    spent_flop: float, remaining_flop: float, *, cooldown_ratio: float = COOLDOWN_RATIO
) -> Advice:
    """The cooldown takes the last fifth: due when remaining <= 0.25 x spent."""
    ratio = remaining_flop / spent_flop if spent_flop > 0 else float("inf")
    most = cooldown_ratio / (1 - cooldown_ratio) if cooldown_ratio < 1 else float("inf")
    return Advice(
        is_due=ratio <= most,
        reason=f"forecast remaining compute {remaining_flop:.3g} FLOP is {ratio:.2f} of the spent "
        f"{spent_flop:.3g}, {'at most' if ratio <= most else 'more than'} {most:.3g}",
    )


def restart_advice(
    law: LossLaw,
    params_n: float,
    spent_flop: float,
    remaining_flop: float,
    *,
    flop_per_param_token: float,
) -> Advice:
    """A restart with the best N wins when C_remaining > eta(N) (C_spent + C_remaining)."""
    total = spent_flop + remaining_flop
    eta = float(law.efficiency(params_n, total, flop_per_param_token=flop_per_param_token))
    best = law.optimum(remaining_flop, flop_per_param_token=flop_per_param_token).params_n
    is_due = remaining_flop > eta * total
    return Advice(
        is_due=is_due,
        reason=f"{params_n:.3g} parameters use {100 * eta:.0f} % of {total:.3g} FLOP; "
        f"{remaining_flop:.3g} FLOP remain, {'more' if is_due else 'not more'} than that: "
        + (f"restart with {best:.3g} parameters" if is_due else "go on"),
    )
