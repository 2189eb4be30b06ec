"""Studies over the store: made, handed out trial by trial, advanced from stage to stage, shown.

A trial is a duty of the run that the study is attached to: fenced, handed on when its holder is
gone, counted once. Trials are handed out while that run is not training (paused, or waiting for
peers): a trial beside training would slow both and measure neither.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import replace

from coordinator.domain.duties import (
    DutyKind,
    DutyRecord,
    DutyState,
    hand_out,
    patience_seconds,
)
from coordinator.domain.run_state import FINAL_STATES
from coordinator.operations.common import OperationContext, load_run_data, unix_ms
from coordinator.operations.duties import load_duties
from coordinator.operations.members import member_from_row, speed_from_row
from coordinator.operations.requests_studies import (
    CreateStudyRequest,
    CreateStudyResponse,
    RunStudiesRequest,
    RunStudiesResponse,
    StudyRequest,
    StudyStatus,
    TrialStatus,
)
from coordinator.operations.runs import find_run
from coordinator.operations.study_results import divergence_of, observations_of
from coordinator.operations.study_stages import note, open_trials
from coordinator.scaling.observations import Observations
from coordinator.store.base import Transaction
from coordinator.store.rows import RunRow
from coordinator.store.rows_membership import PeerRow
from coordinator.store.rows_studies import StudyRow, TrialRow
from coordinator.study.design import (
    OpenTrial,
    StudyDesign,
    choose_trial,
    first_stage,
    uneven_reason,
)
from protos.contract.errors import ErrorCode, RefusedError, UsageError
from protos.contract.ids import is_valid_run_id
from protos.contract.model_shape import ModelShape
from protos.contract.run_spec import RunSpec
from protos.contract.telemetry import RunState

_HANDING_STATES = frozenset({RunState.PAUSED.value, RunState.WAITING_FOR_PEERS.value})
_PATIENCE_FACTOR = 10.0
_HELDOUT_TOKENS = 32_768
"""Of each evaluation, unless asked otherwise."""


def create_study(
    tx: Transaction,
    request: CreateStudyRequest,
    /,
    *,
    context: OperationContext,
    now_unix_seconds: float,
) -> CreateStudyResponse:
    """Design a sweep on a run's dataset and open its first trials. Raises UsageError."""
    run = find_run(tx, request.run_id)
    if run.state in FINAL_STATES:
        raise RefusedError(
            f"run {run.run_id!r} is {run.state}: its peers have left",
            allowed="runs that are not over; their peers do the trials",
            remedy="create a run, pause it, and attach the study to it",
            code=ErrorCode.RUN_NOT_ACTIVE,
        )
    manifest = load_run_data(tx, context, run.run_id).manifest
    if manifest.answer_seq_len:
        raise UsageError(
            f"run {run.run_id!r} has a dataset of prompts and answers",
            allowed="datasets of running text: the laws that trials serve are of the next token",
            remedy="attach the study to a run over text",
        )
    held_tokens = sum(chunk.num_tokens for chunk in manifest.heldout_chunks)
    heldout_tokens = request.heldout_tokens or min(_HELDOUT_TOKENS, held_tokens)
    design = StudyDesign(
        dataset_id=run.dataset_id,
        vocab_size=manifest.vocab_size,
        **{
            name: getattr(request, name)
            for name in (
                "num_sizes", "min_params", "max_params", "flop", "max_tokens", "learning_rates",
                "num_repeats", "seq_len", "batch_tokens", "warmup_steps", "seed",
            )
        },
        heldout_tokens=heldout_tokens,
    )  # fmt: skip
    if design.heldout_tokens > held_tokens:
        raise UsageError(
            f"--heldout-tokens {design.heldout_tokens:,}",
            allowed=f"1 to {held_tokens:,}: what the dataset of run {run.run_id!r} holds out",
            remedy="choose fewer, or build a dataset with more held-out text",
        )
    stage, plans = first_stage(design)
    study_id = request.study_id or f"study-{len(tx.studies()) + 1}"
    _check_new(tx, study_id)
    reason = f"{len(plans)} trials of {sum(plan.flop for plan in plans):.3g} FLOP in all"
    uneven = uneven_reason(design, plans)
    if uneven:
        reason += f"; {uneven}"
    study = StudyRow(
        study_id=study_id,
        run_id=run.run_id,
        design_json=design.to_json(),
        stage=stage,
        stage_reason=reason,
        create_unix_ms=unix_ms(now_unix_seconds),
        finish_unix_ms=0,
    )
    tx.put_study(study)
    open_trials(tx, study, plans, now_unix_seconds=now_unix_seconds)
    note(tx, study, f"study {study_id} created: {reason}", now_unix_seconds)
    return CreateStudyResponse(
        study_id=study_id,
        run_id=run.run_id,
        num_trials=len(plans),
        reason=reason,
        waiting_reason=_why_trials_wait(tx, run),
    )


