"""Rows of the lease book: returned windows, the ends of leases, and the journal line for each
change.

Shared by everything that changes the ledger (leases.py, crediting.py, rollback.py), so that rows,
totals and journal stay in step.
"""

from collections.abc import Sequence
from dataclasses import replace

from coordinator.domain.lease_book import FreeRange, merged, open_intervals
from coordinator.domain.spans import Span, num_windows
from coordinator.operations.common import load_book, unix_ms
from coordinator.store.base import Transaction
from coordinator.store.rows import JournalRow, LeaseRow, ReturnedRow
from protos.contract.telemetry import LeaseState


def note(
    tx: Transaction,
    run_id: str,
    kind: str,
    now_unix_seconds: float,
    *,
    lease: LeaseRow | None = None,
    incarnation: int = 0,
    outer_step: int = 0,
    reason: str = "",
) -> None:
    """Append one line to the journal, about a lease or about the run."""
    if lease is None:
        row = JournalRow(
            0,
            run_id,
            unix_ms(now_unix_seconds),
            kind,
            incarnation,
            outer_step,
            "",
            0,
            0,
            0,
            0,
            0,
            0,
            reason,
        )
    else:
        row = JournalRow(
            0,
            run_id,
            unix_ms(now_unix_seconds),
            kind,
            lease.incarnation,
            outer_step,
            lease.peer_id,
            lease.lease_number,
            lease.fence,
            lease.data_pass,
            lease.chunk_index,
            lease.begin_window,
            lease.end_window,
            reason,
        )
    tx.insert_journal(row)


def free_range(row: ReturnedRow) -> FreeRange:
    """A returned row as the domain sees it."""
    span = Span(
        schedule_position=row.schedule_position,
        data_pass=row.data_pass,
        chunk_index=row.chunk_index,
        begin_window=row.begin_window,
        end_window=row.end_window,
    )
    return FreeRange(span=span, fence=row.fence)


def returned_row(run_id: str, free: FreeRange, *, cause: str) -> ReturnedRow:
    """The inverse of `free_range`."""
    span = free.span
    return ReturnedRow(
        run_id,
        span.schedule_position,
        span.begin_window,
        span.end_window,
        span.data_pass,
        span.chunk_index,
        free.fence,
        cause,
    )


def end_leases(
    tx: Transaction,
    leases: Sequence[LeaseRow],
    state: LeaseState,
    *,
    reason: str,
    now_unix_seconds: float,
) -> int:
    """End active leases as RELEASED or EXPIRED: their open windows become free; returns their
    tokens.
    """
    if not leases:
        return 0
    run_id = leases[0].run_id
    book = load_book(tx, run_id)
    total_windows = 0
    for lease in leases:
        tx.update_lease(replace(lease, state=state, end_reason=reason))
        note(
            tx,
            run_id,
            "RELEASE" if state is LeaseState.RELEASED else "EXPIRE",
            now_unix_seconds,
            lease=lease,
        )
        windows = (lease.begin_window, lease.end_window)
        credited = (  # a lease gets windows that nobody was credited with, and alone until it ends
            tx.live_credits_of_chunk(run_id, lease.schedule_position, windows=windows)
            if lease.credited_windows
            else []
        )
        left = open_intervals(windows, [(row.begin_window, row.end_window) for row in credited])
        free = [
            FreeRange(
                span=Span(
                    schedule_position=lease.schedule_position,
                    data_pass=lease.data_pass,
                    chunk_index=lease.chunk_index,
                    begin_window=begin,
                    end_window=end,
                ),
                fence=lease.fence,
            )
            for begin, end in left
        ]
        put_returned(tx, run_id, free, cause=state)
        total_windows += num_windows(left)
    tokens = total_windows * book.seq_len
    is_release = state is LeaseState.RELEASED
    tx.update_book(
        replace(
            book,
            active_tokens=book.active_tokens - tokens,
            released_tokens=book.released_tokens + (tokens if is_release else 0),
            expired_tokens=book.expired_tokens + (0 if is_release else tokens),
        )
    )
    return tokens


def put_returned(tx: Transaction, run_id: str, free: Sequence[FreeRange], *, cause: str) -> None:
    """Add windows of one chunk to the returned ones, joined with their neighbours of the same
    cause.
    """
    if not free:
        return
    position = free[0].span.schedule_position
    present = [row for row in tx.returned_of_chunk(run_id, position) if row.cause == cause]
    ranges = merged([*(free_range(row) for row in present), *free])
    joined = [returned_row(run_id, one, cause=cause) for one in ranges]
    tx.delete_returned(row for row in present if row not in joined)
    tx.insert_returned(row for row in joined if row not in present)
