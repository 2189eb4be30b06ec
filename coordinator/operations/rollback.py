"""The ledger's part of a new incarnation: everything credited after its base becomes free again.

The caller writes the signed record, the directive and the run's row in the same transaction.
Certificates of older incarnations after the base are refused from then on (chain_head), so their
windows can be granted at once.
"""

from collections import defaultdict
from dataclasses import replace

from coordinator.domain.lease_book import FreeRange
from coordinator.domain.spans import Span
from coordinator.operations.common import OperationContext, load_book, unix_ms
from coordinator.operations.lease_rows import end_leases, free_range, note, put_returned
from coordinator.operations.requests_ledger import ApplyRollback
from coordinator.store.base import Transaction
from coordinator.store.rows import CreditRow
from protos.contract.errors import ErrorCode, RefusedError
from protos.contract.telemetry import LeaseState


def apply_rollback(
    tx: Transaction,
    request: ApplyRollback,
    /,
    *,
    context: OperationContext,
    now_unix_seconds: float,
) -> int:
    """Free what was credited after `to_outer_step` and all leases; returns the tokens rolled back.

    Raises RefusedError while a certificate up to `to_outer_step` is missing. After it: nothing is
    active or expired, and granted = released + credited.
    """
    run_id = request.run_id
    book = load_book(tx, run_id)
    if request.to_outer_step > book.certified_outer_step:
        raise RefusedError(
            f"no certificate of outer step {request.to_outer_step} is stored",
            allowed=f"outer steps up to {book.certified_outer_step}",
            remedy="wait until a member has reported it",
            code=ErrorCode.NOT_READY,
        )
    reason = f"incarnation {request.incarnation} begins from outer step {request.to_outer_step}"
    end_leases(
        tx,
        tx.all_active_leases(run_id),
        LeaseState.RELEASED,
        reason=reason,
        now_unix_seconds=now_unix_seconds,
    )
    for row in tx.returned(run_id, LeaseState.EXPIRED, num_ranges=1_000_000):
        tx.delete_returned([row])
        put_returned(tx, run_id, [free_range(row)], cause=LeaseState.RELEASED)
    windows_by_peer = _free_credits(tx, run_id, after_outer_step=request.to_outer_step)
    tx.mark_credits_rolled_back(
        run_id, after_outer_step=request.to_outer_step, rolled_back_by=request.incarnation
    )
    tx.mark_certificates_rolled_back(
        run_id, after_outer_step=request.to_outer_step, rolled_back_by=request.incarnation
    )
    for peer_id, windows in windows_by_peer.items():
        tokens = windows * book.seq_len
        tx.add_peer_totals(run_id, peer_id, credited=-tokens, rolled_back=tokens)
    rolled_back = sum(windows_by_peer.values()) * book.seq_len
    base = tx.live_certificate(run_id, request.to_outer_step)
    book = load_book(tx, run_id)
    credited = book.credited_tokens - rolled_back
    tx.update_book(
        replace(
            book,
            active_tokens=0,
            expired_tokens=0,
            released_tokens=book.granted_tokens - credited,
            credited_tokens=credited,
            rolled_back_tokens=book.rolled_back_tokens + rolled_back,
            schedule_tokens=0 if base is None else base.schedule_tokens,
            certified_outer_step=request.to_outer_step,
        )
    )
    note(
        tx,
        run_id,
        "ROLLBACK",
        now_unix_seconds,
        incarnation=request.incarnation,
        outer_step=request.to_outer_step,
        reason=reason,
    )
    if rolled_back:
        tx.insert_event(
            run_id=run_id,
            unix_ms=unix_ms(now_unix_seconds),
            kind="rollback",
            peer_id="",
            text=f"{reason}: {rolled_back} tokens rolled back",
        )
    return rolled_back


def _free_credits(tx: Transaction, run_id: str, *, after_outer_step: int) -> dict[str, int]:
    """Return what later outer steps credited; gives windows by peer."""
    windows_by_peer: dict[str, int] = defaultdict(int)
    for credit in tx.live_credits_after(run_id, after_outer_step):
        windows_by_peer[credit.peer_id] += credit.end_window - credit.begin_window
        put_returned(tx, run_id, [_freed(tx, credit)], cause=LeaseState.RELEASED)
    return windows_by_peer


def _freed(tx: Transaction, credit: CreditRow) -> FreeRange:
    """Windows of a credit as free ones, under the fence of the lease they were trained under."""
    lease = tx.lease(credit.run_id, credit.incarnation, credit.peer_id, credit.lease_number)
    span = Span(
        schedule_position=credit.schedule_position,
        data_pass=credit.data_pass,
        chunk_index=credit.chunk_index,
        begin_window=credit.begin_window,
        end_window=credit.end_window,
    )
    return FreeRange(span=span, fence=1 if lease is None else lease.fence)