def _check_new(tx: Transaction, study_id: str) -> None:
    if not is_valid_run_id(study_id):
        raise UsageError(
            f"study id {study_id!r}",
            allowed="1 to 32 lower-case letters, digits and hyphens, no hyphen first",
            remedy="choose another id",
        )
    if tx.study(study_id) is not None:
        raise UsageError(
            f"study {study_id!r} exists already",
            allowed="a new id",
            remedy="choose another --study",
            code=ErrorCode.ALREADY_EXISTS,
        )


def assign_trial(
    tx: Transaction,
    run: RunRow,
    row: PeerRow,
    duties: Sequence[DutyRecord],
    *,
    now_unix_seconds: float,
) -> DutyRecord | None:
    """A trial for a live peer that holds no duty, while the run is not training."""
    open_duties = {
        duty.duty_id: duty
        for duty in duties
        if duty.kind is DutyKind.TRIAL and duty.state is DutyState.OPEN
    }
    if not open_duties or run.state not in _HANDING_STATES:
        return None
    found = [trial for duty_id in open_duties if (trial := tx.trial(duty_id)) is not None]
    candidates = [_open_trial(tx, trial) for trial in found]
    choice, why = choose_trial(
        [one for one in candidates if one is not None], row.peer_id, _speeds(tx, run)
    )
    if choice is None:
        return None
    duty = hand_out(open_duties[choice.trial_id], row.peer_id, now_unix_seconds=now_unix_seconds)
    return replace(duty, reason=why)


def _open_trial(tx: Transaction, trial: TrialRow) -> OpenTrial | None:
    """As the choice sees it; None for a repeat whose original is not over."""
    avoided = ""
    number = int(json.loads(trial.plan_json)["original_number"])
    if number >= 0:
        original = tx.trials(trial.study_id)[number]
        duty = tx.duty(original.trial_id)
        if duty is not None and duty.state in (DutyState.OPEN, DutyState.ASSIGNED):
            return None
        avoided = original.peer_id
    return OpenTrial(
        trial_id=trial.trial_id,
        params_n=trial.params_n,
        flop=trial.flop,
        avoided_peer_id=avoided,
    )


def _speeds(tx: Transaction, run: RunRow) -> dict[str, float]:
    """FLOP/s of every live peer: measured in its newest trial, else in training; 0 if unknown."""
    flop_per_token = ModelShape.from_spec(RunSpec.from_wire(run.spec).model).flop_per_token()
    speeds = {
        row.peer_id: speed_from_row(row) * flop_per_token
        for row in tx.peers(run.run_id)
        if member_from_row(row).is_live
    }
    done = [
        trial for study in tx.studies() for trial in tx.trials(study.study_id) if _is_usable(trial)
    ]
    for trial in sorted(done, key=lambda trial: trial.finish_unix_ms):
        seconds = json.loads(trial.result_json)["train_seconds"]
        if trial.peer_id in speeds and seconds > 0:
            speeds[trial.peer_id] = trial.flop / seconds
    return speeds


def trial_patience(tx: Transaction, duties: Sequence[DutyRecord]) -> dict[str, float]:
    """Seconds that each assigned trial's holder may take: ten times what its work should."""
    patience = {}
    for duty in duties:
        if duty.kind is DutyKind.TRIAL and duty.state is DutyState.ASSIGNED:
            trial = tx.trial(duty.duty_id)
            flop = 0.0 if trial is None else trial.flop
            patience[duty.duty_id] = patience_seconds(_PATIENCE_FACTOR * flop)
    return patience


def find_study(tx: Transaction, study_id: str) -> StudyRow:
    """A study; "" means the newest. Raises UsageError."""
    studies = tx.studies()
    if not studies:
        raise UsageError(
            "there is no study yet",
            allowed="studies that were created here",
            remedy="create one with `muster-coordinator study create`",
        )
    found = tx.study(study_id) if study_id else studies[-1]
    if found is None:
        raise UsageError(
            f"study {study_id!r} is not known here",
            allowed=f"one of: {', '.join(study.study_id for study in studies)}",
            remedy="name one of them; `muster-coordinator study status` without --study shows the "
            "newest",
        )
    return found


