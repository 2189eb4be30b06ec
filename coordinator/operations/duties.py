"""Results of duties: evaluations and checkpoints, accepted only from the present holder and only
for states that can be right.

An uploaded checkpoint may be newer than its proof: certificate k+1 or a quorum's attestations
arrive a moment after state k does. It is stored when nothing contradicts it, and *used* (served,
rolled back to, counted as the final one) only once its digest is proved
(states.proved_checkpoints).
"""

import json
from collections.abc import Sequence

from google.protobuf.message import DecodeError

from coordinator.domain.duties import (
    STATE_KINDS,
    DutyKind,
    DutyRecord,
    DutyState,
    Report,
    check_holder,
    finish,
    patience_seconds,
    reopen,
)
from coordinator.domain.incarnations import is_on_chain
from coordinator.operations.common import OperationContext, load_run, load_run_data, unix_ms
from coordinator.operations.members import member_from_row, row_from_member
from coordinator.operations.requests import (
    BeginUploadRequest,
    BeginUploadResponse,
    CheckpointInfo,
    DutyOrder,
    EvaluationResult,
    FindCheckpointRequest,
    FindCheckpointResponse,
    FinishUploadRequest,
    FinishUploadResponse,
    ReportDutyRequest,
    ReportDutyResponse,
)
from coordinator.operations.runs import find_run
from coordinator.operations.states import (
    load_segments,
    proved_checkpoints,
    proved_digest,
    take_attestations,
)
from coordinator.operations.trial_report import take_trial
from coordinator.store.base import Transaction
from coordinator.store.rows import RunRow
from coordinator.store.rows_membership import CheckpointRow, DutyRow, EvaluationRow
from protos.contract.certificate import Tag
from protos.contract.channel import transfer_deadline_seconds
from protos.contract.model_shape import ModelShape
from protos.contract.signing import has_valid_signature
from protos.muster.v1 import common_pb2

MAX_LOSS_NATS = 1000.0
"""No decoder is worse than this per token; more is a bug of the evaluator."""
_MAX_UNPROVED_CHECKPOINTS = 2


def duty_from_row(row: DutyRow) -> DutyRecord:
    """A duty as decisions see it."""
    return DutyRecord(
        duty_id=row.duty_id,
        kind=DutyKind(row.kind),
        state=DutyState(row.state),
        fence=row.fence,
        min_outer_step=row.min_outer_step,
        create_unix_seconds=row.create_unix_ms / 1000,
        peer_id=row.peer_id,
        assign_unix_seconds=row.assign_unix_ms / 1000,
        finish_unix_seconds=row.finish_unix_ms / 1000,
        reason=row.reason,
        renew_unix_seconds=row.renew_unix_ms / 1000,
    )


def load_duties(tx: Transaction, run_id: str) -> list[DutyRecord]:
    """Duties of a run, oldest first."""
    return [duty_from_row(row) for row in tx.duties(run_id)]


def load_pending_duties(tx: Transaction, run_id: str) -> list[DutyRecord]:
    """Duties whose result may still come, oldest first."""
    return [duty_from_row(row) for row in tx.pending_duties(run_id)]


def save_duty(tx: Transaction, run_id: str, duty: DutyRecord, *, eval_tokens: int = 0) -> None:
    """Insert or replace a duty; `eval_tokens` counts for new ones only."""
    known = tx.duty(duty.duty_id)
    tx.put_duty(
        DutyRow(
            duty_id=duty.duty_id,
            run_id=run_id,
            kind=duty.kind,
            state=duty.state,
            peer_id=duty.peer_id,
            fence=duty.fence,
            eval_tokens=eval_tokens if known is None else known.eval_tokens,
            min_outer_step=duty.min_outer_step,
            create_unix_ms=unix_ms(duty.create_unix_seconds),
            assign_unix_ms=unix_ms(duty.assign_unix_seconds),
            finish_unix_ms=unix_ms(duty.finish_unix_seconds),
            reason=duty.reason,
            renew_unix_ms=unix_ms(duty.renew_unix_seconds),
        )
    )


