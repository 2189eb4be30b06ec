"""Forecasts of runs under way: what one is made from, where it is kept, and what readers see.

The fit itself is made elsewhere (refit.py), beside the thread that writes. A forecast that cannot
be made is stored too, with the reason, so that nobody has to guess why there is none.
"""

import json
from dataclasses import asdict, dataclass, replace

from coordinator.domain.incarnations import is_on_chain
from coordinator.domain.run_state import FINAL_STATES
from coordinator.operations.common import OperationContext, load_book, load_run, unix_ms
from coordinator.operations.pool_budget import cooldown_start_tokens, goodput_tokens_per_second
from coordinator.operations.requests_admin import ForecastPoint, ForecastStatus
from coordinator.operations.states import load_segments
from coordinator.operations.study_results import observations_of_dataset
from coordinator.scaling.forecast import Points
from coordinator.scaling.live import Evaluated, LiveForecast, RunNow
from coordinator.store.base import Transaction
from coordinator.store.rows import RunRow
from coordinator.store.rows_studies import ForecastRow
from protos.contract.digest import canonical_json
from protos.contract.model_shape import ModelShape
from protos.contract.run_spec import RunSpec

NO_FORECAST_YET = "no evaluation has been accepted yet"


@dataclass(frozen=True, slots=True, kw_only=True)
class FindRefitsRequest:
    """All runs that are not over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RefitTask:
    """A run with an evaluation behind which no forecast was made."""

    run_id: str
    incarnation: int
    outer_step: int
    schedule_tokens: int
    run: RunNow
    others: Points | None
    """Observations of studies on the same text, counted alike."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveForecastRequest:
    """What came of a task."""

    task: RefitTask
    forecast: LiveForecast | None
    reason: str
    """Why there is none; "" if there is one."""


def find_refits(
    tx: Transaction,
    request: FindRefitsRequest,
    /,
    *,
    context: OperationContext,
    now_unix_seconds: float,
) -> tuple[RefitTask, ...]:
    """Runs whose newest evaluation has no forecast yet. Only reads."""
    tasks = []
    for run in tx.runs():
        if run.state in FINAL_STATES or not run.incarnation:
            continue
        task = _task(tx, run, now_unix_seconds=now_unix_seconds)
        if task is not None:
            tasks.append(task)
    return tuple(tasks)


def _task(tx: Transaction, run: RunRow, *, now_unix_seconds: float) -> RefitTask | None:
    rows, book = tx.evaluations(run.run_id), load_book(tx, run.run_id)
    if not rows or book.credited_tokens >= book.budget_tokens:
        return None  # nothing to go by, or nothing left to forecast
    newest = max(rows, key=lambda row: row.receive_unix_ms)
    made = {(row.incarnation, row.outer_step) for row in tx.forecasts(run.run_id)}
    if (newest.incarnation, newest.outer_step) in made:
        return None
    segments = load_segments(tx, run.run_id)
    on_chain = [
        row
        for row in rows
        if is_on_chain(segments, incarnation=row.incarnation, outer_step=row.outer_step)
    ]
    by_tokens = {row.schedule_tokens: row for row in sorted(on_chain, key=lambda r: r.num_tokens)}
    spec = RunSpec.from_wire(run.spec)
    shape = ModelShape.from_spec(spec.model)
    start_tokens = cooldown_start_tokens(
        tx, run.run_id, book.budget_tokens, cooldown_ratio=spec.schedule.cooldown_ratio
    )
    return RefitTask(
        run_id=run.run_id,
        incarnation=newest.incarnation,
        outer_step=newest.outer_step,
        schedule_tokens=newest.schedule_tokens,
        run=RunNow(
            params_n=float(shape.num_matmul_parameters),
            flop_per_token=shape.flop_per_token(),
            evaluations=tuple(
                Evaluated(tokens_d=float(tokens), loss_nats=row.total_nats / row.num_tokens)
                for tokens, row in sorted(by_tokens.items())
            ),
            spent_tokens=float(book.credited_tokens),
            budget_tokens=float(book.budget_tokens),
            warmup_tokens=float(spec.schedule.lr_warmup_tokens),
            cooldown_start_tokens=float(start_tokens),
            cooldown_ratio=spec.schedule.cooldown_ratio,
            tokens_per_second=goodput_tokens_per_second(tx, run, now_unix_seconds=now_unix_seconds),
        ),
        others=observations_of_dataset(tx, run.dataset_id),
    )


