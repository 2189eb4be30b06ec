"""Taking a proven certificate into the books: certificate, credits, lease rows and totals in one
transaction.

The caller has checked that the certificate is proven and continues the chain. domain/ledger decides
window by window; a range that cannot be credited does not make the round invalid, it is booked once
as uncredited with the reason.
"""

import math
from collections import defaultdict
from dataclasses import dataclass, field, replace

from coordinator.domain.lease_book import FreeRange
from coordinator.domain.ledger import BookedLease, Claim, Piece, decide_credit
from coordinator.domain.spans import Interval, intersect, num_windows, subtract
from coordinator.operations.common import load_book, unix_ms
from coordinator.operations.lease_rows import free_range, note, returned_row
from coordinator.operations.requests_ledger import CertificateReceipt
from coordinator.store.base import Transaction
from coordinator.store.rows import CertificateRow, CreditRow, LeaseRow, UncreditedRow
from protos.contract.telemetry import LeaseState
from protos.muster.v1 import common_pb2, rounds_pb2


@dataclass(slots=True)
class _Tally:
    """Windows of one certificate, by what became of them."""

    credited_by_peer: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    uncredited_by_peer: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    trained_by_peer: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    from_active: int = 0
    from_released: int = 0
    from_expired: int = 0
    first_reason: str = ""


def take_certificate(
    tx: Transaction,
    certificate: rounds_pb2.Certificate,
    value: rounds_pb2.RoundValue,
    *,
    now_unix_seconds: float,
) -> CertificateReceipt:
    """Store the next certificate of the chain and credit what it lists.

    Raises protobuf's DecodeError for unreadable contributions, before anything is written.
    """
    contributions = rounds_pb2.Contributions.FromString(certificate.contributions)
    claims = [
        (_claim(contribution.peer_id, leased, named), _is_of(named, contribution.peer_id, value))
        for contribution in contributions.contributions
        for leased in contribution.ranges
        for named in [common_pb2.Lease.FromString(leased.lease.payload)]
    ]
    tally = _Tally()
    for claim, is_own in claims:
        _take_range(tx, value, claim, tally, is_own=is_own)
    receipt = _write_totals(
        tx,
        certificate,
        value,
        tally,
        num_members=len(contributions.contributions),
        loss_nats=_mean_loss_nats(contributions, tally),
        now_unix_seconds=now_unix_seconds,
    )
    note(
        tx,
        value.run_id,
        "CERTIFICATE",
        now_unix_seconds,
        incarnation=value.incarnation,
        outer_step=value.outer_step,
    )
    return receipt


def _write_totals(
    tx: Transaction,
    certificate: rounds_pb2.Certificate,
    value: rounds_pb2.RoundValue,
    tally: _Tally,
    *,
    num_members: int,
    loss_nats: float,
    now_unix_seconds: float,
) -> CertificateReceipt:
    """Store the certificate's row, and move the totals of the run and of each peer."""
    book = load_book(tx, value.run_id)
    seq_len = book.seq_len
    credited = sum(tally.credited_by_peer.values()) * seq_len
    uncredited = sum(tally.uncredited_by_peer.values()) * seq_len
    trained = sum(tally.trained_by_peer.values()) * seq_len
    schedule_tokens = book.schedule_tokens + trained
    tx.insert_certificate(
        CertificateRow(
            run_id=value.run_id,
            incarnation=value.incarnation,
            outer_step=value.outer_step,
            attempt=certificate.attempt,
            next_directive_number=value.next_directive_number,
            num_members=num_members,
            num_contributors=sum(1 for windows in tally.trained_by_peer.values() if windows),
            trained_tokens=trained,
            credited_tokens=credited,
            uncredited_tokens=uncredited,
            schedule_tokens=schedule_tokens,
            loss_nats=loss_nats,
            store_unix_ms=unix_ms(now_unix_seconds),
            rolled_back_by=0,
            value=certificate.value,
            certificate=certificate.SerializeToString(),
        )
    )
    for peer_id in tally.trained_by_peer:
        tx.add_peer_totals(
            value.run_id,
            peer_id,
            credited=tally.credited_by_peer[peer_id] * seq_len,
            uncredited=tally.uncredited_by_peer[peer_id] * seq_len,
        )
    tx.update_book(
        replace(
            book,
            active_tokens=book.active_tokens - tally.from_active * seq_len,
            released_tokens=book.released_tokens - tally.from_released * seq_len,
            expired_tokens=book.expired_tokens - tally.from_expired * seq_len,
            credited_tokens=book.credited_tokens + credited,
            uncredited_tokens=book.uncredited_tokens + uncredited,
            schedule_tokens=schedule_tokens,
            certified_outer_step=value.outer_step,
        )
    )
    return CertificateReceipt(
        outer_step=value.outer_step,
        is_stored=True,
        credited_tokens=credited,
        uncredited_tokens=uncredited,
        reason=tally.first_reason,
    )


def _claim(peer_id: str, leased: rounds_pb2.LeasedRange, named: common_pb2.Lease) -> Claim:
    return Claim(
        peer_id=peer_id,
        lease_number=named.lease_number,
        fence=named.fence,
        chunk=(named.range.data_pass, named.range.chunk_index),
        windows=(leased.begin_window, leased.end_window),
    )


