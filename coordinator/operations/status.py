"""What readers see of a run: status, peers, events, curves. Reads only; `Writer.read` runs them on
the newest committed state.

Claimed and counted stay apart: `Claims` is a peer's word, everything else the coordinator's books.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import TypeVar

from coordinator.domain.duties import DutyKind, DutyState, final_duty_id
from coordinator.domain.run_state import FINAL_STATES
from coordinator.operations.common import (
    RECOVERING_META,
    OperationContext,
    is_recovering,
    load_book,
    load_directive,
)
from coordinator.operations.duties import load_duties
from coordinator.operations.forecasts import all_forecasts, forecast_status
from coordinator.operations.members import capabilities_from_json, claims_from_json, member_from_row
from coordinator.operations.pool_budget import goodput_tokens_per_second
from coordinator.operations.reachability import reach_warning
from coordinator.operations.requests_admin import (
    EvaluationPoint,
    EventsRequest,
    EventsResponse,
    EventStatus,
    PeersRequest,
    PeersResponse,
    PeerStatus,
    SeriesRequest,
    SeriesResponse,
    StatusRequest,
    StatusResponse,
    StepPoint,
)
from coordinator.operations.runs import find_run
from coordinator.operations.states import proved_checkpoints, unequal_reason
from coordinator.store.base import Transaction
from coordinator.store.rows import BookRow, PeerTotalRow, RunRow
from coordinator.store.rows_membership import EvaluationRow, PeerRow
from protos.contract.telemetry import CoordinatorState
from protos.muster.v1 import common_pb2

_Point = TypeVar("_Point")


def status(
    tx: Transaction,
    request: StatusRequest,
    /,
    *,
    context: OperationContext,
    now_unix_seconds: float,
) -> StatusResponse:
    """The run now. Raises RefusedError (UNKNOWN_RUN)."""
    run = find_run(tx, request.run_id)
    book = load_book(tx, run.run_id)
    rows = tx.peers(run.run_id)
    members = [member_from_row(row) for row in rows]
    evaluations = _all_evaluations(tx, run)
    num_live_steps, num_rolled_back_steps = tx.num_certificates(run.run_id)
    goodput = _goodput(tx, run, now_unix_seconds=now_unix_seconds)
    train_seconds = _train_seconds(tx, run, now_unix_seconds=now_unix_seconds)
    mean_goodput = book.credited_tokens / train_seconds if train_seconds else 0.0
    checkpoints = proved_checkpoints(tx, context, run.run_id)
    recovering = is_recovering(tx, now_unix_seconds=now_unix_seconds)
    newest = tx.live_certificate(run.run_id, book.certified_outer_step)
    duties = load_duties(tx, run.run_id)
    done = {duty.duty_id for duty in duties if duty.state is DutyState.DONE}
    accepted = tx.acceptor(run.run_id, run.incarnation, book.certified_outer_step + 1)
    return StatusResponse(
        run_id=run.run_id,
        run_digest=run.run_digest,
        dataset_id=run.dataset_id,
        state=run.state,
        state_reason=run.state_reason,
        coordinator_state=CoordinatorState.RECOVERING if recovering else CoordinatorState.SERVING,
        coordinator_state_reason=_recovering_reason(tx, now_unix_seconds) if recovering else "",
        incarnation=run.incarnation,
        directive_number=run.directive_number,
        outer_step=book.certified_outer_step,
        outer_steps_committed=num_live_steps,
        outer_steps_rolled_back=num_rolled_back_steps,
        num_rollbacks=max(0, run.incarnation - 1),
        schedule_tokens=book.schedule_tokens,
        budget_tokens=book.budget_tokens,
        granted_tokens=book.granted_tokens,
        active_tokens=book.active_tokens,
        released_tokens=book.released_tokens,
        expired_tokens=book.expired_tokens,
        credited_tokens=book.credited_tokens,
        uncredited_trained_tokens=book.uncredited_tokens,
        rolled_back_tokens=book.rolled_back_tokens,
        credited_tokens_by_peer={
            total.peer_id: total.credited_tokens for total in tx.peer_totals(run.run_id)
        },
        name_by_peer={row.peer_id: row.name for row in rows},
        num_peers_seen=len(rows),
        num_live_peers=sum(member.is_live for member in members),
        num_voters=sum(member.is_live and member.has_vote for member in members),
        peers_by_state=dict(Counter(row.state for row in rows)),
        leases_by_state=tx.num_leases_by_state(run.run_id, run.incarnation),
        train_loss_nats=0.0 if newest is None else newest.loss_nats,
        first_evaluation=evaluations[0] if evaluations else None,
        last_evaluation=evaluations[-1] if evaluations else None,
        goodput_tokens_per_second=goodput,
        mean_goodput_tokens_per_second=mean_goodput,
        train_seconds=train_seconds,
        eta_seconds=_eta_seconds(run, book, goodput),
        state_digests_equal=not unequal_reason(tx, run.run_id),
        num_attestations=tx.num_attestations(run.run_id),
        num_open_duties=sum(duty.is_pending for duty in duties),
        num_checkpoints=len(checkpoints),
        newest_checkpoint_path=checkpoints[0].path if checkpoints else "",
        create_unix_seconds=run.create_unix_ms / 1000,
        start_unix_seconds=run.start_unix_ms / 1000,
        finish_unix_seconds=run.finish_unix_ms / 1000,
        heartbeat_interval_seconds=context.heartbeat_interval_seconds,
        now_unix_seconds=now_unix_seconds,
        has_final_evaluation=final_duty_id(run.run_id, DutyKind.EVALUATE, run.incarnation) in done,
        has_final_checkpoint=final_duty_id(run.run_id, DutyKind.CHECKPOINT, run.incarnation)
        in done,
        forecast=forecast_status(tx, run, now_unix_seconds=now_unix_seconds),
        equivocation_reason="" if accepted is None else accepted.equivocation_reason,
        reach_warning=reach_warning(rows),
    )


def _recovering_reason(tx: Transaction, now_unix_seconds: float) -> str:
    left_seconds = int(tx.meta(RECOVERING_META) or 0) / 1000 - now_unix_seconds
    return (
        f"started not long ago: for {left_seconds:.0f} s more nothing expires or is granted again"
    )


def _all_evaluations(tx: Transaction, run: RunRow) -> list[EvaluationPoint]:
    """Accepted evaluations in the order of their arrival; those of states rolled back since are
    included.
    """
    rows = sorted(tx.evaluations(run.run_id), key=lambda row: row.receive_unix_ms)
    return [_evaluation_point(row) for row in rows]


def _evaluation_point(row: EvaluationRow) -> EvaluationPoint:
    bits = row.total_nats / math.log(2)
    return EvaluationPoint(
        incarnation=row.incarnation,
        outer_step=row.outer_step,
        schedule_tokens=row.schedule_tokens,
        loss_nats=row.total_nats / row.num_tokens,
        bits_per_byte=bits / row.num_bytes if row.num_bytes else 0.0,
        peer_id=row.peer_id,
        unix_seconds=row.receive_unix_ms / 1000,
    )


def _goodput(tx: Transaction, run: RunRow, *, now_unix_seconds: float) -> float:
    """Credited tokens per second lately; 0 when over."""
    if run.state in FINAL_STATES:
        return 0.0
    return goodput_tokens_per_second(tx, run, now_unix_seconds=now_unix_seconds)


def _train_seconds(tx: Transaction, run: RunRow, *, now_unix_seconds: float) -> float:
    """From the first roster until now, or until the newest certificate of a run that is over or
    complete.
    """
    if not run.start_unix_ms:
        return 0.0
    book = load_book(tx, run.run_id)
    end_unix_seconds = now_unix_seconds
    is_complete = book.credited_tokens >= book.budget_tokens
    newest = tx.live_certificate(run.run_id, book.certified_outer_step)
    if newest is not None and (is_complete or run.state in FINAL_STATES):
        end_unix_seconds = newest.store_unix_ms / 1000
    return max(0.0, end_unix_seconds - run.start_unix_ms / 1000)


def _eta_seconds(run: RunRow, book: BookRow, goodput_tokens_per_second: float) -> float:
    left_tokens = book.budget_tokens - book.credited_tokens
    if left_tokens <= 0 or run.state in FINAL_STATES:
        return 0.0
    return left_tokens / goodput_tokens_per_second if goodput_tokens_per_second else -1.0


def peers(
    tx: Transaction, request: PeersRequest, /, *, context: OperationContext, now_unix_seconds: float
) -> PeersResponse:
    """Members of a run: live ones first, then by name."""
    run = find_run(tx, request.run_id)
    totals = {total.peer_id: total for total in tx.peer_totals(run.run_id)}
    directive = load_directive(tx, context, run.run_id, run.directive_number)
    roster = {} if directive is None else {entry.peer_id: entry for entry in directive.roster}
    num_leases = Counter(lease.peer_id for lease in tx.all_active_leases(run.run_id))
    found = [
        _peer_status(row, totals.get(row.peer_id), roster.get(row.peer_id), num_leases[row.peer_id])
        for row in tx.peers(run.run_id)
    ]
    if request.is_live_only:
        found = [peer for peer in found if peer.is_live]
    found.sort(key=lambda peer: (not peer.is_live, peer.name, peer.peer_id))
    return PeersResponse(run_id=run.run_id, peers=tuple(found))


def _peer_status(
    row: PeerRow,
    total: PeerTotalRow | None,
    entry: common_pb2.RosterEntry | None,
    active_leases: int,
) -> PeerStatus:
    return PeerStatus(
        peer_id=row.peer_id,
        p2p_peer_id=row.p2p_peer_id,
        name=row.name,
        state=row.state,
        state_reason=row.state_reason,
        is_live=member_from_row(row).is_live,
        has_vote=entry is not None and entry.has_vote,
        round_tokens=0 if entry is None else entry.round_tokens,
        claims=claims_from_json(row.claims_json),
        capabilities=capabilities_from_json(row.capabilities_json),
        attested_incarnation=row.attested_incarnation,
        attested_outer_step=row.attested_outer_step,
        credited_tokens=0 if total is None else total.credited_tokens,
        uncredited_tokens=0 if total is None else total.uncredited_tokens,
        rolled_back_tokens=0 if total is None else total.rolled_back_tokens,
        active_leases=active_leases,
        last_heartbeat_unix_seconds=row.last_heartbeat_unix_ms / 1000,
        join_unix_seconds=row.join_unix_ms / 1000,
        first_join_unix_seconds=row.first_join_unix_ms / 1000,
    )


def events(
    tx: Transaction,
    request: EventsRequest,
    /,
    *,
    context: OperationContext,
    now_unix_seconds: float,
) -> EventsResponse:
    """Lines of the event log, oldest first."""
    run = find_run(tx, request.run_id)
    num_events = min(max(request.max_events, 1), 10_000)
    if request.after_event_id < 0:
        rows = tx.newest_events(run.run_id, num_events=num_events)
    else:
        rows = tx.events(run.run_id, after_event_id=request.after_event_id, num_events=num_events)
    found = tuple(
        EventStatus(
            event_id=row.event_id,
            unix_seconds=row.unix_ms / 1000,
            kind=row.kind,
            peer_id=row.peer_id,
            text=row.text,
        )
        for row in rows
    )
    return EventsResponse(run_id=run.run_id, events=found)


def series(
    tx: Transaction,
    request: SeriesRequest,
    /,
    *,
    context: OperationContext,
    now_unix_seconds: float,
) -> SeriesResponse:
    """Curves of the chain in force."""
    run = find_run(tx, request.run_id)
    points = []
    credited_tokens = 0
    for step in tx.steps(run.run_id):
        credited_tokens += step.credited_tokens
        points.append(
            StepPoint(
                incarnation=step.incarnation,
                outer_step=step.outer_step,
                unix_seconds=step.store_unix_ms / 1000,
                schedule_tokens=step.schedule_tokens,
                credited_tokens=credited_tokens,
                step_tokens=step.trained_tokens,
                loss_nats=step.loss_nats,
                num_members=step.num_members,
                num_contributors=step.num_contributors,
                attempt=step.attempt,
            )
        )
    return SeriesResponse(
        run_id=run.run_id,
        steps=tuple(decimate(points, max_points=request.max_points)),
        evaluations=tuple(decimate(_all_evaluations(tx, run), max_points=request.max_points)),
        forecasts=tuple(decimate(all_forecasts(tx, run), max_points=request.max_points)),
    )


def decimate(points: Sequence[_Point], *, max_points: int) -> Sequence[_Point]:
    """At most max_points (2 at least), evenly spaced by index, the first and the last kept."""
    most = max(max_points, 2)
    if len(points) <= most:
        return points
    last = len(points) - 1
    return [points[index * last // (most - 1)] for index in range(most)]