def state_patience(
    tx: Transaction, context: OperationContext, run_id: str, duties: Sequence[DutyRecord]
) -> dict[str, float]:
    """Seconds that each assigned evaluation's or checkpoint's holder may take."""
    found = {}
    for duty in duties:
        if duty.state is not DutyState.ASSIGNED or duty.kind not in STATE_KINDS:
            continue
        data = load_run_data(tx, context, run_id)
        shape = ModelShape.from_spec(data.spec.model)
        if duty.kind is DutyKind.CHECKPOINT:
            found[duty.duty_id] = transfer_deadline_seconds(shape.state_bytes)
        else:
            held_tokens = sum(chunk.num_tokens for chunk in data.manifest.heldout_chunks)
            flop = shape.flop_per_token() * (data.spec.data.eval_tokens or held_tokens)
            found[duty.duty_id] = patience_seconds(flop)
    return found


def eval_tokens_of(tx: Transaction, context: OperationContext, run_id: str) -> int:
    """Held-out tokens of an evaluation; 0 = all."""
    return load_run_data(tx, context, run_id).spec.data.eval_tokens


def order_from_duty(tx: Transaction, duty: DutyRecord) -> DutyOrder:
    """A duty as handed to a peer."""
    row, trial = tx.duty(duty.duty_id), tx.trial(duty.duty_id)
    plan = {} if trial is None else json.loads(trial.plan_json)
    return DutyOrder(
        duty_id=duty.duty_id,
        kind=duty.kind,
        fence=duty.fence,
        eval_tokens=0 if row is None else row.eval_tokens,
        min_outer_step=duty.min_outer_step,
        trial_spec=plan.get("spec", "").encode(),
        mark_tokens=tuple(plan.get("mark_tokens", ())),
    )


def release_duties(
    tx: Transaction, run_id: str, peer_id: str, *, reason: str, now_unix_seconds: float
) -> None:
    """Free the duties of a peer that is gone."""
    for duty in load_pending_duties(tx, run_id):
        if duty.state is DutyState.ASSIGNED and duty.peer_id == peer_id:
            save_duty(tx, run_id, reopen(duty, reason, now_unix_seconds))


def report_duty(
    tx: Transaction,
    request: ReportDutyRequest,
    /,
    *,
    context: OperationContext,
    now_unix_seconds: float,
) -> ReportDutyResponse:
    """Take a result, or give the duty to somebody else after a failure. The same report again is
    accepted again.
    """
    run = load_run(tx, request.run_id)
    duty = _duty(tx, request.run_id, request.duty_id)
    if _is_repeated(duty, request.peer_id, request.fence):
        return ReportDutyResponse(is_accepted=True, reason="accepted before")
    verdict = check_holder(duty, peer_id=request.peer_id, fence=request.fence)
    if not verdict.is_accepted or duty is None:
        return ReportDutyResponse(is_accepted=False, reason=verdict.reason)
    if request.failure_reason:
        reason = f"{request.peer_id[:8]} could not: {request.failure_reason}"
        save_duty(tx, run.run_id, reopen(duty, reason, now_unix_seconds))
        _note(tx, run.run_id, request.peer_id, f"{duty.duty_id}: {reason}", now_unix_seconds)
        return ReportDutyResponse(is_accepted=True, reason="noted; somebody else will try")
    if duty.kind is DutyKind.TRIAL and request.trial is not None:
        verdict = take_trial(tx, duty, request.trial, now_unix_seconds=now_unix_seconds)
        after = finish(duty, verdict.reason, now_unix_seconds=now_unix_seconds)
        if not verdict.is_accepted:
            after = reopen(duty, verdict.reason, now_unix_seconds)
        save_duty(tx, run.run_id, after)
        _note(
            tx, run.run_id, request.peer_id, f"{duty.duty_id}: {verdict.reason}", now_unix_seconds
        )
        return ReportDutyResponse(is_accepted=verdict.is_accepted, reason=verdict.reason)
    if duty.kind is not DutyKind.EVALUATE or request.evaluation is None:
        reason = f"a duty of kind {duty.kind} is not done by this report"
        return ReportDutyResponse(is_accepted=False, reason=reason)
    evaluation = request.evaluation
    verdict = _check_evaluation(tx, context, run, duty, evaluation)
    if not verdict.is_accepted:
        save_duty(tx, run.run_id, reopen(duty, verdict.reason, now_unix_seconds))
        _note(
            tx, run.run_id, request.peer_id, f"{duty.duty_id}: {verdict.reason}", now_unix_seconds
        )
        return ReportDutyResponse(is_accepted=False, reason=verdict.reason)
    _store_evaluation(tx, run, duty, evaluation, now_unix_seconds=now_unix_seconds)
    return ReportDutyResponse(is_accepted=True, reason="accepted")


