"""How big a model: what moves the compute-optimal N, and what missing it costs.

All effects meet in one balance, solved on k N D = C by bisection in ln N (k FLOP per parameter and
token): the next parameter must be worth what the next token is worth,

    alpha A N'^-alpha (dlnN'/dlnN) = beta B D'^-beta (dlnD'/dlnD) (1 + I/(3D)) exp(beta^2 s^2 / 2)

- N', D': Muennighoff 2023 (2305.16264), parameters and tokens that count when U unique tokens are
  passed over again; without repetition N' = N, D' = D;
- I tokens to be served: Sardana 2023 (2401.00448), minimum of 6 N D + 2 N I at the loss reached;
- s, the standard deviation of ln C: the expected loss E[L] with D = C / (k N), C log-normal with
  median C. Alone it moves N by exp(-beta^2 s^2 / (2 (alpha + beta))); for kappa other than 1 the
  last factor is E[R^(kappa-1) t] / (E[R^(kappa-1)] t), R the sum of both terms, t the one of D.

With U, I and s absent it is the law's own optimum.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from coordinator.scaling.laws import LossLaw, Optimum, RepetitionLaw

NEAR_OPTIMAL_EFFICIENCY = 0.95
"""A model is near-optimal if it keeps this share of the compute."""

PRACTICAL_DATA_PASSES = 16
"""Beyond so many passes a token is worth less than two thirds on average (2305.16264)."""

_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(61)
"""Gauss-Hermite quadrature over a standard normal."""

_LOWEST_PARAMS_WORTH = 0.1
"""Parameters stop being added when one more is worth a tenth of a fed one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What a size is chosen for, beside the law."""

    compute_flop: float
    """Median of the training compute."""
    compute_log_std: float = 0.0
    """s, standard deviation of ln C."""
    serve_tokens: float = 0.0
    """I, tokens that the finished model will generate or read."""
    unique_tokens: float = math.inf
    """U, tokens of different text at hand."""
    flop_per_param_token: float = 6.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A model size and what it is trained on."""

    params_n: float
    tokens_d: float
    spent_flop: float
    """Training compute used; less than there is where text is the limit."""


def anchored(law: LossLaw, optimum: Optimum) -> LossLaw:
    """`law` shifted along its frontier so that its optimum at optimum.compute_flop is `optimum`.

    Exponents, floor and best loss at that compute stay; N is measured in another unit and D in its
    inverse. This joins an allocation law (N of C alone) to a law that knows losses.
    """
    flop_per_param_token = optimum.compute_flop / (optimum.params_n * optimum.tokens_d)
    own = law.optimum(optimum.compute_flop, flop_per_param_token=flop_per_param_token)
    ratio = optimum.params_n / own.params_n
    return replace(law, a=law.a * ratio**law.alpha, b=law.b * ratio**-law.beta)


def uncertainty_factor(law: LossLaw, compute_log_std: float) -> float:
    """N that minimises E[L] as a multiple of N_opt(median C); exact for kappa = 1."""
    return math.exp(-(law.beta**2) * compute_log_std**2 / (2 * (law.alpha + law.beta)))


def clairvoyant_regret_nats(
    law: LossLaw, params_n: float, compute_flop: float, compute_log_std: float
) -> float:
    """Expected loss of a committed N minus that of somebody who knew C: E[L(N, C/6N) - L_opt(C)].

    Gauss-Hermite quadrature over ln C ~ N(ln compute_flop, compute_log_std^2), 61 nodes.
    """
    flop = compute_flop * np.exp(compute_log_std * _NODES)
    committed = law.loss_nats(params_n, flop / (6 * params_n))
    known = np.array([law.optimum(float(one)).loss_nats for one in flop])
    return float(np.sum(_WEIGHTS * (committed - known)) / np.sum(_WEIGHTS))


