"""Heartbeat, leave, seen exit: what keeps a membership alive and what ends it.

A heartbeat is one row written, its fsync shared by everybody in the same group commit (writer.py).
It brings claims and attestations up and takes decisions down; it is idempotent by itself, so it
needs no request memory.
"""

from dataclasses import fields, replace
from itertools import islice

from coordinator.domain.duties import assign, renew
from coordinator.domain.membership import (
    after_end,
    after_heartbeat,
    after_state_loss,
    claim_problem,
)
from coordinator.domain.run_state import FINAL_STATES
from coordinator.operations.common import (
    OperationContext,
    load_book,
    load_directive,
    load_run,
    unix_ms,
)
from coordinator.operations.duties import (
    load_pending_duties,
    order_from_duty,
    release_duties,
    save_duty,
)
from coordinator.operations.epochs import admit_at_once
from coordinator.operations.join import NUM_INITIAL_PEERS, check_addresses
from coordinator.operations.leases import release_all, renew_leases
from coordinator.operations.members import (
    capabilities_from_json,
    capabilities_to_json,
    claims_to_json,
    live_addresses,
    member_from_row,
    note_peer_state,
    row_from_member,
)
from coordinator.operations.parting import take_parting_duty
from coordinator.operations.requests import (
    Claims,
    DutyOrder,
    FindSessionRequest,
    FindSessionResponse,
    HeartbeatRequest,
    HeartbeatResponse,
    LeaveRequest,
    LeaveResponse,
    PeerExitedRequest,
)
from coordinator.operations.requests_ledger import (
    FetchCertificatesRequest,
    ReleaseAllRequest,
    RenewLeasesRequest,
)
from coordinator.operations.rounds import fetch_certificates
from coordinator.operations.runs import find_run
from coordinator.operations.states import take_attestations
from coordinator.operations.studies import assign_trial
from coordinator.store.base import Transaction
from coordinator.store.rows import RunRow
from coordinator.store.rows_membership import PeerRow
from protos.contract.errors import ErrorCode, RefusedError
from protos.contract.telemetry import PeerState, SessionState
from protos.muster.v1 import common_pb2


def find_session(
    tx: Transaction,
    request: FindSessionRequest,
    /,
    *,
    context: OperationContext,
    now_unix_seconds: float,
) -> FindSessionResponse:
    """The newest live session of an identity. Raises RefusedError (SESSION_INVALID or
    PEER_EVICTED).
    """
    rows = tx.peer_runs(request.peer_id)
    live = [
        row
        for row in rows
        if row.session_key and row.session_expire_unix_ms > unix_ms(now_unix_seconds)
    ]
    if live:
        row = max(live, key=lambda row: row.join_unix_ms)
        return FindSessionResponse(
            run_id=row.run_id,
            session_key=row.session_key,
            session_expire_unix_seconds=row.session_expire_unix_ms / 1000,
        )
    for row in rows:
        if row.state == PeerState.EVICTED:
            raise _evicted(row)
    raise _no_session(request.peer_id, "has no session")


def _evicted(row: PeerRow) -> RefusedError:
    return RefusedError(
        f"{row.peer_id} was evicted from run {row.run_id!r}: {row.state_reason}",
        allowed="members that were not evicted",
        remedy="talk to the operator",
        code=ErrorCode.PEER_EVICTED,
    )


def _no_session(peer_id: str, found: str) -> RefusedError:
    return RefusedError(
        f"{peer_id!r} {found}",
        allowed="members between Join and Leave",
        remedy="join again",
        code=ErrorCode.SESSION_INVALID,
    )


def load_session_row(tx: Transaction, run_id: str, peer_id: str) -> PeerRow:
    """Row of a member whose session goes on. Raises RefusedError otherwise."""
    row = tx.peer(run_id, peer_id)
    if row is None:
        raise _no_session(peer_id, f"is not a member of run {run_id!r}")
    if row.state == PeerState.EVICTED:
        raise _evicted(row)
    if not row.session_key:
        raise _no_session(peer_id, f"is {row.state}: {row.state_reason}")
    return row


