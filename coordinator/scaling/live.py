"""The forecast of a run under way, after every evaluation, and what follows from it.

The curve is the held-out loss at a constant learning rate: evaluations of the warm-up, of the
plateau right after it and of the cooldown are left out. A point may lie far above its curve (a
chunk of odd text), never far below. So until it has 12 of them on a smooth curve its curve is
L = K D^-b through the lower edge of the points (an asymmetric Laplace fit, which is a quantile
regression), with a prior on b; later the methods of `forecast.py`, weighted by their own past
errors. The loss at the end is the curve's there less what a cooldown brings.

Prior and gain were measured with three one-process runs of the default configuration (seeds 10 to
12, ops/bench/forecast.md), not with the runs that test them. Pure.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from coordinator.scaling.forecast import (
    MIN_POINTS,
    Points,
    RunForecast,
    cooldown_advice,
    forecast_run,
    known_at,
    past_errors,
    restart_advice,
)
from coordinator.scaling.forecast import Array as Array
from coordinator.scaling.laws import Form, LossLaw
from coordinator.scaling.plan_law import DEFAULT_LAW, published_law
from protos.contract.errors import UsageError

SLOPE = 0.11
"""Prior of b: the curves of three default runs from 0.1 M to 0.75 M tokens."""
SLOPE_STD = 0.003
"""With 0.01 and the lower quarter a fourth run (seed 1) was missed by 5.1 %: within a quarter of a
run the noise hides the slope, so it is nearly given.
"""
QUANTILE = 0.15
COOLDOWN_GAIN_RATIO = 0.013
"""What the cooldown took off that curve in those runs: 1.1, 1.2 and 1.6 %."""
COOLDOWN_GAIN_STD = 0.01
"""Twice what they differed by; 3.8 % was seen on a smoother byte-level curve."""
MANY_POINTS = 12
_SMOOTH_RATIO = 0.003
"""Recorded default runs have 0.4 to 0.8 %, where a fitted curvature would follow the noise."""
_PLATEAU_WARMUPS = 2.5
"""Below this many warm-ups the loss is still near that of single tokens."""
_LEAST_NOISE = 0.004
_AGE_LOG = float(np.log(4.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """One evaluation."""

    tokens_d: float
    loss_nats: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RunNow:
    """A run as its books and evaluations show it."""

    params_n: float
    """Matrices and head, without the input embedding."""
    flop_per_token: float
    evaluations: Sequence[Evaluated]
    """Of the chain in force, by tokens."""
    spent_tokens: float
    budget_tokens: float
    warmup_tokens: float
    cooldown_start_tokens: float
    cooldown_ratio: float
    """Share of the budget that the cooldown takes."""
    tokens_per_second: float
    """Of the present pool; 0 while it stands still."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveForecast:
    """What is published; `reason` names the numbers that decided."""

    seen_tokens: float
    """Of the newest evaluation behind it."""
    final_tokens: float
    loss_nats: float
    low_nats: float
    high_nats: float
    half_width_ratio: float
    n_opt: float
    """Best number of parameters for the run's whole compute."""
    efficiency_ratio: float
    """Share of the compute that the present N makes use of."""
    law: str
    """Where n_opt and efficiency come from."""
    spent_flop: float
    remaining_flop: float
    eta_seconds: float
    """Until the budget is credited at the present pool; negative if nobody trains."""
    is_cooldown_due: bool
    cooldown_reason: str
    is_restart_better: bool
    restart_reason: str
    reason: str


def live_forecast(run: RunNow, *, others: Points | None = None) -> LiveForecast:
    """Forecast the held-out loss at the end of the budget from what the run has shown.

    `others` are runs of other sizes on the same text, at a constant rate (a study). Raises
    UsageError with what is missing while there are too few evaluations.
    """
    points = curve_of(run)
    target = max(run.budget_tokens, float(points.tokens_d[-1]))
    is_smooth = len(points.tokens_d) >= MANY_POINTS and _roughness(points) <= _SMOOTH_RATIO
    said = None
    if is_smooth or others is not None:
        past = past_errors(points, others)
        said = forecast_run(points, target, others=known_at(others, points), past=past)
    if said is None or not (said.laws or is_smooth):  # too few sizes for a law
        said = _young(points, target)
    gain = COOLDOWN_GAIN_RATIO if run.cooldown_start_tokens < run.budget_tokens else 0.0
    half = float(np.log(said.high_nats / said.loss_nats))
    half = float(np.hypot(half, COOLDOWN_GAIN_STD if gain else 0.0))
    loss = said.loss_nats * (1 - gain)
    spent = run.flop_per_token * run.spent_tokens
    remaining = run.flop_per_token * max(run.budget_tokens - run.spent_tokens, 0.0)
    law, law_name = _allocation(said, spent + remaining)
    per_param = run.flop_per_token / run.params_n
    cooldown = cooldown_advice(spent, remaining, cooldown_ratio=run.cooldown_ratio)
    restart = restart_advice(law, run.params_n, spent, remaining, flop_per_param_token=per_param)
    total = spent + remaining
    return LiveForecast(
        seen_tokens=float(points.tokens_d[-1]),
        final_tokens=target,
        loss_nats=loss,
        low_nats=loss * float(np.exp(-half)),
        high_nats=loss * float(np.exp(half)),
        half_width_ratio=float(np.sinh(half)),
        n_opt=law.optimum(total, flop_per_param_token=per_param).params_n,
        efficiency_ratio=float(law.efficiency(run.params_n, total, flop_per_param_token=per_param)),
        law=law_name,
        spent_flop=spent,
        remaining_flop=remaining,
        eta_seconds=_eta_seconds(run),
        is_cooldown_due=cooldown.is_due,
        cooldown_reason=cooldown.reason,
        is_restart_better=restart.is_due,
        restart_reason=f"{restart.reason} (by {law_name})",
        reason=f"{len(points.tokens_d)} evaluations up to {points.tokens_d[-1]:,.0f} tokens; "
        f"{said.reason}; less {100 * gain:.1f} % for the cooldown",
    )


