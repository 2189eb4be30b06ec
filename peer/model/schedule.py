"""Learning rate as a pure function of schedule_tokens: linear warm-up, constant, 1 - sqrt cooldown.

schedule_tokens is replicated state advanced by certificates, so all members compute the same rate.
An update is made from the gradients of one round, so the rate is taken half a nominal round after
the state that they were computed at: the first update then moves, and the last one has not quite
reached zero. Only additions, divisions and one square root are used; IEEE 754 rounds each of them
correctly, hence the same bits on every machine.
"""

import math

from protos.contract.run_spec import RunSpec


def lr_ratio(
    *,
    position_tokens: float,
    lr_warmup_tokens: int,
    cooldown_start_tokens: int,
    budget_tokens: int,
) -> float:
    """Share of the peak rate, 0..1, at a position in the run; 0 from budget_tokens on."""
    warmup_ratio = min(1.0, position_tokens / lr_warmup_tokens) if lr_warmup_tokens > 0 else 1.0
    if position_tokens <= cooldown_start_tokens:
        return warmup_ratio
    if position_tokens >= budget_tokens:
        return 0.0
    cooled_ratio = (position_tokens - cooldown_start_tokens) / (
        budget_tokens - cooldown_start_tokens
    )
    return warmup_ratio * (1.0 - math.sqrt(cooled_ratio))


def learning_rate(
    spec: RunSpec, *, schedule_tokens: int, cooldown_start_tokens: int, budget_tokens: int
) -> float:
    """Rate of the update made on the state at `schedule_tokens` (tokens before this round)."""
    return spec.optimizer.peak_lr * lr_ratio(
        position_tokens=schedule_tokens + spec.strategy.global_batch_tokens / 2,
        lr_warmup_tokens=spec.schedule.lr_warmup_tokens,
        cooldown_start_tokens=cooldown_start_tokens,
        budget_tokens=budget_tokens,
    )


def planned_cooldown_start_tokens(spec: RunSpec, *, budget_tokens: int) -> int:
    """Where the cooldown begins if the budget stays; directives carry the decided value."""
    return round(budget_tokens * (1 - spec.schedule.cooldown_ratio))
