"""What the operator does to runs: create, list, pause, resume, stop, evict."""

import json
from dataclasses import replace

from coordinator.domain.budget import plan_run_budget
from coordinator.domain.directives import DirectiveContent, cooldown_start
from coordinator.domain.run_state import FINAL_STATES
from coordinator.operations.common import OperationContext, unix_ms
from coordinator.operations.epochs import set_pause, store_first_directive, store_record
from coordinator.operations.leases import open_book
from coordinator.operations.membership import end_membership
from coordinator.operations.requests_admin import (
    CreateRunRequest,
    CreateRunResponse,
    EvictPeerRequest,
    EvictPeerResponse,
    ListRunsRequest,
    ListRunsResponse,
    RunRequest,
    RunSummary,
)
from coordinator.operations.runs import find_run, find_run_to_change, summarise_run
from coordinator.operations.study_stages import end_studies
from coordinator.store.base import Transaction
from coordinator.store.rows import RunRow
from protos.contract.answer_records import check_objective
from protos.contract.chunk_format import Manifest
from protos.contract.digest import canonical_json
from protos.contract.errors import ErrorCode, RefusedError, UsageError
from protos.contract.ids import is_valid_run_id
from protos.contract.initial_file import initial_path, read_initial_header
from protos.contract.run_spec import RunSpec
from protos.contract.schedule_order import ScheduleOrder
from protos.contract.telemetry import PeerState, RunState
from protos.contract.text import counted
from protos.muster.v1 import common_pb2

_PREFIX_BYTES = 16


def create_run(
    tx: Transaction,
    request: CreateRunRequest,
    /,
    *,
    context: OperationContext,
    now_unix_seconds: float,
) -> CreateRunResponse:
    """Make a run with its ledger, incarnation 0 and directive 1. Raises UsageError; nothing is left
    of a refused one.
    """
    spec, order, reason = _planned_spec(request)
    run_id = request.run_id or f"run-{spec.run_digest[:8]}"
    _check_new_run(tx, request, run_id)
    _check_initial(context, spec)
    run = RunRow(
        run_id=run_id,
        run_digest=spec.run_digest,
        spec=spec.to_wire(),
        dataset_id=spec.data.dataset_id,
        dataset_dir=request.dataset_dir,
        dht_prefix=f"muster-{context.random_bytes(_PREFIX_BYTES).hex()}",
        state=RunState.WAITING_FOR_PEERS,
        state_reason=f"waits for {counted(request.min_peers, 'peer')}",
        min_peers=request.min_peers,
        incarnation=0,
        directive_number=1,
        create_unix_ms=unix_ms(now_unix_seconds),
        start_unix_ms=0,
        finish_unix_ms=0,
    )
    tx.insert_run(run)
    open_book(
        tx,
        run_id=run_id,
        seq_len=spec.model.seq_len,
        budget_tokens=spec.budget_tokens,
        now_unix_seconds=now_unix_seconds,
    )
    _store_incarnation_zero(tx, context, run, spec, now_unix_seconds=now_unix_seconds)
    return CreateRunResponse(
        run_id=run_id,
        run_digest=spec.run_digest,
        budget_tokens=spec.budget_tokens,
        reason=reason,
    )


