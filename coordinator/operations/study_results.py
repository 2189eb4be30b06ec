"""What trials have measured, as observations."""

import json
from collections.abc import Iterable

from coordinator.scaling.forecast import Points
from coordinator.scaling.observations import Convention, Observation, Observations
from coordinator.scaling.report import points_of
from coordinator.store.base import Transaction
from coordinator.store.rows_studies import TrialRow
from coordinator.study.design import Purpose


def divergence_of(trial: TrialRow) -> str:
    """Why a trial was stopped early; "" if it was not, or has no result."""
    return str(json.loads(trial.result_json).get("divergence", "")) if trial.result_json else ""


def observations_of(trials: Iterable[TrialRow], *, source: str) -> list[Observation]:
    """Every point of every finished size trial. N and C are counted as runs count theirs
    (protos/contract/model_shape.py).
    """
    rows = []
    for trial in trials:
        if trial.purpose != Purpose.SIZE or not trial.result_json or divergence_of(trial):
            continue
        plan, result = json.loads(trial.plan_json), json.loads(trial.result_json)
        model = json.loads(plan["spec"])["model"]
        rows += [
            Observation(
                params_n=trial.params_n,
                tokens_d=float(point["tokens"]),
                compute_flop=plan["flop_per_token"] * point["tokens"],
                loss_nats=point["loss"],
                convention=Convention(result["convention"]),
                head_params=float(model["vocab_size"] * model["d_model"]),
                seed=result["seed"],
                run_digest=result["run_digest"],
                source=source,
            )
            for point in result["points"]
        ]
    return rows


def observations_of_dataset(tx: Transaction, dataset_id: str) -> Points | None:
    """Constant-rate losses of all studies on one dataset; None if there are none."""
    rows: list[Observation] = []
    for study in tx.studies():
        if json.loads(study.design_json)["dataset_id"] == dataset_id:
            rows += observations_of(tx.trials(study.study_id), source=study.study_id)
    return points_of(Observations.of(rows)) if rows else None
