"""A study from stage to stage: trials opened, results weighed, and the end, its own or its run's.

A trial that diverged has a result too, without being an observation: a learning rate that does it
is not chosen, a size that does it is not fitted.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import replace

from coordinator.domain.duties import DutyKind, DutyRecord, DutyState, give_up
from coordinator.operations.common import unix_ms
from coordinator.operations.duties import load_duties, save_duty
from coordinator.operations.study_results import divergence_of
from coordinator.store.base import Transaction
from coordinator.store.rows import RunRow
from coordinator.store.rows_studies import StudyRow, TrialRow
from coordinator.study.design import (
    MIN_SIZES,
    Purpose,
    StudyDesign,
    StudyStage,
    TrialPlan,
    best_rate,
    size_plans,
)

OVER_STAGES = frozenset({StudyStage.DONE.value, StudyStage.FAILED.value})


def open_trials(
    tx: Transaction,
    study: StudyRow,
    plans: Sequence[TrialPlan],
    *,
    now_unix_seconds: float,
) -> None:
    """Add trials after those that there are; each is a duty of the same id."""
    first = len(tx.trials(study.study_id))
    for number, plan in enumerate(plans, start=first):
        trial_id = f"{study.run_id}/trial/{study.study_id}-{number}"
        if plan.original_number >= 0:
            plan = replace(plan, original_number=first + plan.original_number)
        tx.put_trial(
            TrialRow(
                trial_id=trial_id,
                study_id=study.study_id,
                trial_number=number,
                purpose=plan.purpose,
                plan_json=plan.to_json(),
                flop=plan.flop,
                params_n=float(plan.shape.num_matmul_parameters),
                first_peer_id="",
                peer_id="",
                fence=0,
                result_json="",
                finish_unix_ms=0,
            )
        )
        duty = DutyRecord(
            duty_id=trial_id,
            kind=DutyKind.TRIAL,
            state=DutyState.OPEN,
            fence=0,
            min_outer_step=0,
            create_unix_seconds=now_unix_seconds,
            reason=f"trial {number} of study {study.study_id}",
        )
        save_duty(tx, study.run_id, duty)


def advance_studies(tx: Transaction, run: RunRow, *, now_unix_seconds: float) -> list[str]:
    """Move the studies of a run on whose trials are all over; returns what changed."""
    changes = []
    for study in tx.studies():
        if study.run_id != run.run_id or study.stage in OVER_STAGES:
            continue
        trials = tx.trials(study.study_id)
        state_by_id = {duty.duty_id: duty.state for duty in load_duties(tx, run.run_id)}
        over = (DutyState.DONE, DutyState.FAILED)
        if not all(state_by_id.get(trial.trial_id) in over for trial in trials):
            continue
        changes.append(_advance(tx, study, trials, now_unix_seconds=now_unix_seconds))
    return changes


def _advance(
    tx: Transaction, study: StudyRow, trials: Sequence[TrialRow], *, now_unix_seconds: float
) -> str:
    if study.stage != StudyStage.RATES:
        return _conclude(tx, study, trials, now_unix_seconds=now_unix_seconds)
    design = StudyDesign.from_json(study.design_json)
    losses = {
        (trial.params_n, _rate(trial)): _end_loss(trial) for trial in trials if trial.result_json
    }
    usable = {
        size
        for size, _ in losses
        if all((size, rate) in losses for rate in design.learning_rates)
        and any(math.isfinite(losses[size, rate]) for rate in design.learning_rates)
    }
    if not usable:
        reason = f"no size has a result of every learning rate that is usable{_lacks(trials)}"
        return _set_stage(tx, study, StudyStage.FAILED, reason, now_unix_seconds)
    rate, why = best_rate({key: loss for key, loss in losses.items() if key[0] in usable})
    plans = size_plans(design, rate)
    open_trials(tx, study, plans, now_unix_seconds=now_unix_seconds)
    reason = f"{why}, at {len(usable)} sizes; {len(plans)} trials follow{_lacks(trials)}"
    return _set_stage(tx, study, StudyStage.SIZES, reason, now_unix_seconds)


def _conclude(
    tx: Transaction,
    study: StudyRow,
    trials: Sequence[TrialRow],
    *,
    now_unix_seconds: float,
    because: str = "",
) -> str:
    """DONE if enough sizes can be fitted, else FAILED."""
    usable = [trial for trial in trials if trial.result_json and not divergence_of(trial)]
    num_sizes = sum(trial.purpose == Purpose.SIZE for trial in usable)
    if num_sizes < MIN_SIZES:
        reason = f"{num_sizes} sizes have a usable result, a fit needs {MIN_SIZES}"
        stage = StudyStage.FAILED
    else:
        reason = f"{len(usable)} of {len(trials)} trials have a usable result"
        stage = StudyStage.DONE
    reason = f"{because}{reason}{_lacks(trials)}"
    return _set_stage(tx, study, stage, reason, now_unix_seconds)


def _lacks(trials: Sequence[TrialRow]) -> str:
    missing = sum(not trial.result_json for trial in trials)
    diverged = sum(bool(divergence_of(trial)) for trial in trials)
    text = f"; {missing} trials ended without a result" if missing else ""
    return text + (f"; {diverged} diverged" if diverged else "")


def end_studies(tx: Transaction, run: RunRow, *, now_unix_seconds: float) -> list[str]:
    """End the studies of a run that is over: its peers leave, so nobody is left for open trials.

    What was measured stays, and is enough for DONE if it can be fitted.
    """
    changes = []
    for study in tx.studies():
        if study.run_id != run.run_id or study.stage in OVER_STAGES:
            continue
        why = f"run {run.run_id} is {run.state}"
        trials = tx.trials(study.study_id)
        ids = {trial.trial_id for trial in trials}
        for duty in load_duties(tx, run.run_id):
            if duty.duty_id in ids and duty.is_pending:
                save_duty(tx, run.run_id, give_up(duty, why, now_unix_seconds=now_unix_seconds))
        changes.append(
            _conclude(tx, study, trials, now_unix_seconds=now_unix_seconds, because=f"{why}: ")
        )
    return changes


def _end_loss(trial: TrialRow) -> float:
    """Held-out loss at the last mark; infinite if it diverged."""
    if divergence_of(trial):
        return math.inf
    return float(json.loads(trial.result_json)["points"][-1]["loss"])


def _set_stage(
    tx: Transaction, study: StudyRow, stage: StudyStage, reason: str, now_unix_seconds: float
) -> str:
    is_over = stage in OVER_STAGES
    finish_unix_ms = unix_ms(now_unix_seconds) if is_over else 0
    tx.put_study(replace(study, stage=stage, stage_reason=reason, finish_unix_ms=finish_unix_ms))
    text = f"study {study.study_id} is {stage}: {reason}"
    note(tx, study, text, now_unix_seconds)
    return text


def _rate(trial: TrialRow) -> float:
    plain = json.loads(json.loads(trial.plan_json)["spec"])
    return float(plain["optimizer"]["peak_lr"])


def note(tx: Transaction, study: StudyRow, text: str, now_unix_seconds: float) -> None:
    """An event of the run that the study is attached to."""
    tx.insert_event(
        run_id=study.run_id,
        unix_ms=unix_ms(now_unix_seconds),
        kind="study",
        peer_id="",
        text=text,
    )
