"""What trials have measured, as observations."""

import json

import numpy as np

from coordinator.scaling.forecast import Points
from coordinator.store.base import Transaction


def observations_of_dataset(tx: Transaction, dataset_id: str) -> Points | None:
    """Constant-rate losses of all finished size trials on one dataset, (n,) each; None if none.

    N and C are counted as runs count theirs (protos/contract/model_shape.py).
    """
    rows = []
    for study in tx.studies():
        if json.loads(study.design_json)["dataset_id"] != dataset_id:
            continue
        for trial in tx.trials(study.study_id):
            if trial.purpose != "SIZE" or not trial.result_json:
                continue
            flop_per_token = json.loads(trial.plan_json)["flop_per_token"]
            rows += [
                (trial.params_n, point["tokens"], flop_per_token * point["tokens"], point["loss"])
                for point in json.loads(trial.result_json)["points"]
            ]
    if not rows:
        return None
    columns = np.array(rows, dtype=np.float64).T
    return Points(
        params_n=columns[0], tokens_d=columns[1], compute_flop=columns[2], loss_nats=columns[3]
    )
