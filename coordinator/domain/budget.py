"""Token budgets: of a run in whole windows, and of each peer in each round so that all finish
together.

Shares are proportional to measured speed and never below one window. A lone fast peer does more
work, not faster rounds: the sum stays global_batch_tokens (rounded down to whole windows) as long
as there is a window for everybody.
"""

from collections.abc import Mapping
from dataclasses import dataclass

MAX_ROUND_FACTOR = 4
"""A contribution may weigh this many times its peer's budget: late members and re-leased windows
may add up.
"""

BUDGET_FOLLOW_RATIO = 0.1
"""A run's budget that follows its pool is left as it is for smaller changes."""

BUDGET_TOLERANCE_RATIO = 0.2
"""Budgets closer than this to what speeds suggest stay as they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunBudget:
    """Budget of a run, or the refusal of it."""

    budget_tokens: int
    """Whole windows; 0 if refused."""
    reason: str


def plan_run_budget(
    wanted_tokens: int, *, seq_len: int, pass_tokens: int, max_tokens: int, max_data_passes: int
) -> RunBudget:
    """Round down to whole windows; refuse less than one window and more than the data's passes
    give.

    `pass_tokens` is one pass over all training windows, `max_tokens` all that `max_data_passes`
    passes admit.
    """
    budget_tokens = wanted_tokens // seq_len * seq_len
    if budget_tokens <= 0:
        reason = f"{wanted_tokens} tokens are less than one window of {seq_len}"
        return RunBudget(budget_tokens=0, reason=reason)
    passes = budget_tokens / pass_tokens if pass_tokens else float("inf")
    if budget_tokens > max_tokens:
        reason = (
            f"{budget_tokens} tokens are {passes:.1f} passes over {pass_tokens} training tokens;"
            f" max_data_passes = {max_data_passes} admits {max_tokens // seq_len * seq_len}"
        )
        return RunBudget(budget_tokens=0, reason=reason)
    rounded = "" if budget_tokens == wanted_tokens else f", rounded down from {wanted_tokens}"
    reason = (
        f"{budget_tokens} tokens = {budget_tokens // seq_len} windows of {seq_len}{rounded};"
        f" {passes:.2f} passes over {pass_tokens} training tokens"
    )
    return RunBudget(budget_tokens=budget_tokens, reason=reason)


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetChange:
    """A run's budget that follows its pool, after a look at the pool."""

    budget_tokens: int
    cooldown_start_tokens: int
    is_changed: bool
    is_cooling: bool
    """True if the cooldown begins with this decision: the budget stays from now on."""
    reason: str


