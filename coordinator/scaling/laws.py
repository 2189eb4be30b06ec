"""The forms of scaling laws: loss of (N, D), what is optimal at a compute C, and what moves it.

N parameters, D training tokens, C = k N D training FLOP with k FLOP per parameter and token (6 in
the literature), loss in nats per token. One form holds all loss laws that are fitted here,

    L(N, D) = E + (A / N^alpha + B / D^beta)^kappa

- additive: kappa = 1 (Hoffmann 2022, 2203.15556, approach 3);
- tied: kappa = 1 and alpha = beta (Muennighoff 2023 before repetition; Gadre 2024's code);
- general and general-tied: kappa free;
- Kaplan 2020 (2001.08361, eq. 1.5): E = 0, alpha = alpha_N/alpha_D, beta = 1, kappa = alpha_D.

kappa does not move the optimum, so every question about compute has a closed form: the frontier is
E + (S (C/k)^-gamma)^kappa with gamma = alpha beta / (alpha + beta). Around it stand allocation laws
(N of C alone), Muennighoff's repetition of data, DiLoCo's replica penalty, and power rules for
learning rates and batches. Arguments may be numbers or arrays; results have their broadcast shape.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protos.contract.errors import UsageError

MOST_LOG_PARAMS = 200.0
"""Of ln N_opt, either way: beyond it the constants say nothing of N."""
PLAIN_FLOP_PER_PARAM_TOKEN = 6.0
"""C = 6 N D: two FLOP forward and four backward per parameter and token."""

Numbers = float | NDArray[np.float64]


class Form(StrEnum):
    """Which constants of the general form are free."""

    ADDITIVE = "additive"
    TIED = "tied"
    GENERAL = "general"
    GENERAL_TIED = "general-tied"

    @property
    def is_tied(self) -> bool:
        """alpha = beta."""
        return self in (Form.TIED, Form.GENERAL_TIED)

    @property
    def is_general(self) -> bool:
        """kappa is free."""
        return self in (Form.GENERAL, Form.GENERAL_TIED)

    @property
    def num_constants(self) -> int:
        """Free constants: E, A, B, the exponents, kappa."""
        return 5 - int(self.is_tied) + int(self.is_general)


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimum:
    """The best use of `compute_flop`."""

    params_n: float
    tokens_d: float
    compute_flop: float
    loss_nats: float = float("nan")
    """nan where the law says nothing about loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossLaw:
    """L(N, D) = e_nats + (a / N^alpha + b / D^beta)^kappa; all constants > 0, e_nats >= 0."""

    e_nats: float
    a: float
    b: float
    alpha: float
    beta: float
    kappa: float = 1.0

    @property
    def form(self) -> Form:
        """The narrowest form that has these constants."""
        is_tied, is_general = self.alpha == self.beta, self.kappa != 1.0
        if is_general:
            return Form.GENERAL_TIED if is_tied else Form.GENERAL
        return Form.TIED if is_tied else Form.ADDITIVE

    @property
    def params_exponent(self) -> float:
        """a of N_opt ~ C^a."""
        return self.beta / (self.alpha + self.beta)

    @property
    def tokens_exponent(self) -> float:
        """b of D_opt ~ C^b."""
        return self.alpha / (self.alpha + self.beta)

    @property
    def frontier_exponent(self) -> float:
        """gamma of (L_opt - E)^(1/kappa) ~ C^-gamma."""
        return self.alpha * self.beta / (self.alpha + self.beta)

    def gain_nats(self, params_n: Numbers, tokens_d: Numbers) -> Any:
        """Loss above the floor E, in nats."""
        terms = np.logaddexp(
            np.log(self.a) - self.alpha * np.log(params_n),
            np.log(self.b) - self.beta * np.log(tokens_d),
        )
        return np.exp(self.kappa * terms)

    def loss_nats(self, params_n: Numbers, tokens_d: Numbers) -> Any:
        """Predicted loss of `params_n` parameters after `tokens_d` tokens, in nats per token."""
        return self.e_nats + self.gain_nats(params_n, tokens_d)

    def optimum(
        self, compute_flop: float, *, flop_per_param_token: float = PLAIN_FLOP_PER_PARAM_TOKEN
    ) -> Optimum:
        """The N and D of least loss with k N D = C (Hoffmann 2022, eq. 4). Raises UsageError if
        that N is beyond all numbers: such a law was fitted to a table that says nothing of N.
        """
        product = compute_flop / flop_per_param_token
        params_n = float(np.exp(self._log_best_params(product)))
        tokens_d = product / params_n
        return Optimum(
            params_n=params_n,
            tokens_d=tokens_d,
            compute_flop=compute_flop,
            loss_nats=float(self.loss_nats(params_n, tokens_d)),
        )

    def frontier_nats(self, compute_flop: Numbers, *, flop_per_param_token: float) -> Any:
        """Least loss of every compute, `optimum(C).loss_nats`."""
        product = np.asarray(compute_flop) / flop_per_param_token
        params_n = np.exp(self._log_best_params(product))
        return self.loss_nats(params_n, product / params_n)

    def _log_best_params(self, product: Numbers) -> Any:
        """ln N_opt of N D = `product`. Raises UsageError beyond all numbers."""
        log_ratio = np.log(self.alpha * self.a) - np.log(self.beta * self.b)
        log_n = (log_ratio + self.beta * np.log(product)) / (self.alpha + self.beta)
        farthest = float(np.ravel(log_n)[np.argmax(np.abs(log_n))])
        if not abs(farthest) <= MOST_LOG_PARAMS:
            raise UsageError(
                f"a fitted law whose best N would be e^{farthest:.0f}",
                allowed="a table whose losses fall with N and with D",
                remedy="look for rows that are wrong, add others, or choose --form additive",
            )
        return log_n

    def params_for_tokens(self, tokens_d: Numbers) -> Any:
        """The N for which `tokens_d` tokens are compute-optimal."""
        log_ratio = np.log(self.alpha * self.a) - np.log(self.beta * self.b)
        return np.exp((log_ratio + self.beta * np.log(tokens_d)) / self.alpha)

    def tokens_for_loss(self, params_n: Numbers, loss_nats: Numbers) -> Any:
        """Tokens after which `params_n` parameters reach `loss_nats`; inf where they never do."""
        left = self._inner(loss_nats) - self.a * np.power(params_n, -self.alpha)
        return _power_where_positive(left / self.b, -1 / self.beta)

    def params_for_loss(self, tokens_d: Numbers, loss_nats: Numbers) -> Any:
        """Parameters that reach `loss_nats` with `tokens_d` tokens; inf where none does."""
        left = self._inner(loss_nats) - self.b * np.power(tokens_d, -self.beta)
        return _power_where_positive(left / self.a, -1 / self.alpha)

    def compute_for_loss(
        self, loss_nats: Numbers, *, flop_per_param_token: float = PLAIN_FLOP_PER_PARAM_TOKEN
    ) -> Any:
        """Least training FLOP that reach `loss_nats`; inf at or below the floor E."""
        at_one = self.optimum(flop_per_param_token, flop_per_param_token=flop_per_param_token)
        scale = self._inner(at_one.loss_nats)
        inner = self._inner(loss_nats)
        return flop_per_param_token * _power_where_positive(
            inner / scale, -1 / self.frontier_exponent
        )

    def efficiency(
        self,
        params_n: Numbers,
        compute_flop: Numbers,
        *,
        flop_per_param_token: float = PLAIN_FLOP_PER_PARAM_TOKEN,
    ) -> Any:
        """eta in (0, 1]: the compute that the optimal N needs for the loss which `params_n`
        reaches with `compute_flop`, as a share of `compute_flop`."""
        tokens_d = compute_flop / (flop_per_param_token * params_n)
        loss_nats = self.loss_nats(params_n, tokens_d)
        needed = self.compute_for_loss(loss_nats, flop_per_param_token=flop_per_param_token)
        return needed / compute_flop

    def _inner(self, loss_nats: Numbers) -> Any:
        """A / N^alpha + B / D^beta of a loss; 0 at or below the floor."""
        return np.power(np.maximum(np.asarray(loss_nats) - self.e_nats, 0.0), 1 / self.kappa)