def _planned_spec(request: CreateRunRequest) -> tuple[RunSpec, ScheduleOrder, str]:
    """The spec with its budget in whole windows, the data order, and how the budget was rounded."""
    manifest = Manifest.from_bytes(request.manifest)
    plain = _json_object(request.spec)
    wanted_tokens = plain.get("budget_tokens")
    model = plain.get("model")
    seq_len = model.get("seq_len") if isinstance(model, dict) else None
    if type(wanted_tokens) is int and type(seq_len) is int and wanted_tokens >= seq_len > 0:
        plain["budget_tokens"] = wanted_tokens // seq_len * seq_len
    spec = RunSpec.from_wire(canonical_json(plain))
    if spec.data.dataset_id != manifest.dataset_id:
        raise UsageError(
            f"the spec names dataset {spec.data.dataset_id[:12]}, {request.dataset_dir} holds "
            f"{manifest.dataset_id[:12]}",
            allowed="the dataset that the spec names",
            remedy="correct data.dataset_id or --corpus",
            code=ErrorCode.DIGEST_MISMATCH,
        )
    check_objective(manifest, objective=spec.objective.name, seq_len=spec.model.seq_len)
    if spec.objective.has_document_mask and manifest.eos_token_id != 0:
        raise UsageError(
            f"objective.has_document_mask over a dataset that ends documents with token "
            f"{manifest.eos_token_id}",
            allowed="datasets whose own tokenizer ends documents with token 0",
            remedy="set objective.has_document_mask=false",
        )
    extra_tokens = spec.objective.num_extra_tokens(spec.model.seq_len)
    if spec.model.vocab_size < manifest.vocab_size + extra_tokens:
        raise UsageError(
            f"model.vocab_size = {spec.model.vocab_size}",
            allowed=f"at least the tokenizer's {manifest.vocab_size} and the {extra_tokens} "
            f"of the objective {spec.objective.name}",
            remedy="raise model.vocab_size",
        )
    order = ScheduleOrder(spec.seed, manifest, spec.model.seq_len)
    pass_windows = sum(order.num_windows(i) for i in range(len(manifest.training_chunks)))
    budget = plan_run_budget(
        wanted_tokens if type(wanted_tokens) is int else spec.budget_tokens,
        seq_len=spec.model.seq_len,
        pass_tokens=pass_windows * spec.model.seq_len,
        max_tokens=order.tokens_within_passes(spec.data.max_data_passes),
        max_data_passes=spec.data.max_data_passes,
    )
    if not budget.budget_tokens:
        raise UsageError(
            f"budget: {budget.reason}",
            allowed="budgets within max_data_passes over the corpus",
            remedy="lower budget_tokens, add text to the corpus, or raise data.max_data_passes",
        )
    return spec, order, budget.reason


def _check_initial(context: OperationContext, spec: RunSpec) -> None:
    """Raise UsageError for an imported model that is not there or of another shape."""
    if not spec.initial_digest:
        return
    path = context.data_dir / initial_path(spec.initial_digest)
    if not path.is_file():
        raise UsageError(
            f"initial_digest {spec.initial_digest[:16]}... is not in the data directory",
            allowed="the digest of a model that was imported for a run",
            remedy="name the file with --init",
        )
    read_initial_header(path).require_model(spec.model)


def _json_object(data: bytes) -> dict[str, object]:
    try:
        plain = json.loads(data)
    except ValueError as error:
        raise UsageError(
            f"run spec is not JSON ({error})",
            allowed="what RunSpec.to_wire writes",
            remedy="use this version's client",
        ) from error
    if not isinstance(plain, dict):
        raise UsageError(
            f"run spec is {type(plain).__name__}", allowed="a table of keys", remedy="correct it"
        )
    return plain


def _check_new_run(tx: Transaction, request: CreateRunRequest, run_id: str) -> None:
    if not is_valid_run_id(run_id):
        raise UsageError(
            f"run id {run_id!r}",
            allowed="1 to 32 lower-case letters, digits and hyphens, no hyphen first",
            remedy="choose another id",
        )
    if tx.run(run_id) is not None:
        raise UsageError(
            f"run {run_id!r} exists already",
            allowed="a new id",
            remedy="choose another id, or go on with that run",
            code=ErrorCode.ALREADY_EXISTS,
        )
    if request.min_peers < 1:
        raise UsageError(
            f"min_peers = {request.min_peers}", allowed="at least 1", remedy="correct --min-peers"
        )


def _store_incarnation_zero(
    tx: Transaction,
    context: OperationContext,
    run: RunRow,
    spec: RunSpec,
    *,
    now_unix_seconds: float,
) -> None:
    """Record 0 and directive 1: an empty roster; peers may build and attest the initial state,
    nothing else.
    """
    content = DirectiveContent(
        roster=(),
        budget_tokens=spec.budget_tokens,
        cooldown_start_tokens=cooldown_start(
            spec.budget_tokens, cooldown_ratio=spec.schedule.cooldown_ratio
        ),
        is_paused=False,
    )
    reason = f"run created; waits for {counted(run.min_peers, 'peer')} to attest the initial state"
    signed = store_first_directive(
        tx, context, run, content, reason=reason, now_unix_seconds=now_unix_seconds
    )
    record = common_pb2.IncarnationRecord(
        run_id=run.run_id, incarnation=0, directive=signed, reason=reason
    )
    store_record(tx, context, record, now_unix_seconds=now_unix_seconds)