def _check_evaluation(
    tx: Transaction,
    context: OperationContext,
    run: RunRow,
    duty: DutyRecord,
    evaluation: EvaluationResult,
) -> Report:
    """The numbers are possible and the state is a right one, as far as is known."""
    is_possible = (
        evaluation.num_tokens > 0
        and 0 <= evaluation.total_nats <= MAX_LOSS_NATS * evaluation.num_tokens
        and evaluation.num_bytes >= 0
    )
    if not is_possible:
        reason = f"{evaluation.total_nats} nats over {evaluation.num_tokens} tokens is not possible"
        return Report(is_accepted=False, reason=reason)
    return _check_state(
        tx,
        context,
        run,
        duty,
        incarnation=evaluation.incarnation,
        outer_step=evaluation.outer_step,
        state_digest=evaluation.state_digest,
    )


def _check_state(
    tx: Transaction,
    context: OperationContext,
    run: RunRow,
    duty: DutyRecord,
    *,
    incarnation: int,
    outer_step: int,
    state_digest: bytes,
) -> Report:
    """The state serves the duty, is on the chain, and no proof contradicts its digest."""
    if outer_step < duty.min_outer_step:
        reason = (
            f"the state is of outer step {outer_step}; at least {duty.min_outer_step} is asked for"
        )
        return Report(is_accepted=False, reason=reason)
    if not is_on_chain(
        load_segments(tx, run.run_id), incarnation=incarnation, outer_step=outer_step
    ):
        reason = (
            f"outer step {outer_step} of incarnation {incarnation} is not on the chain in force"
        )
        return Report(is_accepted=False, reason=reason)
    proved = proved_digest(tx, context, run.run_id, incarnation=incarnation, outer_step=outer_step)
    if proved is not None and proved != state_digest:
        reason = (
            f"the state's digest {state_digest.hex()[:12]} is not the proved {proved.hex()[:12]}"
            f" of outer step {outer_step}"
        )
        return Report(is_accepted=False, reason=reason)
    return Report(is_accepted=True, reason="accepted")


def _store_evaluation(
    tx: Transaction,
    run: RunRow,
    duty: DutyRecord,
    evaluation: EvaluationResult,
    *,
    now_unix_seconds: float,
) -> None:
    loss_nats = evaluation.total_nats / evaluation.num_tokens
    tx.put_evaluation(
        EvaluationRow(
            run_id=run.run_id,
            incarnation=evaluation.incarnation,
            outer_step=evaluation.outer_step,
            duty_id=duty.duty_id,
            peer_id=duty.peer_id,
            state_digest=evaluation.state_digest,
            total_nats=evaluation.total_nats,
            num_tokens=evaluation.num_tokens,
            num_bytes=evaluation.num_bytes,
            schedule_tokens=evaluation.schedule_tokens,
            receive_unix_ms=unix_ms(now_unix_seconds),
        )
    )
    text = f"held-out loss {loss_nats:.4f} nats at outer step {evaluation.outer_step}"
    save_duty(tx, run.run_id, finish(duty, text, now_unix_seconds=now_unix_seconds))
    _note(tx, run.run_id, duty.peer_id, text, now_unix_seconds)