def follow_pool(
    *,
    budget_tokens: int,
    credited_tokens: int,
    granted_tokens: int,
    schedule_tokens: int,
    cooldown_ratio: float,
    tokens_per_second: float,
    left_seconds: float,
    seq_len: int,
    max_tokens: int,
) -> BudgetChange:
    """Stretch or shrink a budget to what the pool will have trained at the deadline, while the
    learning rate is constant; begin the cooldown when what remains is at most cooldown_ratio of
    the whole (0.25 of the spent for a fifth).

    Changes below BUDGET_FOLLOW_RATIO are left alone. Whole windows, never below what is granted,
    at most `max_tokens`.
    """
    begins = round(budget_tokens * (1 - cooldown_ratio))

    def keep(reason: str) -> BudgetChange:
        return BudgetChange(
            budget_tokens=budget_tokens,
            cooldown_start_tokens=begins,
            is_changed=False,
            is_cooling=False,
            reason=reason,
        )

    if tokens_per_second <= 0 and left_seconds > 0:
        return keep("nobody trains: the pool's speed is not known")
    more_tokens = tokens_per_second * max(left_seconds, 0.0)
    wanted = min(credited_tokens + more_tokens, max_tokens)
    floor = max(-(-granted_tokens // seq_len), credited_tokens // seq_len + 1)
    total = max(int(wanted) // seq_len, floor) * seq_len
    pool = (
        f"{tokens_per_second:,.0f} tokens/s for {max(left_seconds, 0.0):,.0f} s more make "
        f"{total:,} tokens of {credited_tokens:,} credited ones"
    )
    remaining = total - credited_tokens
    if remaining <= cooldown_ratio * total and schedule_tokens > 0:
        return BudgetChange(
            budget_tokens=total,
            cooldown_start_tokens=schedule_tokens,
            is_changed=total != budget_tokens or schedule_tokens != begins,
            is_cooling=True,
            reason=f"the cooldown begins: {pool}; the {remaining:,} that remain are at most "
            f"{cooldown_ratio:.0%} of the whole",
        )
    if abs(total - budget_tokens) <= BUDGET_FOLLOW_RATIO * budget_tokens:
        return keep(f"{pool}, within {BUDGET_FOLLOW_RATIO:.0%} of the budget")
    return BudgetChange(
        budget_tokens=total,
        cooldown_start_tokens=round(total * (1 - cooldown_ratio)),
        is_changed=True,
        is_cooling=False,
        reason=f"the budget follows the pool from {budget_tokens:,} to {total:,} tokens: {pool}",
    )


def plan_round_tokens(
    speed_by_peer: Mapping[str, float], *, global_batch_tokens: int, seq_len: int
) -> dict[str, int]:
    """Tokens per round of each contributing peer: whole windows, proportional to tokens per second.

    A speed of 0 is unknown and counts as the mean of the known ones. Remainders go to the largest
    fractions, ties by peer_id, so equal inputs give equal budgets. `seq_len` is the unit: of diloco
    an inner step. The sum is the global batch, or one unit each if that is more.
    """
    if not speed_by_peer:
        return {}
    num_windows = max(global_batch_tokens // seq_len, len(speed_by_peer))
    known = [speed for speed in speed_by_peer.values() if speed > 0]
    mean_speed = sum(known) / len(known) if known else 1.0
    speeds = {peer: speed if speed > 0 else mean_speed for peer, speed in speed_by_peer.items()}
    spare_windows = num_windows - len(speeds)
    windows = {}
    exact_windows = {}
    rest = dict(speeds)
    floor_peers: set[str] = set()
    while (
        True
    ):  # peers whose share is below one window get exactly one; the others share what is left
        free_windows = num_windows - len(floor_peers)
        total_speed = sum(rest.values())
        low = {p for p, speed in rest.items() if free_windows * speed < total_speed}
        if not low or len(low) == len(rest):
            break
        floor_peers |= low
        rest = {p: speed for p, speed in rest.items() if p not in low}
    for peer in floor_peers:
        windows[peer] = 1
    for peer, speed in rest.items():
        exact_windows[peer] = max(1.0, free_windows * (speed / total_speed))
        windows[peer] = max(1, int(exact_windows[peer]))
    left = num_windows - sum(windows.values())
    order = sorted(rest, key=lambda p: (int(exact_windows[p]) - exact_windows[p], p))
    for index in range(max(0, left)):
        windows[order[index % len(order)]] += 1
    for index in range(max(0, min(-left, spare_windows))):  # float error only
        windows[order[-1 - index % len(order)]] -= 1
    return {peer: windows[peer] * seq_len for peer in sorted(windows)}


def are_budgets_off(current: Mapping[str, int], wanted: Mapping[str, int]) -> str:
    """Sentence naming the peer whose budget is furthest off by more than the tolerance, "" if none
    is.
    """
    worst_ratio, sentence = BUDGET_TOLERANCE_RATIO, ""
    for peer, wanted_tokens in sorted(wanted.items()):
        current_tokens = current.get(peer, 0)
        ratio = abs(wanted_tokens - current_tokens) / max(current_tokens, 1)
        if ratio > worst_ratio:
            worst_ratio = ratio
            sentence = (
                f"round budget of {peer[:8]} is {current_tokens} tokens, its speed suggests "
                f"{wanted_tokens}"
            )
    return sentence