def _power_where_positive(base: Numbers, negative_exponent: float) -> Any:
    """base ** exponent, inf where the base is not positive or the result too large."""
    with np.errstate(over="ignore"):
        powers = np.power(np.where(np.asarray(base) > 0, base, 1.0), negative_exponent)
    return np.where(np.asarray(base) > 0, powers, np.inf)


def efficiency_of_ratio(size_ratio: Numbers, exponent: float) -> Any:
    """eta of a model `size_ratio` times its optimal size, cosh(g ln r)^(-2/g) with g = `exponent`.

    Exact for alpha = beta = g at every scale; otherwise take g between the two.
    """
    return np.power(np.cosh(exponent * np.log(size_ratio)), -2 / exponent)


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocationLaw:
    """N_opt = coefficient * C^exponent; D_opt instead if `is_tokens`. Says nothing about loss."""

    coefficient: float
    exponent: float
    is_tokens: bool = False

    def optimum(
        self, compute_flop: float, *, flop_per_param_token: float = PLAIN_FLOP_PER_PARAM_TOKEN
    ) -> Optimum:
        """One of the two from the power law, the other from k N D = C."""
        one = self.coefficient * compute_flop**self.exponent
        other = compute_flop / (flop_per_param_token * one)
        params_n, tokens_d = (other, one) if self.is_tokens else (one, other)
        return Optimum(params_n=params_n, tokens_d=tokens_d, compute_flop=compute_flop)

    @property
    def params_exponent(self) -> float:
        """a of N_opt ~ C^a."""
        return 1 - self.exponent if self.is_tokens else self.exponent