def save_forecast(
    tx: Transaction,
    request: SaveForecastRequest,
    /,
    *,
    context: OperationContext,
    now_unix_seconds: float,
) -> str:
    """Store and announce a forecast; returns what was announced."""
    task, said = request.task, request.forecast
    run, book = load_run(tx, task.run_id), load_book(tx, task.run_id)
    before = tx.newest_forecast(run.run_id)
    row = ForecastRow(
        run_id=run.run_id,
        incarnation=task.incarnation,
        outer_step=task.outer_step,
        schedule_tokens=task.schedule_tokens,
        credited_tokens=book.credited_tokens,
        budget_tokens=book.budget_tokens,
        make_unix_ms=unix_ms(now_unix_seconds),
        forecast_json="" if said is None else canonical_json(asdict(said)).decode(),
        reason=request.reason if said is None else said.reason,
    )
    tx.put_forecast(row)
    text = announcement(said, request.reason)
    if said is not None or before is None or before.forecast_json:
        _note(tx, row, "forecast", text)
    was_better = before is not None and _is_restart_better(before)
    if said is not None and said.is_restart_better != was_better:
        _note(tx, row, "advice", f"restart advice: {said.restart_reason}")
    return f"{run.run_id}: {text}"


def announcement(said: LiveForecast | None, reason: str) -> str:
    """One line for logs and people."""
    if said is None:
        return f"no forecast: {reason}"
    return (
        f"held-out loss at {said.final_tokens:,.0f} tokens will be {said.loss_nats:.4f} nats "
        f"({said.low_nats:.4f} to {said.high_nats:.4f}, +-{said.half_width_ratio:.1%}): "
        f"{said.reason}"
    )


def _is_restart_better(row: ForecastRow) -> bool:
    return bool(row.forecast_json) and bool(json.loads(row.forecast_json)["is_restart_better"])


def _note(tx: Transaction, row: ForecastRow, kind: str, text: str) -> None:
    tx.insert_event(run_id=row.run_id, unix_ms=row.make_unix_ms, kind=kind, peer_id="", text=text)


def forecast_status(tx: Transaction, run: RunRow, *, now_unix_seconds: float) -> ForecastStatus:
    """The newest forecast, its ETA at the present pool."""
    row = tx.newest_forecast(run.run_id)
    if row is None:
        return ForecastStatus(
            forecast=None,
            reason=NO_FORECAST_YET,
            outer_step=0,
            credited_tokens=0,
            budget_tokens=0,
            make_unix_seconds=0.0,
        )
    said = LiveForecast(**json.loads(row.forecast_json)) if row.forecast_json else None
    if said is not None:
        speed = goodput_tokens_per_second(tx, run, now_unix_seconds=now_unix_seconds)
        book = load_book(tx, run.run_id)
        left = max(book.budget_tokens - book.credited_tokens, 0)
        eta_seconds = (left / speed if speed else -1.0) if left else 0.0
        said = replace(said, eta_seconds=eta_seconds)
    return ForecastStatus(
        forecast=said,
        reason=row.reason,
        outer_step=row.outer_step,
        credited_tokens=row.credited_tokens,
        budget_tokens=row.budget_tokens,
        make_unix_seconds=row.make_unix_ms / 1000,
    )


def all_forecasts(tx: Transaction, run: RunRow) -> list[ForecastPoint]:
    """Every forecast that could be made, oldest first."""
    points = []
    for row in tx.forecasts(run.run_id):
        if not row.forecast_json:
            continue
        said = LiveForecast(**json.loads(row.forecast_json))
        points.append(
            ForecastPoint(
                credited_tokens=row.credited_tokens,
                unix_seconds=row.make_unix_ms / 1000,
                final_tokens=said.final_tokens,
                loss_nats=said.loss_nats,
                low_nats=said.low_nats,
                high_nats=said.high_nats,
            )
        )
    return points
