"""Batch, learning rate, weight decay and steps of a run with N parameters and D tokens.

Learning rate and batch matter more than N: on the Step Law grid a learning rate off by two costs
0.65 % of the loss, a batch off by two 0.5 %; off by four 7 % and 1.5 %.

- Batch: the Step Law's (2503.04715) for `sync`, DiLoCo's joint law (2503.09799) otherwise, held at
  or below the critical batch (Zhang 2024, 2410.21676; set by data, so computed from D), beyond
  which tokens are wasted: a run at batch B needs 1 + B / B_crit times the tokens of one at a small
  batch (McCandlish 2018); steps D / B.
- Learning rate: the same two sources; lr ~ sqrt(B / B_ref) when the batch is not the rule's own.
  mu-style transfer from a tuned trial (lr ~ 1 / width, Yang 2022, 2203.03466) if there is one.
- Weight decay: AdamW's memory of B / (lr lambda) tokens is kept at one share of the run,
  T = B / (lr lambda D) (Power Lines, 2505.13738), anchored at the Step Law's own setting: lambda
  0.1 with its rule's lr and B at 1 B parameters and 20 B tokens, where T is 0.22.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from coordinator.scaling.constants import BATCHES, LEARNING_RATES, NUMBERS

ANCHOR_PARAMS, ANCHOR_TOKENS, ANCHOR_WEIGHT_DECAY = 1e9, 20e9, 0.1
TOKENS_PER_PARAM = 20.0
HIGHEST_LR = 1e-2
"""Small models tolerate no more, whatever a rule made for large ones extrapolates to: tuned byte
models of 0.1 M to 1 M parameters were best at 5e-3 and worse at 2e-2."""
LOWEST_LR = 1e-5
"""Below, nothing is learnt in time; no published rule was measured there."""
WEIGHT_DECAY_RANGE = (0.01, 0.5)
"""A tenth and five times the anchor's; beyond, the timescale rule has not been tried."""
LEAST_OUTER_STEPS_WITH_MOMENTUM = 100
STEP_LAW_RANGE = (60e6, 1.1e9)
"""N of the grid that the Step Law was fitted on, without vocabulary."""
RULES = ("step-law", "deepseek", "porian", "bjorck")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Numbers of the optimizer with a sentence for each."""

    global_batch_tokens: int
    critical_batch_tokens: float
    steps: int
    peak_lr: float
    weight_decay: float
    lr_by_rule: Mapping[str, float]
    batch_reason: str
    lr_reason: str
    weight_decay_reason: str
    steps_reason: str


def critical_batch_tokens(tokens_d: float) -> float:
    """Batch at which tokens are worth half, of a run over `tokens_d` tokens.

    Zhang's rule is stated in N at 20 tokens per parameter and depends on data, not on size.
    """
    return float(BATCHES["zhang-critical"].law.value(params_n=tokens_d / TOKENS_PER_PARAM))


def critical_batch_of_loss(loss_nats: float) -> float:
    """Kaplan 2020, eq. 1.4: B_crit = B* / L^(1 / alpha_B), in tokens."""
    exponent = NUMBERS["kaplan-critical-batch-exponent"].law
    return float(NUMBERS["kaplan-critical-batch"].law / loss_nats ** (1 / exponent))


def token_cost_ratio(batch_tokens: float, critical_tokens: float) -> float:
    """Tokens needed over those at a vanishing batch, 1 + B / B_crit."""
    return 1 + batch_tokens / critical_tokens


def learning_rates(
    params_n: float, tokens_d: float, compute_flop: float, num_replicas: int = 1
) -> dict[str, float]:
    """Peak learning rate by every published rule, each at its own batch."""
    return {
        name: float(
            LEARNING_RATES[name].law.value(
                params_n=params_n,
                tokens_d=tokens_d,
                compute_flop=compute_flop,
                num_replicas=float(num_replicas),
            )
        )
        for name in (*RULES, "diloco-joint")
    }


def mu_transfer(lr_of_trial: float, *, trial_width: int, width: int) -> float:
    """Learning rate of matrices at another width: lr ~ 1 / width (2203.03466)."""
    return lr_of_trial * trial_width / width


def timescale_ratio(
    batch_tokens: float, peak_lr: float, weight_decay: float, tokens_d: float
) -> float:
    """T = B / (lr lambda D): how long AdamW remembers, as a share of the run."""
    return batch_tokens / (peak_lr * weight_decay * tokens_d)


def anchor_timescale_ratio() -> float:
    """T of the Step Law's own setting."""
    at = {"params_n": ANCHOR_PARAMS, "tokens_d": ANCHOR_TOKENS}
    batch = float(BATCHES["step-law"].law.value(**at))
    peak_lr = float(LEARNING_RATES["step-law"].law.value(**at))
    return timescale_ratio(batch, peak_lr, ANCHOR_WEIGHT_DECAY, ANCHOR_TOKENS)


def outer_settings(num_replicas: int, outer_steps: float) -> tuple[float, float, str]:
    """(learning rate, momentum, reason) of DiLoCo's outer steps, of which a fragment gets so many:
    the best rate read at M = 1, 2, 4, 8 (the next lower M in between), whose momentum of 0.9
    remembers ten outer steps, or plain averages for a run that is not several times as long
    (measured over 17 and 33 outer steps, ops/bench/strategies.md).
    """
    if outer_steps < LEAST_OUTER_STEPS_WITH_MOMENTUM:
        return (
            1.0,
            0.0,
            f"{outer_steps:.3g} outer steps of a fragment are too few for momentum 0.9, which "
            f"remembers ten (below {LEAST_OUTER_STEPS_WITH_MOMENTUM}): plain averages",
        )
    known = max(m for m in (1, 2, 4, 8) if m <= num_replicas)
    rate = NUMBERS[f"outer-lr-{known}"].law
    return rate, 0.9, "best at this number of replicas (read at 1, 2, 4, 8; +- 0.2), momentum 0.9"


