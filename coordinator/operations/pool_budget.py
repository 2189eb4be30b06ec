"""The budget and the cooldown of a run while it goes on: decided in domain/budget.py, stored here,
carried by the next directive, and told once in the event log with the numbers that decided.

Only a run whose spec names a deadline changes its budget; the others are told of their cooldown
when it begins. The pool's speed is what was credited in the last minute, nobody's claim.
"""

import json
from dataclasses import replace

from coordinator.domain.budget import follow_pool
from coordinator.domain.directives import cooldown_start
from coordinator.operations.common import OperationContext, load_book, load_run_data, unix_ms
from coordinator.store.base import Transaction
from coordinator.store.rows import BookRow, RunRow

GOODPUT_SECONDS = 60.0
"""Goodput, ETA and a budget that follows the pool look this far back."""


def goodput_tokens_per_second(tx: Transaction, run: RunRow, *, now_unix_seconds: float) -> float:
    """Credited tokens per second over the last minute, or since the start if that is shorter."""
    if not run.start_unix_ms:
        return 0.0
    begin_unix_seconds = max(run.start_unix_ms / 1000, now_unix_seconds - GOODPUT_SECONDS)
    steps = tx.steps(run.run_id, since_unix_ms=unix_ms(begin_unix_seconds))
    span_seconds = max(now_unix_seconds - begin_unix_seconds, 1.0)
    return sum(step.credited_tokens for step in steps) / span_seconds


def cooldown_start_tokens(
    tx: Transaction, run_id: str, budget_tokens: int, *, cooldown_ratio: float
) -> int:
    """Where the cooldown begins: as decided, else so that it takes its share of the budget."""
    decided = tx.meta(_decided(run_id))
    if decided:
        return int(json.loads(decided))
    return cooldown_start(budget_tokens, cooldown_ratio=cooldown_ratio)


def adapt_budget(
    tx: Transaction, context: OperationContext, run: RunRow, *, now_unix_seconds: float
) -> str:
    """Let the budget follow the pool if the run's spec says so; returns what was decided, "" if
    nothing new. Runs before the directive of the same tick, which carries it.
    """
    data = load_run_data(tx, context, run.run_id)
    schedule, book = data.spec.schedule, load_book(tx, run.run_id)
    if schedule.cooldown_ratio == 0 or tx.meta(_told(run.run_id)):
        return ""
    start = cooldown_start(book.budget_tokens, cooldown_ratio=schedule.cooldown_ratio)
    if book.schedule_tokens >= start > 0:
        return _begin_cooldown(tx, run, _fixed_reason(book, start), start, now_unix_seconds)
    run_seconds = now_unix_seconds - run.start_unix_ms / 1000
    if not schedule.deadline_seconds or run_seconds < GOODPUT_SECONDS:
        return ""
    change = follow_pool(
        budget_tokens=book.budget_tokens,
        credited_tokens=book.credited_tokens,
        granted_tokens=book.granted_tokens,
        schedule_tokens=book.schedule_tokens,
        cooldown_ratio=schedule.cooldown_ratio,
        tokens_per_second=goodput_tokens_per_second(tx, run, now_unix_seconds=now_unix_seconds),
        left_seconds=schedule.deadline_seconds - run_seconds,
        seq_len=book.seq_len,
        max_tokens=data.order.tokens_within_passes(data.spec.data.max_data_passes),
    )
    if not change.is_changed:
        return ""
    tx.update_book(replace(book, budget_tokens=change.budget_tokens))
    if change.is_cooling:
        start = change.cooldown_start_tokens
        return _begin_cooldown(tx, run, change.reason, start, now_unix_seconds)
    _note(tx, run, change.reason, now_unix_seconds)
    return change.reason


def _fixed_reason(book: BookRow, start_tokens: int) -> str:
    remaining = book.budget_tokens - start_tokens
    return (
        f"the cooldown begins at {start_tokens:,} tokens: the {remaining:,} that remain of "
        f"{book.budget_tokens:,} are {remaining / start_tokens:.2f} of the spent"
    )


def _begin_cooldown(
    tx: Transaction, run: RunRow, reason: str, start_tokens: int, now_unix_seconds: float
) -> str:
    tx.set_meta(_decided(run.run_id), json.dumps(start_tokens))
    tx.set_meta(_told(run.run_id), "yes")
    _note(tx, run, reason, now_unix_seconds)
    return reason


def _note(tx: Transaction, run: RunRow, text: str, now_unix_seconds: float) -> None:
    tx.insert_event(
        run_id=run.run_id, unix_ms=unix_ms(now_unix_seconds), kind="budget", peer_id="", text=text
    )


def _decided(run_id: str) -> str:
    return f"cooldown_start/{run_id}"


def _told(run_id: str) -> str:
    return f"cooldown_told/{run_id}"
