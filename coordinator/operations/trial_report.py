"""The result of a trial: taken once, from its present holder, if it is what was asked for."""

import json
import math
from dataclasses import replace

from coordinator.domain.duties import DutyRecord, Report
from coordinator.operations.common import unix_ms
from coordinator.operations.requests import TrialResult
from coordinator.store.base import Transaction
from coordinator.store.rows_studies import TrialRow
from protos.contract.model_shape import COUNTING_CONVENTION, ModelShape
from protos.contract.run_spec import RunSpec

_MAX_LOSS_NATS = 1000.0


def take_trial(
    tx: Transaction, duty: DutyRecord, result: TrialResult, *, now_unix_seconds: float
) -> Report:
    """Store the result, or say why it cannot be right. The caller has checked the fence and ends
    the duty.
    """
    row = tx.trial(duty.duty_id)
    if row is None:
        return Report(is_accepted=False, reason="no such trial")
    if row.result_json:
        return Report(is_accepted=False, reason=f"trial {row.trial_id} was counted already")
    plan = json.loads(row.plan_json)
    problem = _problem(RunSpec.from_wire(plan["spec"].encode()), plan["mark_tokens"], result)
    if problem:
        return Report(is_accepted=False, reason=problem)
    points = [
        {
            "tokens": point.tokens,
            "loss": point.total_nats / point.num_tokens,
            "bits_per_byte": point.total_nats / math.log(2) / point.num_bytes
            if point.num_bytes
            else 0.0,
        }
        for point in result.points
    ]
    tx.put_trial(_finished(row, duty, points, result, now_unix_ms=unix_ms(now_unix_seconds)))
    if result.divergence:
        text = f"{row.params_n:,.0f} parameters diverged: {result.divergence}"
    else:
        text = (
            f"{row.params_n:,.0f} parameters, {points[-1]['tokens']:,} tokens: held-out loss "
            f"{points[-1]['loss']:.4f} nats in {result.train_seconds:.0f} s"
        )
    return Report(is_accepted=True, reason=text)


def _problem(spec: RunSpec, marks: list[int], result: TrialResult) -> str:
    shape = ModelShape.from_spec(spec.model)
    if (result.run_digest, result.seed) != (spec.run_digest, spec.seed):
        return f"it trained spec {result.run_digest[:12]}, {spec.run_digest[:12]} was asked for"
    counted = (result.convention, result.params_n, result.flop_per_token)
    if counted != (COUNTING_CONVENTION, shape.num_matmul_parameters, shape.flop_per_token()):
        return f"it counts {counted}, not as {COUNTING_CONVENTION} does here"
    reached = [point.tokens for point in result.points]
    if reached != (marks[: len(reached)] if result.divergence else marks):
        return f"it was evaluated at {reached}, not at {marks}"
    for point in result.points:
        most = _MAX_LOSS_NATS * point.num_tokens
        if not (point.num_tokens > 0 and 0 < point.total_nats <= most):
            return f"{point.total_nats} nats over {point.num_tokens} tokens is not possible"
    if not (0 <= result.train_seconds < math.inf) or len(result.params_digest) != 32:
        return "time or digest of the parameters is missing"
    return ""


def _finished(
    row: TrialRow,
    duty: DutyRecord,
    points: list[dict[str, float]],
    result: TrialResult,
    *,
    now_unix_ms: int,
) -> TrialRow:
    text = json.dumps(
        {
            "points": points,
            "seed": result.seed,
            "run_digest": result.run_digest,
            "convention": result.convention,
            "params_digest": result.params_digest.hex(),
            "train_seconds": result.train_seconds,
            "divergence": result.divergence,
        },
        sort_keys=True,
    )
    return replace(
        row, peer_id=duty.peer_id, fence=duty.fence, result_json=text, finish_unix_ms=now_unix_ms
    )
