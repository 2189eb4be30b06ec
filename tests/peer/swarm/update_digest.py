"""Run as a program: a few exact updates on fixed inputs; writes the digest of the state."""

import hashlib
import sys
from dataclasses import replace

import numpy as np

from peer.model.init import fill_normal
from peer.swarm.exact_update import SyncUpdate
from peer.swarm.fragments import FragmentPlan
from peer.swarm.outer_update import OuterUpdate
from protos.contract.model_shape import ModelShape
from protos.contract.run_spec import (
    DataSpec,
    ModelSpec,
    OptimizerSpec,
    RunSpec,
    ScheduleSpec,
    StrategySpec,
)

MODEL = ModelSpec(
    vocab_size=1000,
    d_model=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=24,
    d_ff=200,
    seq_len=32,
)
"""Small, but with several pieces, norms across piece borders and a short last piece."""

SPEC = RunSpec(
    seed=5,
    budget_tokens=32 * 1000,
    model=MODEL,
    optimizer=OptimizerSpec(peak_lr=3e-3),
    schedule=ScheduleSpec(lr_warmup_tokens=1024),
    strategy=StrategySpec(global_batch_tokens=512),
    data=DataSpec(dataset_id="0" * 64),
)


def run_updates(num_threads: int) -> str:
    """Hex SHA-256 over parameters and moments after four updates."""
    update = SyncUpdate(SPEC, num_threads=num_threads)
    params = np.empty(update.num_values, dtype=np.float32)
    fill_normal(params, seed=0, name="params", std=0.05)
    exp_avg, exp_avg_sq = np.zeros_like(params), np.zeros_like(params)
    averaged = np.zeros_like(params)
    for number in range(1, 5):
        fill_normal(averaged, seed=number, name="gradient", std=10.0 ** (2 - 2 * number))
        update.apply(
            params,
            exp_avg,
            exp_avg_sq,
            averaged,
            update_number=number,
            schedule_tokens=512 * (number - 1),
            cooldown_start_tokens=25_600,
            budget_tokens=32_000,
        )
    whole = hashlib.sha256()
    for vector in (params, exp_avg, exp_avg_sq):
        whole.update(vector.tobytes())
    return whole.hexdigest()


DILOCO_SPEC = replace(
    SPEC,
    strategy=StrategySpec(
        name="diloco", inner_steps=3, inner_batch_tokens=64, num_fragments=3, outer_lr=0.7
    ),
)


def run_outer_updates(num_threads: int) -> str:
    """The same of diloco: five outer steps over three fragments."""
    update, plan = OuterUpdate(DILOCO_SPEC, num_threads=num_threads), FragmentPlan(DILOCO_SPEC)
    anchors = np.empty(ModelShape.from_spec(MODEL).num_parameters, dtype=np.float32)
    fill_normal(anchors, seed=0, name="params", std=0.05)
    momentum = np.zeros_like(anchors)
    for number in range(1, 6):
        averaged = np.empty(plan.of_outer_step(number).num_values, dtype=np.float32)
        fill_normal(averaged, seed=number, name="delta", std=10.0 ** (-number))
        update.apply(anchors, momentum, averaged, update_number=number)
    return hashlib.sha256(anchors.tobytes() + momentum.tobytes()).hexdigest()


if __name__ == "__main__":
    threads = int(sys.argv[1])
    sys.stdout.write(f"{run_updates(threads)} {run_outer_updates(threads)}\n")