def heartbeat(
    tx: Transaction,
    request: HeartbeatRequest,
    /,
    *,
    context: OperationContext,
    now_unix_seconds: float,
) -> HeartbeatResponse:
    """Keep a membership and its leases alive; answer with everything that the peer does not know
    yet.
    """
    run = load_run(tx, request.run_id)
    before = load_session_row(tx, request.run_id, request.peer_id)
    row = _take_report(tx, context, run, before, request, now_unix_seconds=now_unix_seconds)
    is_over = run.state in FINAL_STATES
    if row.state != before.state and not is_over:
        run = admit_at_once(tx, context, run, now_unix_seconds=now_unix_seconds)
        row = load_session_row(tx, request.run_id, request.peer_id)
    renewal = RenewLeasesRequest(
        run_id=request.run_id,
        peer_id=request.peer_id,
        incarnation=request.incarnation,
        lease_numbers=request.lease_numbers,
    )
    renewed = renew_leases(tx, renewal, context=context, now_unix_seconds=now_unix_seconds)
    duty = None
    if not is_over:
        duty = _duty_for(tx, context, run, row, request, now_unix_seconds=now_unix_seconds)
    return HeartbeatResponse(
        directive=_newer_directive(tx, run, request),
        incarnation_record=_other_incarnation(tx, run, request),
        certificates=_lacking_certificates(
            tx, context, run, row, request, now_unix_seconds=now_unix_seconds
        ),
        lost_lease_numbers=renewed.lost_lease_numbers,
        duty=duty,
        heartbeat_interval_seconds=context.heartbeat_interval_seconds,
        now_unix_seconds=now_unix_seconds,
        is_run_over=is_over,
        run_state=run.state,
        run_state_reason=run.state_reason,
        initial_peers=_neighbours(tx, context, run, request.peer_id),
        outer_step=load_book(tx, run.run_id).certified_outer_step,
    )


def _take_report(
    tx: Transaction,
    context: OperationContext,
    run: RunRow,
    row: PeerRow,
    request: HeartbeatRequest,
    *,
    now_unix_seconds: float,
) -> PeerRow:
    """Store claims, addresses and attestations; returns the new row."""
    before = member_from_row(row)
    member = after_heartbeat(before, now_unix_seconds=now_unix_seconds)
    if request.has_lost_state:
        member = after_state_loss(member, now_unix_seconds=now_unix_seconds)
    member = take_attestations(
        tx,
        context,
        run,
        member,
        row.public_key,
        request.attestations,
        now_unix_seconds=now_unix_seconds,
    )
    capabilities = capabilities_from_json(row.capabilities_json)
    if request.addresses and request.addresses != capabilities.addresses:
        check_addresses(request.addresses)
        changed = replace(capabilities, addresses=request.addresses)
        row = replace(row, capabilities_json=capabilities_to_json(changed))
    row = replace(row, claims_json=claims_to_json(_checked_claims(request.claims)))
    row = row_from_member(row, member)
    tx.put_peer(row)
    if before.state is not member.state:
        note_peer_state(tx, row, member, now_unix_seconds=now_unix_seconds)
    return row


def _checked_claims(claims: Claims) -> Claims:
    """The claims, or only their state if a number cannot be true: a bad number must not cost a peer
    its leases.
    """
    values = ((field.name, getattr(claims, field.name)) for field in fields(claims))
    numbers = {name: value for name, value in values if isinstance(value, int | float)}
    problem = claim_problem(numbers)
    if not problem:
        return claims
    return Claims(state=claims.state, state_reason=f"claims refused: {problem}")


def _newer_directive(
    tx: Transaction, run: RunRow, request: HeartbeatRequest
) -> common_pb2.Signed | None:
    if request.directive_number == run.directive_number and request.incarnation == run.incarnation:
        return None
    row = tx.directive(run.run_id, run.directive_number)
    return None if row is None else common_pb2.Signed(payload=row.payload, signature=row.signature)


def _other_incarnation(
    tx: Transaction, run: RunRow, request: HeartbeatRequest
) -> common_pb2.Signed | None:
    if request.incarnation == run.incarnation:
        return None
    row = tx.incarnation(run.run_id, run.incarnation)
    return None if row is None else common_pb2.Signed(payload=row.payload, signature=row.signature)


def _lacking_certificates(
    tx: Transaction,
    context: OperationContext,
    run: RunRow,
    row: PeerRow,
    request: HeartbeatRequest,
    *,
    now_unix_seconds: float,
) -> tuple[bytes, ...]:
    """Stored certificates after the step that the peer says or has attested to hold."""
    if request.incarnation != run.incarnation or run.incarnation == 0:
        return ()
    held_outer_step = request.claims.outer_step
    if row.attested_incarnation == run.incarnation:
        held_outer_step = max(held_outer_step, row.attested_outer_step)
    if held_outer_step >= load_book(tx, run.run_id).certified_outer_step:
        return ()
    wanted = FetchCertificatesRequest(
        run_id=run.run_id,
        incarnation=run.incarnation,
        from_outer_step=held_outer_step + 1,
        num_certificates=context.policy.num_reply_certificates,
    )
    found = fetch_certificates(tx, wanted, context=context, now_unix_seconds=now_unix_seconds)
    return found.certificates


