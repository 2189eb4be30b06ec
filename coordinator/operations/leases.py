"""Leases: grant, renew, return, expire. lease_book decides; rows, totals and journal change in the
same transaction.

Every change of the ledger is also one line of the journal, in order; ledger_verify recomputes the
books from those lines.
"""

from dataclasses import replace

from coordinator.domain.lease_book import (
    MAX_LEASES_PER_ANSWER,
    BookState,
    Demand,
    FreeRange,
    Grant,
    GrantPlan,
    plan_grants,
)
from coordinator.operations.common import (
    OperationContext,
    RunData,
    answer_once,
    is_recovering,
    load_book,
    load_directive_data,
    load_run,
    load_run_data,
    unix_ms,
)
from coordinator.operations.lease_rows import end_leases, free_range, note, returned_row
from coordinator.operations.members import speed_from_row
from coordinator.operations.requests_ledger import (
    AcquireLeasesRequest,
    AcquireLeasesResponse,
    ExpireLeasesRequest,
    ExpireLeasesResponse,
    ReleaseAllRequest,
    ReleaseLeasesRequest,
    ReleaseLeasesResponse,
    RenewLeasesRequest,
    RenewLeasesResponse,
)
from coordinator.store.base import Transaction
from coordinator.store.rows import BookRow, LeaseRow, RunRow
from protos.contract.certificate import Tag
from protos.contract.errors import ErrorCode, RefusedError, UsageError
from protos.contract.telemetry import LeaseState, RunState
from protos.muster.v1 import common_pb2, leases_pb2

_NUM_RETURNED_RANGES = MAX_LEASES_PER_ANSWER + 1
"""Returned ranges looked at per request: an answer cannot use them all, so a cut list is seen."""
_MAX_EXPIRED_PER_TICK = 256
_GRANTING_STATES = frozenset({RunState.RUNNING, RunState.STALLED})