def curve_of(run: RunNow) -> Points:
    """The evaluations of the constant rate as points. Raises UsageError for fewer than 4."""
    begin = _PLATEAU_WARMUPS * run.warmup_tokens
    for point in run.evaluations:
        if not 0 < point.loss_nats < np.inf:
            raise UsageError(
                f"a loss of {point.loss_nats} nats at {point.tokens_d:,.0f} tokens",
                allowed="finite losses above 0",
                remedy="roll the run back to before it",
            )
    kept = [
        point
        for point in run.evaluations
        if begin <= point.tokens_d <= run.cooldown_start_tokens and point.tokens_d > 0
    ]
    if len(kept) < MIN_POINTS:
        raise UsageError(
            f"{len(kept)} evaluations between {begin:,.0f} and "
            f"{run.cooldown_start_tokens:,.0f} tokens, at a constant learning rate",
            allowed=f"a forecast needs {MIN_POINTS}",
            remedy="wait for more of the run",
        )
    tokens = np.array([point.tokens_d for point in kept])
    return Points(
        params_n=np.full(len(kept), run.params_n),
        tokens_d=tokens,
        compute_flop=run.flop_per_token * tokens,
        loss_nats=np.array([point.loss_nats for point in kept]),
    )


def young_curve(tokens_d: Array, loss_nats: Array) -> tuple[float, float]:
    """(b, ln L at the last point) of L ~ D^-b through the lower edge of points (n,) each.

    The posterior's maximum over b on a grid: n ln(mean pinball loss) for an unknown noise, plus the
    prior. For each b the level is the weighted quantile of ln L + b ln D; old points count less.
    """
    x = np.log(tokens_d / tokens_d[-1])
    weights = np.exp(x / _AGE_LOG)
    slopes = np.linspace(0.0, 4 * SLOPE, 441)
    rows = np.log(loss_nats)[None, :] + slopes[:, None] * x[None, :]
    levels = np.array([_weighted_quantile(row, weights) for row in rows])
    rest = rows - levels[:, None]
    pinball = np.where(rest > 0, QUANTILE, QUANTILE - 1) * rest
    noise = np.average(pinball, axis=1, weights=weights) + QUANTILE * _LEAST_NOISE
    cost = weights.sum() * np.log(noise) + ((slopes - SLOPE) / SLOPE_STD) ** 2 / 2
    best = int(np.argmin(cost))
    return float(slopes[best]), float(levels[best])


def _roughness(points: Points) -> float:
    """Mean rise of ln loss from one evaluation to the next, falls counted as 0."""
    return float(np.maximum(np.diff(np.log(points.loss_nats)), 0.0).mean())


def _weighted_quantile(values: Array, weights: Array) -> float:
    order = np.argsort(values)
    middle = np.cumsum(weights[order]) - weights[order] / 2
    return float(np.interp(QUANTILE * weights.sum(), middle, values[order]))


def _young(points: Points, target_tokens: float) -> RunForecast:
    slope, level = young_curve(points.tokens_d, points.loss_nats)
    plain = forecast_run(points, target_tokens)  # its band: what is known of untried forecasts
    loss = float(np.exp(level - slope * np.log(target_tokens / points.tokens_d[-1])))
    ratio = loss / plain.loss_nats
    return replace(
        plain,
        loss_nats=loss,
        low_nats=plain.low_nats * ratio,
        high_nats=plain.high_nats * ratio,
        loss_by_method={"power": loss},
        weight_by_method={"power": 1.0},
        reason=f"loss ~ D^-{slope:.3f} through the lower edge of them, with the prior "
        f"{SLOPE} +- {SLOPE_STD} on the exponent; {plain.reason.rpartition('; ')[2]}",
    )


def _allocation(said: RunForecast, total_flop: float) -> tuple[LossLaw, str]:
    """Where N_opt comes from: the study's tied law, else the published default."""
    if Form.GENERAL_TIED in said.laws:
        return said.laws[Form.GENERAL_TIED], "the study's general-tied law"
    return published_law(DEFAULT_LAW).at(total_flop), f"the published law {DEFAULT_LAW!r}"


def _eta_seconds(run: RunNow) -> float:
    left = run.budget_tokens - run.spent_tokens
    if left <= 0:
        return 0.0
    return left / run.tokens_per_second if run.tokens_per_second > 0 else -1.0
