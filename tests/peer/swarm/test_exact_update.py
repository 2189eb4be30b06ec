"""The exact update: the same bits on every CPU level and thread count, and AdamW's numbers."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from peer.model.init import fill_normal, initial_vector
from peer.model.schedule import learning_rate
from peer.swarm.exact_update import SyncUpdate, power, vector_norm
from protos.contract.errors import CorruptDataError
from protos.contract.model_shape import ModelShape
from tests.peer.swarm.update_digest import SPEC, run_outer_updates, run_updates

GOLDEN_DIGEST = "7b4733f0a7b0bc8c36f7212c37451c513e3f134df8adb20e3e7bec21226ad526"
"""Changes only when the rule of the update changes, and then PROTOCOL_VERSION rises."""
OUTER_GOLDEN_DIGEST = "afa5b2d42e40394e45e6bd14b1c6f6436626287893b818046fa9b9d4a36a9037"
"""The same for diloco."""

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("environment", "num_threads"),
    [
        ({"ATEN_CPU_CAPABILITY": "default", "NPY_DISABLE_CPU_FEATURES": "AVX2 FMA3"}, 1),
        ({"ATEN_CPU_CAPABILITY": "avx2", "NPY_DISABLE_CPU_FEATURES": "AVX512F AVX512_SKX"}, 2),
        ({"ATEN_CPU_CAPABILITY": "avx512"}, 2),
    ],
)
def test_same_bits_on_every_cpu_level(environment: dict[str, str], num_threads: int) -> None:
    completed = subprocess.run(
        [sys.executable, "-m", "tests.peer.swarm.update_digest", str(num_threads)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert completed.stdout.split() == [GOLDEN_DIGEST, OUTER_GOLDEN_DIGEST]


def test_same_bits_for_any_number_of_threads() -> None:
    assert {run_updates(num_threads) for num_threads in (1, 2, 3)} == {GOLDEN_DIGEST}
    assert {run_outer_updates(num_threads) for num_threads in (1, 2, 3)} == {OUTER_GOLDEN_DIGEST}


def test_follows_torch_adamw() -> None:
    update = SyncUpdate(SPEC)
    params = initial_vector(SPEC)
    exp_avg, exp_avg_sq = np.zeros_like(params), np.zeros_like(params)
    averaged = np.zeros_like(params)
    tensors, groups, offset = [], ([], []), 0
    for _, shape in ModelShape.from_spec(SPEC.model).parameter_table():
        end = offset + math.prod(shape)
        tensor = torch.nn.Parameter(torch.from_numpy(params[offset:end].copy()).view(shape))
        tensors.append(tensor)
        groups[0 if len(shape) == 2 else 1].append(tensor)
        offset = end
    adamw = torch.optim.AdamW(
        [
            {"params": groups[0], "weight_decay": SPEC.optimizer.weight_decay},
            {"params": groups[1], "weight_decay": 0.0},
        ],
        betas=(SPEC.optimizer.beta1, SPEC.optimizer.beta2),
        eps=SPEC.optimizer.epsilon,
    )
    for number in range(1, 6):
        fill_normal(averaged, seed=number, name="gradient", std=1e-2)
        schedule = {"cooldown_start_tokens": 1_024, "budget_tokens": 32_000}
        tokens = 512 * (number - 1)
        stats = update.apply(
            params,
            exp_avg,
            exp_avg_sq,
            averaged,
            update_number=number,
            schedule_tokens=tokens,
            **schedule,
        )
        assert stats.lr == learning_rate(SPEC, schedule_tokens=tokens, **schedule)
        assert stats.grad_norm == pytest.approx(np.linalg.norm(averaged.astype(np.float64)))
        for group in adamw.param_groups:
            group["lr"] = stats.lr
        offset = 0
        for tensor in tensors:
            end = offset + tensor.numel()
            tensor.grad = torch.from_numpy(averaged[offset:end].copy()).view(tensor.shape)
            offset = end
        norm = torch.nn.utils.clip_grad_norm_(tensors, SPEC.optimizer.clip_norm)
        assert stats.clip_coefficient == pytest.approx(
            min(1.0, 1.0 / (float(norm) + 1e-6)), rel=1e-5
        )
        adamw.step()
    expected = torch.cat([tensor.detach().flatten() for tensor in tensors]).numpy()
    np.testing.assert_allclose(params, expected, rtol=2e-6, atol=2e-7)


def test_norm_is_taken_in_fp64_over_all_blocks() -> None:
    vector = np.full(200_001, 1e-3, dtype=np.float32)
    assert vector_norm(vector) == pytest.approx(math.sqrt(200_001) * float(vector[0]), rel=1e-14)


def test_power_multiplies_only() -> None:
    assert power(0.95, 0) == 1.0
    assert power(0.999, 1000) == pytest.approx(0.999**1000, rel=1e-13)


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    update = SyncUpdate(SPEC)
    params = initial_vector(SPEC)
    before = params.copy()
    moments = np.zeros_like(params), np.zeros_like(params)
    averaged = np.zeros_like(params)
    averaged[70_000] = np.inf
    with pytest.raises(CorruptDataError, match="not finite"):
        update.apply(
            params,
            *moments,
            averaged,
            update_number=1,
            schedule_tokens=0,
            cooldown_start_tokens=1,
            budget_tokens=2,
        )
    assert np.array_equal(params, before)
    assert not moments[0].any() and not moments[1].any()