def open_book(
    tx: Transaction, *, run_id: str, seq_len: int, budget_tokens: int, now_unix_seconds: float
) -> None:
    """Begin the ledger of a new run. Raises UsageError unless the budget is whole windows."""
    if budget_tokens <= 0 or budget_tokens % seq_len:
        raise UsageError(
            f"budget of {budget_tokens} tokens",
            allowed=f"a positive multiple of seq_len = {seq_len}",
            remedy="round it down",
        )
    book = BookRow(run_id, seq_len, budget_tokens, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    tx.insert_book(book)
    note(tx, run_id, "OPEN", now_unix_seconds, reason=f"budget {budget_tokens} tokens")


def check_incarnation(run: RunRow, incarnation: int) -> None:
    """Raises RefusedError (STALE_INCARNATION) unless the caller is in the run's incarnation."""
    if incarnation != run.incarnation:
        raise RefusedError(
            f"incarnation {incarnation}",
            allowed=f"incarnation {run.incarnation} of run {run.run_id!r}",
            remedy="take the incarnation record from the next heartbeat and resynchronise",
            code=ErrorCode.STALE_INCARNATION,
        )


def acquire_leases(
    tx: Transaction,
    request: AcquireLeasesRequest,
    /,
    *,
    context: OperationContext,
    now_unix_seconds: float,
) -> AcquireLeasesResponse:
    """Grant and sign leases in schedule order, or none with the reason; once per request_id."""
    return answer_once(
        tx,
        caller=f"{request.run_id}/{request.peer_id}",
        request_id=request.request_id,
        method="acquire_leases",
        request=request,
        now_unix_seconds=now_unix_seconds,
        respond=lambda: _acquire(tx, request, context=context, now_unix_seconds=now_unix_seconds),
        encode=_acquired_to_bytes,
        decode=_acquired_from_bytes,
    )


def _acquired_to_bytes(response: AcquireLeasesResponse) -> bytes:
    message = leases_pb2.AcquireLeasesResponse(
        leases=response.leases,
        reason=response.reason,
        is_budget_exhausted=response.is_budget_exhausted,
    )
    return bytes(message.SerializeToString())


def _acquired_from_bytes(data: bytes) -> AcquireLeasesResponse:
    message = leases_pb2.AcquireLeasesResponse.FromString(data)
    return AcquireLeasesResponse(
        leases=tuple(message.leases),
        reason=message.reason,
        is_budget_exhausted=message.is_budget_exhausted,
    )


def _acquire(
    tx: Transaction,
    request: AcquireLeasesRequest,
    *,
    context: OperationContext,
    now_unix_seconds: float,
) -> AcquireLeasesResponse:
    run = load_run(tx, request.run_id)
    check_incarnation(run, request.incarnation)
    if run.state not in _GRANTING_STATES:
        return AcquireLeasesResponse(
            leases=(),
            reason=f"the run is {run.state}: {run.state_reason}",
            is_budget_exhausted=False,
        )
    book = load_book(tx, request.run_id)
    demand, refusal = _demand(tx, request, run, book, context)
    if demand is None:
        return AcquireLeasesResponse(leases=(), reason=refusal, is_budget_exhausted=False)
    data = load_run_data(tx, context, request.run_id)
    plan = plan_grants(
        _book_state(tx, book),
        demand,
        schedule=data.order,
        max_data_passes=data.spec.data.max_data_passes,
        may_grant_again=not is_recovering(tx, now_unix_seconds=now_unix_seconds),
    )
    leases = _write_grants(
        tx, request, plan, book, context=context, now_unix_seconds=now_unix_seconds
    )
    signed = tuple(_signed_lease(lease, data, context) for lease in leases)
    return AcquireLeasesResponse(
        leases=signed, reason=plan.reason, is_budget_exhausted=plan.is_budget_exhausted
    )


def _demand(
    tx: Transaction,
    request: AcquireLeasesRequest,
    run: RunRow,
    book: BookRow,
    context: OperationContext,
) -> tuple[Demand | None, str]:
    directive = load_directive_data(tx, context, run.run_id, run.directive_number)
    round_tokens = directive.round_tokens_by_peer.get(request.peer_id, 0) if directive else 0
    if directive is None or round_tokens < book.seq_len:
        return (
            None,
            f"directive {run.directive_number} gives this peer no tokens per round yet",
        )
    peer = tx.peer(run.run_id, request.peer_id)
    held = tx.active_leases(run.run_id, request.peer_id)
    demand = Demand(
        wanted_windows=-(-request.wanted_tokens // book.seq_len),
        held_windows=sum(row.end_window - row.begin_window - row.credited_windows for row in held),
        round_windows=round_tokens // book.seq_len,
        share_ratio=round_tokens / directive.total_round_tokens,
        num_peers=directive.num_training_peers,
        tokens_per_second=0.0 if peer is None else speed_from_row(peer),
        window_tokens=book.seq_len,
    )
    return demand, ""


def _book_state(tx: Transaction, book: BookRow) -> BookState:
    seq_len = book.seq_len
    return BookState(
        frontier_position=book.frontier_position,
        frontier_window=book.frontier_window,
        granted_windows=book.granted_tokens // seq_len,
        credited_windows=book.credited_tokens // seq_len,
        active_windows=book.active_tokens // seq_len,
        expired_windows=book.expired_tokens // seq_len,
        budget_windows=book.budget_tokens // seq_len,
        released=_free_ranges(tx, book, LeaseState.RELEASED) if book.released_tokens else (),
        expired=_free_ranges(tx, book, LeaseState.EXPIRED) if book.expired_tokens else (),
    )


def _free_ranges(tx: Transaction, book: BookRow, cause: LeaseState) -> list[FreeRange]:
    return [
        free_range(row) for row in tx.returned(book.run_id, cause, num_ranges=_NUM_RETURNED_RANGES)
    ]


def _write_grants(
    tx: Transaction,
    request: AcquireLeasesRequest,
    plan: GrantPlan,
    book: BookRow,
    *,
    context: OperationContext,
    now_unix_seconds: float,
) -> list[LeaseRow]:
    if not plan.grants:
        return []
    run_id, seq_len = book.run_id, book.seq_len
    for cause, taken, left in (
        (LeaseState.RELEASED, plan.released_taken, plan.released_left),
        (LeaseState.EXPIRED, plan.expired_taken, plan.expired_left),
    ):
        tx.delete_returned(returned_row(run_id, free, cause=cause) for free in taken)
        tx.insert_returned(returned_row(run_id, free, cause=cause) for free in left)
    number = tx.newest_lease_number(run_id, request.incarnation, request.peer_id)
    expire_unix_ms = unix_ms(now_unix_seconds + context.lease_ttl_seconds)
    leases = [
        _lease_row(
            request,
            grant,
            lease_number=number + offset,
            grant_unix_ms=unix_ms(now_unix_seconds),
            expire_unix_ms=expire_unix_ms,
        )
        for offset, grant in enumerate(plan.grants, 1)
    ]
    tx.insert_leases(leases)
    for lease in leases:
        note(tx, run_id, "GRANT", now_unix_seconds, lease=lease)
    granted_windows = sum(grant.span.num_windows for grant in plan.grants)
    tx.update_book(
        replace(
            book,
            frontier_position=plan.frontier_position,
            frontier_window=plan.frontier_window,
            granted_tokens=book.granted_tokens + plan.num_frontier_windows * seq_len,
            active_tokens=book.active_tokens + granted_windows * seq_len,
            released_tokens=book.released_tokens - plan.num_released_windows * seq_len,
            expired_tokens=book.expired_tokens - plan.num_expired_windows * seq_len,
        )
    )
    return leases


def _lease_row(
    request: AcquireLeasesRequest,
    grant: Grant,
    *,
    lease_number: int,
    grant_unix_ms: int,
    expire_unix_ms: int,
) -> LeaseRow:
    span = grant.span
    return LeaseRow(
        request.run_id,
        request.incarnation,
        request.peer_id,
        lease_number,
        grant.fence,
        span.schedule_position,
        span.data_pass,
        span.chunk_index,
        span.begin_window,
        span.end_window,
        LeaseState.ACTIVE,
        0,
        grant_unix_ms,
        expire_unix_ms,
        "",
    )


def _signed_lease(lease: LeaseRow, data: RunData, context: OperationContext) -> common_pb2.Signed:
    message = common_pb2.Lease(
        run_id=lease.run_id,
        incarnation=lease.incarnation,
        peer_id=lease.peer_id,
        lease_number=lease.lease_number,
        fence=lease.fence,
        range=common_pb2.WindowRange(
            data_pass=lease.data_pass,
            chunk_index=lease.chunk_index,
            begin_window=lease.begin_window,
            end_window=lease.end_window,
        ),
        chunk_digest=bytes.fromhex(data.manifest.training_chunks[lease.chunk_index].digest),
    )
    return context.signing_key.signed(Tag.LEASE, message.SerializeToString())


def release_leases(
    tx: Transaction,
    request: ReleaseLeasesRequest,
    /,
    *,
    context: OperationContext,
    now_unix_seconds: float,
) -> ReleaseLeasesResponse:
    """Return the named leases; what of them was credited stays credited. Raises RefusedError
    (STALE_INCARNATION).
    """
    run = load_run(tx, request.run_id)
    check_incarnation(run, request.incarnation)
    wanted = set(request.lease_numbers)
    leases = [
        lease
        for lease in tx.active_leases(request.run_id, request.peer_id)
        if lease.lease_number in wanted
    ]
    end_leases(
        tx, leases, LeaseState.RELEASED, reason=request.reason, now_unix_seconds=now_unix_seconds
    )
    return ReleaseLeasesResponse(num_released_leases=len(leases))


def release_all(
    tx: Transaction,
    request: ReleaseAllRequest,
    /,
    *,
    context: OperationContext,
    now_unix_seconds: float,
) -> ReleaseLeasesResponse:
    """Return every active lease of a peer."""
    leases = tx.active_leases(request.run_id, request.peer_id)
    end_leases(
        tx, leases, LeaseState.RELEASED, reason=request.reason, now_unix_seconds=now_unix_seconds
    )
    return ReleaseLeasesResponse(num_released_leases=len(leases))


def renew_leases(
    tx: Transaction,
    request: RenewLeasesRequest,
    /,
    *,
    context: OperationContext,
    now_unix_seconds: float,
) -> RenewLeasesResponse:
    """Prolong the peer's active leases among the named ones; name those that it no longer has."""
    run = load_run(tx, request.run_id)
    if request.incarnation != run.incarnation:
        return RenewLeasesResponse(lost_lease_numbers=request.lease_numbers)
    active = {lease.lease_number for lease in tx.active_leases(request.run_id, request.peer_id)}
    lost = []
    for number in request.lease_numbers:
        if number in active:
            continue
        lease = tx.lease(request.run_id, request.incarnation, request.peer_id, number)
        if lease is None or lease.state != LeaseState.COMMITTED:
            lost.append(number)
    tx.renew_leases(
        request.run_id,
        request.incarnation,
        request.peer_id,
        [number for number in request.lease_numbers if number in active],
        expire_unix_ms=unix_ms(now_unix_seconds + context.lease_ttl_seconds),
    )
    return RenewLeasesResponse(lost_lease_numbers=tuple(lost))


def expire_leases(
    tx: Transaction,
    request: ExpireLeasesRequest,
    /,
    *,
    context: OperationContext,
    now_unix_seconds: float,
) -> ExpireLeasesResponse:
    """Expire leases whose time is over; none while RECOVERING. Their windows stay in the budget
    until granted again.
    """
    if is_recovering(tx, now_unix_seconds=now_unix_seconds):
        return ExpireLeasesResponse(
            num_expired_leases=0, num_tokens=0, reason="recovering: nothing expires"
        )
    leases = tx.expired_candidates(
        request.run_id, now_unix_ms=unix_ms(now_unix_seconds), num_leases=_MAX_EXPIRED_PER_TICK
    )
    reason = f"not renewed for {context.lease_ttl_seconds:g} s"
    tokens = end_leases(
        tx, leases, LeaseState.EXPIRED, reason=reason, now_unix_seconds=now_unix_seconds
    )
    return ExpireLeasesResponse(
        num_expired_leases=len(leases), num_tokens=tokens, reason=reason if leases else ""
    )