def serving_optimum(law: LossLaw, loss_nats: float, serve_tokens: float) -> tuple[Optimum, float]:
    """Sardana's problem: least 6 N D + 2 N I with L(N, D) = loss_nats.

    Returns the optimum (compute_flop is its training compute, 6 N D) and the total FLOP. The loss
    must be above the law's floor.
    """
    best = float(law.compute_for_loss(loss_nats))
    own = law.optimum(best)

    def imbalance(log_n: float) -> float:
        params_n = math.exp(log_n)
        tokens_d = float(law.tokens_for_loss(params_n, loss_nats))
        return _log_balance(law, params_n, tokens_d) - math.log1p(serve_tokens / (3 * tokens_d))

    smallest = float(law.params_for_loss(1e200, loss_nats))  # with endless text
    log_n = _bisect(imbalance, math.log(smallest) + 1e-9, math.log(own.params_n) + 1e-9)
    params_n = math.exp(log_n)
    tokens_d = float(law.tokens_for_loss(params_n, loss_nats))
    optimum = Optimum(
        params_n=params_n,
        tokens_d=tokens_d,
        compute_flop=6 * params_n * tokens_d,
        loss_nats=loss_nats,
    )
    return optimum, 6 * params_n * tokens_d + 2 * params_n * serve_tokens


def tokens_to_serve(law: LossLaw, params_n: float, serve_tokens: float) -> float:
    """The D that Sardana's balance asks of a model of given N that will serve I tokens."""

    def imbalance(log_d: float) -> float:
        tokens_d = math.exp(log_d)
        return math.log1p(serve_tokens / (3 * tokens_d)) - _log_balance(law, params_n, tokens_d)

    alone = -_log_balance(law, params_n, 1.0) / law.beta  # ln D without serving
    return math.exp(_bisect(imbalance, alone - 1e-9, alone + 60))


def best_size(law: LossLaw, demand: Demand) -> Size:
    """The N and D that balance all effects of `demand` (module docstring).

    Where text is so scarce that the balance would need more than 16 passes, D stops there and N
    grows until a further parameter is worth a tenth; the compute that is left is not spent.
    """
    repetition = RepetitionLaw(law=law)
    unique, product = demand.unique_tokens, demand.compute_flop / demand.flop_per_param_token
    fed_params = math.inf if math.isinf(unique) else float(law.params_for_tokens(unique))

    def imbalance(log_n: float) -> float:
        params_n = math.exp(log_n)
        tokens_d = product / params_n
        params_worth = _log_worth(params_n, fed_params, repetition.params_half_life)
        tokens_worth = _log_worth(tokens_d, unique, repetition.tokens_half_life)
        counted_n = _counted(params_n, fed_params, repetition.params_half_life)
        counted_d = _counted(tokens_d, unique, repetition.tokens_half_life)
        return (
            _log_balance(law, counted_n, counted_d)
            + (params_worth + math.log(params_n / counted_n))
            - (tokens_worth + math.log(tokens_d / counted_d))
            - _log_uncertainty(law, counted_n, counted_d, demand.compute_log_std)
            - math.log1p(demand.serve_tokens / (3 * tokens_d))
        )

    middle = math.log(law.optimum(product, flop_per_param_token=1.0).params_n)
    params_n = math.exp(_bisect(imbalance, middle - 40, middle + 40))
    tokens_d = product / params_n
    if tokens_d > PRACTICAL_DATA_PASSES * unique:
        tokens_d = PRACTICAL_DATA_PASSES * unique
        most = fed_params * (1 - repetition.params_half_life * math.log(_LOWEST_PARAMS_WORTH))
        params_n = min(product / tokens_d, most)
    return Size(
        params_n=params_n,
        tokens_d=tokens_d,
        spent_flop=demand.flop_per_param_token * params_n * tokens_d,
    )


def repeated_loss_nats(
    law: LossLaw, params_n: float, tokens_d: float, unique_tokens: float
) -> float:
    """Loss after `tokens_d` tokens of which `unique_tokens` differ; inf of them is fresh text."""
    if math.isinf(unique_tokens):
        return float(law.loss_nats(params_n, tokens_d))
    return float(RepetitionLaw(law=law).loss_nats(params_n, tokens_d, unique_tokens))