def begin_upload(
    tx: Transaction,
    request: BeginUploadRequest,
    /,
    *,
    context: OperationContext,
    now_unix_seconds: float,
) -> BeginUploadResponse:
    """Whether the announced state may be uploaded, where to, and which digest it must have."""
    run = load_run(tx, request.run_id)
    duty = _duty(tx, request.run_id, request.duty_id)
    verdict = check_holder(duty, peer_id=request.peer_id, fence=request.fence)
    row = tx.peer(request.run_id, request.peer_id)
    if not verdict.is_accepted or duty is None or row is None:
        return BeginUploadResponse(is_accepted=False, reason=verdict.reason)
    if duty.kind is not DutyKind.CHECKPOINT or request.total_bytes <= 0:
        reason = f"a duty of kind {duty.kind} takes no upload of {request.total_bytes} bytes"
        return BeginUploadResponse(is_accepted=False, reason=reason)
    attestation, reason = _own_attestation(request, row.public_key)
    if attestation is None:
        return BeginUploadResponse(is_accepted=False, reason=reason)
    member = take_attestations(
        tx,
        context,
        run,
        member_from_row(row),
        row.public_key,
        (request.attestation,),
        now_unix_seconds=now_unix_seconds,
    )
    tx.put_peer(row_from_member(row, member))
    verdict = _check_state(
        tx,
        context,
        run,
        duty,
        incarnation=attestation.incarnation,
        outer_step=attestation.outer_step,
        state_digest=attestation.state_digest,
    )
    if not verdict.is_accepted:
        return BeginUploadResponse(is_accepted=False, reason=verdict.reason)
    return BeginUploadResponse(
        is_accepted=True,
        reason="accepted",
        path=_checkpoint_path(run.run_id, attestation.incarnation, attestation.outer_step),
        incarnation=attestation.incarnation,
        outer_step=attestation.outer_step,
        state_digest=attestation.state_digest,
    )


def _own_attestation(
    request: BeginUploadRequest, public_key: bytes
) -> tuple[common_pb2.Attestation | None, str]:
    """The attestation if the uploader signed it for this run, else why not."""
    signed = request.attestation
    try:
        attestation = common_pb2.Attestation.FromString(signed.payload)
    except DecodeError:
        return None, "the attestation does not parse"
    if (attestation.run_id, attestation.peer_id) != (request.run_id, request.peer_id):
        return None, f"the attestation is {attestation.peer_id!r}'s for run {attestation.run_id!r}"
    if not has_valid_signature(public_key, Tag.ATTESTATION, signed.payload, signed.signature):
        return None, "the attestation's signature is not valid"
    return attestation, ""


def _checkpoint_path(run_id: str, incarnation: int, outer_step: int) -> str:
    return f"checkpoints/{run_id}/{incarnation}-{outer_step}.safetensors"