def plan_recipe(
    *,
    params_n: float,
    tokens_d: float,
    compute_flop: float,
    seq_len: int,
    num_peers: int,
    num_replicas: int,
    tuned_lr: float | None = None,
    tuned_reason: str = "",
) -> Recipe:
    """The recipe; `num_replicas` above 1 or a DiLoCo of one replica is DiLoCo's, 0 is `sync`.

    `tuned_lr` (from a trial) replaces the rule's learning rate.
    """
    is_diloco = num_replicas > 0
    rule = "diloco-joint" if is_diloco else "step-law"
    wanted = float(
        BATCHES[rule].law.value(
            params_n=params_n, tokens_d=tokens_d, num_replicas=float(max(num_replicas, 1))
        )
    )
    batch_tokens, critical, batch_reason = _batch(
        wanted,
        rule,
        tokens_d=tokens_d,
        seq_len=seq_len,
        num_peers=num_peers,
        unit_tokens=seq_len * max(num_replicas, 1),
    )
    rates = learning_rates(params_n, tokens_d, compute_flop, max(num_replicas, 1))
    peak_lr, lr_reason = _peak_lr(
        rates[rule], rule, batch_ratio=batch_tokens / wanted, params_n=params_n, tokens_d=tokens_d
    )
    if tuned_lr is not None:
        peak_lr, lr_reason = tuned_lr, tuned_reason
    others = ", ".join(f"{name} {rates[name]:.2g}" for name in RULES if name != rule)
    timescale = anchor_timescale_ratio()
    wanted_decay = batch_tokens / (peak_lr * tokens_d * timescale)
    least_decay, most_decay = WEIGHT_DECAY_RANGE
    weight_decay = min(max(wanted_decay, least_decay), most_decay)
    decay_reason = (
        f"AdamW remembers {timescale:.2f} of the run, as in the Step Law's own setting (Power "
        f"Lines): {batch_tokens:,} / ({peak_lr:.2g} x {tokens_d:.3g} x {timescale:.2f})"
    )
    if weight_decay != wanted_decay:
        decay_reason += (
            f" = {wanted_decay:.3g}, held at {weight_decay:g}: outside {least_decay:g} to "
            f"{most_decay:g} the rule means nothing"
        )
    steps = max(1, math.ceil(tokens_d / batch_tokens))
    return Recipe(
        global_batch_tokens=batch_tokens,
        critical_batch_tokens=critical,
        steps=steps,
        peak_lr=peak_lr,
        weight_decay=weight_decay,
        lr_by_rule=rates,
        batch_reason=batch_reason,
        lr_reason=f"{lr_reason}; other rules say {others}",
        weight_decay_reason=decay_reason,
        steps_reason=f"{tokens_d:.4g} tokens / {batch_tokens:,} tokens per step",
    )


def _batch(
    wanted: float,
    rule: str,
    *,
    tokens_d: float,
    seq_len: int,
    num_peers: int,
    unit_tokens: int,
) -> tuple[int, float, str]:
    """Whole windows (of every replica) between one per peer and the critical batch."""
    critical = critical_batch_tokens(tokens_d)
    source = "DiLoCo's joint law" if rule == "diloco-joint" else "the Step Law"
    reason = f"{source} wants {wanted:.3g} tokens"
    allowed = wanted
    if wanted > critical:
        allowed = critical
        reason += f", held at the critical batch of {critical:.3g}"
    least = num_peers * seq_len
    batch_tokens = max(round(allowed / unit_tokens), 1) * unit_tokens
    if batch_tokens < least:
        batch_tokens = least
        reason += f", raised to one window of {seq_len} for each of {num_peers} peers"
    cost = token_cost_ratio(batch_tokens, critical)
    reason += (
        f"; {batch_tokens:,} is {batch_tokens // seq_len:,} windows and "
        f"{batch_tokens / critical:.2f} of the critical batch ({critical:.3g}): "
        f"{1 - 1 / cost:.0%} of the tokens are wasted against a small batch"
    )
    return batch_tokens, critical, reason


def _peak_lr(
    from_rule: float, rule: str, *, batch_ratio: float, params_n: float, tokens_d: float
) -> tuple[float, str]:
    source = "DiLoCo's joint law" if rule == "diloco-joint" else "the Step Law"
    peak_lr = from_rule * math.sqrt(batch_ratio)
    reason = f"{source} gives {from_rule:.3g} at N = {params_n:.3g}, D = {tokens_d:.3g}"
    if abs(batch_ratio - 1) > 0.02:
        reason += f", x sqrt({batch_ratio:.2f}) for the batch = {peak_lr:.3g}"
    lowest, highest = STEP_LAW_RANGE
    if rule == "step-law" and not lowest <= params_n <= highest:
        reason += f" (N is outside its grid of {lowest:.2g} to {highest:.2g}: tune it by a study)"
    if peak_lr > HIGHEST_LR:
        reason += f", held at {HIGHEST_LR:g}, above which small models do not train well"
        peak_lr = HIGHEST_LR
    if peak_lr < LOWEST_LR:
        reason += f", held at {LOWEST_LR:g}, below which nothing is learnt in time"
        peak_lr = LOWEST_LR
    return peak_lr, reason