def study_status(
    tx: Transaction,
    request: StudyRequest,
    /,
    *,
    context: OperationContext,
    now_unix_seconds: float,
) -> StudyStatus:
    """A study with its trials. Raises UsageError. Only reads."""
    study = find_study(tx, request.study_id)
    run = find_run(tx, study.run_id)
    duties = {duty.duty_id: duty for duty in load_duties(tx, run.run_id)}
    names = {row.peer_id: row.name for row in tx.peers(run.run_id)}
    trials = tuple(
        _trial_status(trial, duties.get(trial.trial_id), names)
        for trial in tx.trials(study.study_id)
    )
    is_open = any(trial.state == DutyState.OPEN for trial in trials)
    return StudyStatus(
        study_id=study.study_id,
        run_id=study.run_id,
        dataset_id=run.dataset_id,
        stage=study.stage,
        stage_reason=study.stage_reason,
        waiting_reason=_why_trials_wait(tx, run) if is_open else "",
        num_trials=len(trials),
        num_done=sum(trial.state == DutyState.DONE for trial in trials),
        num_diverged=sum(bool(trial.divergence) for trial in trials),
        trials=trials,
        seed_noise_ratio=seed_noise(tx.trials(study.study_id)),
        create_unix_seconds=study.create_unix_ms / 1000,
        finish_unix_seconds=study.finish_unix_ms / 1000,
    )


def run_studies(
    tx: Transaction,
    request: RunStudiesRequest,
    /,
    *,
    context: OperationContext,
    now_unix_seconds: float,
) -> RunStudiesResponse:
    """The newest studies of a run, each with its trials. Only reads."""
    own = [study for study in tx.studies() if study.run_id == request.run_id]
    newest = own[::-1][: request.max_studies]
    return RunStudiesResponse(
        studies=tuple(
            study_status(
                tx,
                StudyRequest(study_id=study.study_id),
                context=context,
                now_unix_seconds=now_unix_seconds,
            )
            for study in newest
        )
    )


def _why_trials_wait(tx: Transaction, run: RunRow) -> str:
    """Why open trials are not handed out; "" if they are."""
    if run.state not in _HANDING_STATES:
        return f"open trials wait: run {run.run_id} is {run.state}; pause it to hand them out"
    if not any(member_from_row(row).is_live for row in tx.peers(run.run_id)):
        return f"open trials wait: no live peer has joined run {run.run_id}"
    return ""


def study_observations(
    tx: Transaction,
    request: StudyRequest,
    /,
    *,
    context: OperationContext,
    now_unix_seconds: float,
) -> Observations:
    """Every point of a study's finished size trials. Raises UsageError while there is none."""
    study = find_study(tx, request.study_id)
    rows = observations_of(tx.trials(study.study_id), source=study.study_id)
    if not rows:
        raise UsageError(
            f"study {study.study_id!r} has no result of a size yet; it is {study.stage}: "
            f"{study.stage_reason}",
            allowed="studies with finished size trials",
            remedy=f"wait; `muster-coordinator study status --study {study.study_id}` shows why",
        )
    return Observations.of(rows)


def _trial_status(trial: TrialRow, duty: DutyRecord | None, names: dict[str, str]) -> TrialStatus:
    plan = json.loads(trial.plan_json)
    spec = json.loads(plan["spec"])
    result = json.loads(trial.result_json) if trial.result_json else None
    measured = result if _is_usable(trial) else None
    peer_id = trial.peer_id or ("" if duty is None else duty.peer_id)
    return TrialStatus(
        trial_number=trial.trial_number,
        purpose=trial.purpose,
        state="" if duty is None else duty.state,
        reason="" if duty is None else duty.reason,
        num_handouts=0 if duty is None else duty.fence,
        params_n=trial.params_n,
        tokens=plan["mark_tokens"][-1],
        flop=trial.flop,
        learning_rate=spec["optimizer"]["peak_lr"],
        seed=spec["seed"],
        peer_id=peer_id,
        peer_name=names.get(peer_id, ""),
        loss_nats=measured["points"][-1]["loss"] if measured else 0.0,
        flop_per_second=trial.flop / measured["train_seconds"]
        if measured and measured["train_seconds"]
        else 0.0,
        divergence=divergence_of(trial),
        params_digest="" if result is None else result["params_digest"],
    )


def _is_usable(trial: TrialRow) -> bool:
    return bool(trial.result_json) and not divergence_of(trial)


def seed_noise(trials: Sequence[TrialRow]) -> float:
    """Standard deviation of ln loss between seeds: from repeats against their originals at every
    mark (their difference has twice the variance); 0 without any.
    """
    squares = []
    for trial in trials:
        original = int(json.loads(trial.plan_json)["original_number"])
        if original < 0 or not all(map(_is_usable, (trial, trials[original]))):
            continue
        first = {
            point["tokens"]: point["loss"]
            for point in json.loads(trials[original].result_json)["points"]
        }
        squares += [
            math.log(point["loss"] / first[point["tokens"]]) ** 2 / 2
            for point in json.loads(trial.result_json)["points"]
            if point["tokens"] in first
        ]
    return math.sqrt(sum(squares) / len(squares)) if squares else 0.0