def finish_upload(
    tx: Transaction,
    request: FinishUploadRequest,
    /,
    *,
    context: OperationContext,
    now_unix_seconds: float,
) -> FinishUploadResponse:
    """Book a received and verified file; names files that are superseded. A stale fence removes the
    upload itself.
    """
    run = load_run(tx, request.run_id)
    duty = _duty(tx, request.run_id, request.duty_id)
    if _is_repeated(duty, request.peer_id, request.fence):
        return FinishUploadResponse(is_accepted=True, reason="accepted before")
    verdict = check_holder(duty, peer_id=request.peer_id, fence=request.fence)
    if verdict.is_accepted and duty is not None:
        verdict = _check_state(
            tx,
            context,
            run,
            duty,
            incarnation=request.incarnation,
            outer_step=request.outer_step,
            state_digest=request.state_digest,
        )
    stored = {row.path for row in tx.checkpoints(run.run_id)}
    if not verdict.is_accepted or duty is None:
        remove = () if request.path in stored else (request.path,)
        return FinishUploadResponse(is_accepted=False, reason=verdict.reason, remove_paths=remove)
    tx.put_checkpoint(
        CheckpointRow(
            run_id=run.run_id,
            incarnation=request.incarnation,
            outer_step=request.outer_step,
            state_digest=request.state_digest,
            path=request.path,
            total_bytes=request.total_bytes,
            peer_id=request.peer_id,
            store_unix_ms=unix_ms(now_unix_seconds),
        )
    )
    text = f"checkpoint of outer step {request.outer_step} stored, {request.total_bytes} bytes"
    save_duty(tx, run.run_id, finish(duty, text, now_unix_seconds=now_unix_seconds))
    _note(tx, run.run_id, request.peer_id, text, now_unix_seconds)
    return FinishUploadResponse(
        is_accepted=True, reason="accepted", remove_paths=_rotate(tx, context, run)
    )


def _rotate(tx: Transaction, context: OperationContext, run: RunRow) -> tuple[str, ...]:
    """Forget all checkpoints but the newest proved ones and the newest that may yet be proved;
    returns their paths.
    """
    proved = proved_checkpoints(tx, context, run.run_id)
    kept = proved[: context.policy.num_kept_checkpoints]
    segments = load_segments(tx, run.run_id)
    unproved = [
        row
        for row in tx.checkpoints(run.run_id)
        if row not in proved
        and is_on_chain(segments, incarnation=row.incarnation, outer_step=row.outer_step)
    ]
    kept += unproved[:_MAX_UNPROVED_CHECKPOINTS]
    removed = [row for row in tx.checkpoints(run.run_id) if row not in kept]
    for row in removed:
        tx.delete_checkpoint(run.run_id, row.incarnation, row.outer_step)
    return tuple(row.path for row in removed)


def find_checkpoint(
    tx: Transaction,
    request: FindCheckpointRequest,
    /,
    *,
    context: OperationContext,
    now_unix_seconds: float,
) -> FindCheckpointResponse:
    """The newest proved checkpoint of the chain in force, not above max_outer_step."""
    run = find_run(tx, request.run_id)
    for row in proved_checkpoints(tx, context, run.run_id):
        if request.max_outer_step and row.outer_step > request.max_outer_step:
            continue
        info = CheckpointInfo(
            incarnation=row.incarnation,
            outer_step=row.outer_step,
            state_digest=row.state_digest,
            path=row.path,
            total_bytes=row.total_bytes,
            peer_id=row.peer_id,
            store_unix_seconds=row.store_unix_ms / 1000,
        )
        return FindCheckpointResponse(checkpoint=info, reason="newest proved checkpoint")
    num_stored = len(tx.checkpoints(run.run_id))
    reason = f"none of {num_stored} stored checkpoints is proved and on the chain in force"
    return FindCheckpointResponse(checkpoint=None, reason=reason)


def _duty(tx: Transaction, run_id: str, duty_id: str) -> DutyRecord | None:
    row = tx.duty(duty_id)
    return None if row is None or row.run_id != run_id else duty_from_row(row)


def _is_repeated(duty: DutyRecord | None, peer_id: str, fence: int) -> bool:
    """True if this very hand-out was finished by this peer: its reply was lost."""
    return (
        duty is not None
        and duty.state is DutyState.DONE
        and (duty.peer_id, duty.fence) == (peer_id, fence)
    )


def _note(tx: Transaction, run_id: str, peer_id: str, text: str, now_unix_seconds: float) -> None:
    tx.insert_event(
        run_id=run_id, unix_ms=unix_ms(now_unix_seconds), kind="duty", peer_id=peer_id, text=text
    )