def _is_of(named: common_pb2.Lease, peer_id: str, value: rounds_pb2.RoundValue) -> bool:
    """True if the lease is this member's and of this incarnation."""
    is_own: bool = (named.run_id, named.incarnation, named.peer_id) == (
        value.run_id,
        value.incarnation,
        peer_id,
    )
    return is_own


def _take_range(
    tx: Transaction, value: rounds_pb2.RoundValue, claim: Claim, tally: _Tally, *, is_own: bool
) -> None:
    """Decide one range and write its pieces."""
    peer_id = claim.peer_id
    lease = (
        tx.lease(value.run_id, value.incarnation, peer_id, claim.lease_number) if is_own else None
    )
    if lease is None:
        pieces = decide_credit(claim, lease=None, leases_of_chunk=(), credited=())
    else:
        position, windows = lease.schedule_position, (lease.begin_window, lease.end_window)
        pieces = decide_credit(
            claim,
            lease=_booked(lease),
            leases_of_chunk=[
                _booked(row)
                for row in tx.leases_of_chunk(
                    value.run_id, value.incarnation, position, windows=windows
                )
            ],
            credited=[
                ((row.begin_window, row.end_window), row.outer_step)
                for row in tx.live_credits_of_chunk(value.run_id, position, windows=windows)
            ],
        )
    tally.trained_by_peer[peer_id] += num_windows([piece.windows for piece in pieces])
    credited = [piece.windows for piece in pieces if piece.is_credited]
    if lease is not None and credited:
        _credit(tx, value, lease, credited, tally)
    _book_uncredited(tx, value, claim, [piece for piece in pieces if not piece.is_credited], tally)


def _booked(row: LeaseRow) -> BookedLease:
    return BookedLease(
        lease_number=row.lease_number,
        peer_id=row.peer_id,
        fence=row.fence,
        chunk=(row.data_pass, row.chunk_index),
        windows=(row.begin_window, row.end_window),
    )


def _credit(
    tx: Transaction,
    value: rounds_pb2.RoundValue,
    lease: LeaseRow,
    credited: list[Interval],
    tally: _Tally,
) -> None:
    windows = num_windows(credited)
    tx.insert_credits(
        CreditRow(
            value.run_id,
            value.incarnation,
            value.outer_step,
            lease.peer_id,
            lease.lease_number,
            lease.schedule_position,
            lease.data_pass,
            lease.chunk_index,
            begin,
            end,
            0,
        )
        for begin, end in credited
    )
    done = lease.credited_windows + windows
    state = lease.state
    if state == LeaseState.ACTIVE:
        tally.from_active += windows
        if done == lease.end_window - lease.begin_window:
            state = LeaseState.COMMITTED
    else:
        _take_back_returned(tx, lease, credited, tally)
    tx.update_lease(replace(lease, credited_windows=done, state=state))
    tally.credited_by_peer[lease.peer_id] += windows


def _take_back_returned(
    tx: Transaction, lease: LeaseRow, credited: list[Interval], tally: _Tally
) -> None:
    """A late result of windows that nobody else got yet: they are no longer free."""
    for row in tx.returned_of_chunk(lease.run_id, lease.schedule_position):
        whole = (row.begin_window, row.end_window)
        taken = num_windows(intersect(whole, credited))
        if not taken:
            continue
        free = free_range(row)
        tx.delete_returned([row])
        tx.insert_returned(
            returned_row(
                lease.run_id,
                FreeRange(span=free.span.part(*part), fence=free.fence),
                cause=row.cause,
            )
            for part in subtract(whole, credited)
        )
        if row.cause == LeaseState.RELEASED:
            tally.from_released += taken
        else:
            tally.from_expired += taken


def _book_uncredited(
    tx: Transaction,
    value: rounds_pb2.RoundValue,
    claim: Claim,
    pieces: list[Piece],
    tally: _Tally,
) -> None:
    tx.insert_uncredited(
        UncreditedRow(
            0,
            value.run_id,
            value.incarnation,
            value.outer_step,
            claim.peer_id,
            claim.lease_number,
            *claim.chunk,
            *piece.windows,
            piece.reason,
        )
        for piece in pieces
    )
    for piece in pieces:
        tally.uncredited_by_peer[claim.peer_id] += piece.windows[1] - piece.windows[0]
        if not tally.first_reason:
            tally.first_reason = (
                f"windows {piece.windows[0]} to {piece.windows[1]} of peer {claim.peer_id} not "
                "credited: "
                f"{piece.reason}"
            )


def _mean_loss_nats(contributions: rounds_pb2.Contributions, tally: _Tally) -> float:
    """Token-weighted mean of the members' claims; claims that are no numbers are left out."""
    total_nats, total_windows = 0.0, 0
    for contribution in contributions.contributions:
        windows = tally.trained_by_peer.get(contribution.peer_id, 0)
        if windows and math.isfinite(contribution.loss_nats):
            total_nats += windows * contribution.loss_nats
            total_windows += windows
    return total_nats / total_windows if total_windows else 0.0