@dataclass(frozen=True, slots=True, kw_only=True)
class RatioLaw:
    """D_opt = tokens_per_param * N_opt: N_opt = sqrt(C / (k tokens_per_param))."""

    tokens_per_param: float

    def optimum(
        self, compute_flop: float, *, flop_per_param_token: float = PLAIN_FLOP_PER_PARAM_TOKEN
    ) -> Optimum:
        """N and D with the fixed ratio and k N D = C."""
        params_n = float(np.sqrt(compute_flop / (flop_per_param_token * self.tokens_per_param)))
        tokens_d = self.tokens_per_param * params_n
        return Optimum(params_n=params_n, tokens_d=tokens_d, compute_flop=compute_flop)

    @property
    def params_exponent(self) -> float:
        """a of N_opt ~ C^a."""
        return 0.5


def _saturating(amount: Numbers, worth: Numbers, half_life: float) -> Any:
    """Muennighoff 2023, eq. 5: the first `worth` count fully, repetitions ever less."""
    repeats = np.maximum(np.asarray(amount) / worth - 1, 0.0)
    counted = worth + worth * half_life * (1 - np.exp(-repeats / half_life))
    return np.where(np.asarray(amount) <= worth, amount, counted)


@dataclass(frozen=True, slots=True, kw_only=True)
class RepetitionLaw:
    """A loss law whose N and D saturate when `unique_tokens` are passed over again (2305.16264).

    D' = U + U R_D* (1 - exp(-R_D / R_D*)), R_D = D / U - 1; N' likewise beyond U_N, the N for which
    U tokens are compute-optimal. Its absolute constants do not transfer between set-ups: put a law
    fitted on own runs in `law` (re-anchoring); the two R* roughly do.
    """

    law: LossLaw
    tokens_half_life: float = 15.387756
    """R_D*."""
    params_half_life: float = 5.309743
    """R_N*."""

    def effective_tokens(self, tokens_d: Numbers, unique_tokens: Numbers) -> Any:
        """D' in tokens of fresh data."""
        return _saturating(tokens_d, unique_tokens, self.tokens_half_life)

    def effective_params(self, params_n: Numbers, unique_tokens: Numbers) -> Any:
        """N': parameters beyond what U tokens can feed count ever less."""
        fed = self.law.params_for_tokens(unique_tokens)
        return _saturating(params_n, fed, self.params_half_life)

    def loss_nats(self, params_n: Numbers, tokens_d: Numbers, unique_tokens: Numbers) -> Any:
        """Predicted loss after `tokens_d` tokens, `unique_tokens` of which differ."""
        return self.law.loss_nats(
            self.effective_params(params_n, unique_tokens),
            self.effective_tokens(tokens_d, unique_tokens),
        )

    def mean_token_worth(self, num_passes: Numbers) -> Any:
        """D' / D: what a token is worth on average when the data is passed `num_passes` times."""
        return self.effective_tokens(num_passes, 1.0) / np.asarray(num_passes)

    def optimum(
        self,
        compute_flop: float,
        unique_tokens: float,
        *,
        flop_per_param_token: float = PLAIN_FLOP_PER_PARAM_TOKEN,
    ) -> Optimum:
        """N and D of least loss with k N D = C: search over ln N, refined to 1e-9 of its width."""
        product = compute_flop / flop_per_param_token
        middle = np.log(self.law.optimum(product, flop_per_param_token=1.0).params_n)
        low, high = middle - 12.0, middle + 12.0
        for _ in range(8):
            grid = np.linspace(low, high, 201)
            losses = self.loss_nats(np.exp(grid), product / np.exp(grid), unique_tokens)
            best = int(np.argmin(losses))
            low, high = grid[max(best - 1, 0)], grid[min(best + 1, 200)]
        params_n = float(np.exp((low + high) / 2))
        return Optimum(
            params_n=params_n,
            tokens_d=product / params_n,
            compute_flop=compute_flop,
            loss_nats=float(self.loss_nats(params_n, product / params_n, unique_tokens)),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaPenalty:
    """DiLoCo, M replicas: L(N, M) = L(N) * M^(coefficient * N^exponent) (2503.09799, H = 30)."""

    coefficient: float
    exponent: float

    def loss_factor(self, params_n: Numbers, num_replicas: Numbers) -> Any:
        """By what the loss of one replica is multiplied; 1 at M = 1."""
        power = self.coefficient * np.power(params_n, self.exponent)
        return np.power(np.asarray(num_replicas, dtype=float), power)


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerRule:
    """value = coefficient * N^n * D^d * C^c * M^m: learning rates, batches, compute worth."""

    coefficient: float
    n_exponent: float = 0.0
    d_exponent: float = 0.0
    c_exponent: float = 0.0
    m_exponent: float = 0.0

    def value(
        self,
        *,
        params_n: Numbers = 1.0,
        tokens_d: Numbers = 1.0,
        compute_flop: Numbers = 1.0,
        num_replicas: Numbers = 1.0,
    ) -> Any:
        """The rule's value, in the unit that its table names."""
        return (
            self.coefficient
            * np.power(params_n, self.n_exponent)
            * np.power(tokens_d, self.d_exponent)
            * np.power(compute_flop, self.c_exponent)
            * np.power(np.asarray(num_replicas, dtype=float), self.m_exponent)
        )