def _log_balance(law: LossLaw, params_n: float, tokens_d: float) -> float:
    """ln of (alpha A N^-alpha) / (beta B D^-beta)."""
    return (
        math.log(law.alpha * law.a / (law.beta * law.b))
        - law.alpha * math.log(params_n)
        + law.beta * math.log(tokens_d)
    )


def _log_uncertainty(
    law: LossLaw, params_n: float, tokens_d: float, compute_log_std: float
) -> float:
    """ln of what the term of D weighs more because C is uncertain; beta^2 s^2 / 2 for kappa = 1."""
    if compute_log_std == 0 or law.kappa == 1.0:
        return law.beta**2 * compute_log_std**2 / 2
    spread = np.exp(-law.beta * compute_log_std * _NODES)
    of_params = law.a * params_n**-law.alpha
    of_tokens = law.b * tokens_d**-law.beta * spread
    weights = _WEIGHTS * (of_params + of_tokens) ** (law.kappa - 1)
    return math.log(float(np.sum(weights * spread) / np.sum(weights)))


def _counted(amount: float, worth: float, half_life: float) -> float:
    """N' or D' of N or D."""
    if amount <= worth:
        return amount
    return worth * (1 + half_life * -math.expm1(-(amount / worth - 1) / half_life))


def _log_worth(amount: float, worth: float, half_life: float) -> float:
    """ln of dN'/dN or dD'/dD: what one more is worth."""
    return 0.0 if amount <= worth else -(amount / worth - 1) / half_life


def _bisect(function: Callable[[float], float], low: float, high: float) -> float:
    """Root of a falling function, to the last digit."""
    for _ in range(200):
        middle = (low + high) / 2
        if function(middle) > 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def near_optimal_interval(
    law: LossLaw,
    compute_flop: float,
    *,
    efficiency_ratio: float = NEAR_OPTIMAL_EFFICIENCY,
    flop_per_param_token: float = 6.0,
) -> tuple[float, float]:
    """All N that keep `efficiency_ratio` of the compute, as (lowest, highest)."""
    optimum = law.optimum(compute_flop, flop_per_param_token=flop_per_param_token)
    log_best = math.log(optimum.params_n)

    def efficiency(log_n: float) -> float:
        return float(
            law.efficiency(math.exp(log_n), compute_flop, flop_per_param_token=flop_per_param_token)
        )

    low = _bisect(lambda log_n: efficiency_ratio - efficiency(log_n), log_best - 12, log_best)
    high = _bisect(lambda log_n: efficiency(log_n) - efficiency_ratio, log_best, log_best + 12)
    return math.exp(low), math.exp(high)


def restart_pays(efficiency_ratio: float, *, spent_flop: float, remaining_flop: float) -> bool:
    """True if a new run with the best N beats going on with one that keeps `efficiency_ratio` of
    its compute: C_remaining > eta (C_spent + C_remaining).
    """
    return remaining_flop > efficiency_ratio * (spent_flop + remaining_flop)


def memorised_ratio(
    params_n: float, unique_tokens: float, loss_nats: float, *, bits_per_param: float
) -> float:
    """Bits that the model can hold (Morris 2025) over bits that the text carries, U L / ln 2.

    Above 1 the model can hold the corpus by heart.
    """
    return bits_per_param * params_n / (unique_tokens * loss_nats / math.log(2))


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """By what a law multiplies N and D when C is multiplied by ten."""

    params_ratio: float
    tokens_ratio: float


def growth_per_tenfold(params_exponent: float) -> Growth:
    """Growth of a law with N ~ C^a, D ~ C^(1-a)."""
    return Growth(params_ratio=10**params_exponent, tokens_ratio=10 ** (1 - params_exponent))