def list_runs(
    tx: Transaction,
    request: ListRunsRequest,
    /,
    *,
    context: OperationContext,
    now_unix_seconds: float,
) -> ListRunsResponse:
    """All runs, newest first."""
    return ListRunsResponse(runs=tuple(summarise_run(tx, run) for run in reversed(tx.runs())))


def pause_run(
    tx: Transaction, request: RunRequest, /, *, context: OperationContext, now_unix_seconds: float
) -> RunSummary:
    """No round is formed once the directive that says so is in force; leases stay valid as long as
    they are renewed.
    """
    run = _active_run(tx, request.run_id)
    reason = f"paused: {request.reason}"
    set_pause(tx, run.run_id, reason)
    return _set_state(tx, run, RunState.PAUSED, reason, now_unix_seconds=now_unix_seconds)


def resume_run(
    tx: Transaction, request: RunRequest, /, *, context: OperationContext, now_unix_seconds: float
) -> RunSummary:
    """Go on after a pause; the next tick finds the state that the run is really in."""
    run = _active_run(tx, request.run_id)
    set_pause(tx, run.run_id, "")
    if run.state != RunState.PAUSED:
        return summarise_run(tx, run)
    state = RunState.RUNNING if run.incarnation else RunState.WAITING_FOR_PEERS
    reason = f"resumed: {request.reason}"
    return _set_state(tx, run, state, reason, now_unix_seconds=now_unix_seconds)


def stop_run(
    tx: Transaction, request: RunRequest, /, *, context: OperationContext, now_unix_seconds: float
) -> RunSummary:
    """End a run for good; peers learn it with their next heartbeat and leave."""
    run = find_run_to_change(tx, request.run_id)
    if run.state in FINAL_STATES:
        return summarise_run(tx, run)
    run = replace(run, finish_unix_ms=unix_ms(now_unix_seconds))
    reason = f"stopped: {request.reason}"
    summary = _set_state(tx, run, RunState.STOPPED, reason, now_unix_seconds=now_unix_seconds)
    end_studies(tx, find_run(tx, run.run_id), now_unix_seconds=now_unix_seconds)
    return summary


def _active_run(tx: Transaction, run_id: str) -> RunRow:
    run = find_run_to_change(tx, run_id)
    if run.state in FINAL_STATES:
        raise RefusedError(
            f"run {run.run_id!r} is {run.state}: {run.state_reason}",
            allowed="runs that are not over",
            remedy="create a new run",
            code=ErrorCode.RUN_NOT_ACTIVE,
        )
    return run


def _set_state(
    tx: Transaction, run: RunRow, state: RunState, reason: str, *, now_unix_seconds: float
) -> RunSummary:
    run = replace(run, state=state, state_reason=reason)
    tx.update_run(run)
    tx.insert_event(
        run_id=run.run_id,
        unix_ms=unix_ms(now_unix_seconds),
        kind="run",
        peer_id="",
        text=f"{state}: {reason}",
    )
    return summarise_run(tx, run)


def evict_peer(
    tx: Transaction,
    request: EvictPeerRequest,
    /,
    *,
    context: OperationContext,
    now_unix_seconds: float,
) -> EvictPeerResponse:
    """End a membership for good. Raises UsageError unless exactly one peer fits by name or by the
    beginning of its id: a name that looks like another's id fits both.
    """
    run = find_run_to_change(tx, request.run_id)
    wanted = request.peer_id
    found = [
        row
        for row in tx.peers(run.run_id)
        if row.peer_id.startswith(wanted) or (row.name == wanted and row.name)
    ]
    if len(found) != 1 or not wanted:
        which = ", ".join(f"{row.peer_id[:12]} ({row.name})" for row in found[:8])
        raise UsageError(
            f"{len(found)} peers of run {run.run_id!r} have the name {wanted!r} or an id that "
            f"begins so" + (f": {which}" if which and wanted else ""),
            allowed="one peer's name, or the beginning of exactly one peer's id",
            remedy="see `muster-coordinator peers`",
        )
    if found[0].state == PeerState.EVICTED:
        return EvictPeerResponse(peer_id=found[0].peer_id, num_released_leases=0)
    ended = end_membership(
        tx,
        context,
        run.run_id,
        found[0].peer_id,
        state=PeerState.EVICTED,
        reason=request.reason,
        now_unix_seconds=now_unix_seconds,
    )
    return EvictPeerResponse(
        peer_id=found[0].peer_id, num_released_leases=ended.num_released_leases
    )