def _duty_for(
    tx: Transaction,
    context: OperationContext,
    run: RunRow,
    row: PeerRow,
    request: HeartbeatRequest,
    *,
    now_unix_seconds: float,
) -> DutyOrder | None:
    """The duty that the peer holds or gets now; told again with every heartbeat until its result is
    here. The one that it says it works on is renewed.
    """
    duties = load_pending_duties(tx, run.run_id)
    renewed = renew(
        duties,
        duty_id=request.duty_id,
        peer_id=row.peer_id,
        fence=request.duty_fence,
        now_unix_seconds=now_unix_seconds,
    )
    if renewed is not None:
        save_duty(tx, run.run_id, renewed)
        return order_from_duty(tx, renewed)
    if request.claims.state == SessionState.DRAINING:
        parting = take_parting_duty(
            tx, context, run, member_from_row(row), now_unix_seconds=now_unix_seconds
        )
        return None if parting is None else order_from_duty(tx, parting)
    duty = assign(
        duties,
        member_from_row(row),
        incarnation=run.incarnation,
        now_unix_seconds=now_unix_seconds,
    )
    if duty is None:
        duty = assign_trial(tx, run, row, duties, now_unix_seconds=now_unix_seconds)
    if duty is None:
        return None
    if duty not in duties:
        save_duty(tx, run.run_id, duty)
    return order_from_duty(tx, duty)


def _neighbours(
    tx: Transaction, context: OperationContext, run: RunRow, peer_id: str
) -> tuple[str, ...]:
    """Addresses of members of the newest roster; of joined peers while there is none."""
    directive = load_directive(tx, context, run.run_id, run.directive_number)
    if directive is None or not directive.roster:
        rows = tx.peers(run.run_id)
        return live_addresses(rows, except_peer_id=peer_id, num_addresses=NUM_INITIAL_PEERS)
    addresses = (
        address
        for entry in directive.roster
        if entry.peer_id != peer_id and entry.can_accept_connections
        for address in entry.addresses
    )
    return tuple(islice(addresses, NUM_INITIAL_PEERS))


def leave(
    tx: Transaction, request: LeaveRequest, /, *, context: OperationContext, now_unix_seconds: float
) -> LeaveResponse:
    """End a membership in good order: last attestations, leases and duties returned. Leaving twice
    is no error.
    """
    run = load_run(tx, request.run_id)
    row = tx.peer(request.run_id, request.peer_id)
    if row is None:
        raise _no_session(request.peer_id, f"is not a member of run {request.run_id!r}")
    if not row.session_key:
        return LeaveResponse(num_released_leases=0)
    member = take_attestations(
        tx,
        context,
        run,
        member_from_row(row),
        row.public_key,
        request.attestations,
        now_unix_seconds=now_unix_seconds,
    )
    tx.put_peer(row_from_member(row, member))
    return end_membership(
        tx,
        context,
        request.run_id,
        request.peer_id,
        state=PeerState.LEFT,
        reason=request.reason or "left",
        now_unix_seconds=now_unix_seconds,
    )


def peer_exited(
    tx: Transaction,
    request: PeerExitedRequest,
    /,
    *,
    context: OperationContext,
    now_unix_seconds: float,
) -> LeaveResponse:
    """A process that the caller had started is dead: LOST at once, everything it held is free."""
    run = find_run(tx, request.run_id)
    row = tx.peer(run.run_id, request.peer_id)
    if row is None or not member_from_row(row).is_live:
        return LeaveResponse(num_released_leases=0)
    return end_membership(
        tx,
        context,
        run.run_id,
        request.peer_id,
        state=PeerState.LOST,
        reason=f"seen to exit: {request.reason}",
        now_unix_seconds=now_unix_seconds,
    )


def end_membership(
    tx: Transaction,
    context: OperationContext,
    run_id: str,
    peer_id: str,
    *,
    state: PeerState,
    reason: str,
    now_unix_seconds: float,
) -> LeaveResponse:
    """A certain end: the session is over, leases and duties are free at once; its vote goes with
    the next directive.
    """
    row = tx.peer(run_id, peer_id)
    assert row is not None, "the caller has found the member"
    member = after_end(member_from_row(row), state=state, reason=reason)
    tx.put_peer(row_from_member(row, member))
    note_peer_state(tx, row, member, now_unix_seconds=now_unix_seconds)
    request = ReleaseAllRequest(run_id=run_id, peer_id=peer_id, reason=f"{state}: {reason}")
    released = release_all(tx, request, context=context, now_unix_seconds=now_unix_seconds)
    release_duties(tx, run_id, peer_id, reason=reason, now_unix_seconds=now_unix_seconds)
    return LeaveResponse(num_released_leases=released.num_released_leases)
