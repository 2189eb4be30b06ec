"""The one-process run: learns, repeats itself, and does not depend on the micro-batch."""

import json
from pathlib import Path

import numpy as np
import pytest

from peer.model.kernels import find_kernels
from peer.train.probe import probe_plan, sequence_bytes
from peer.train.reference import ReferenceRun, main, run_reference
from peer.train.step import Precision
from protos.contract.run_spec import RunSpec
from tests.peer.model.tiny import SPEC, build
from tests.peer.train.harness import STEP_CACHE
from tests.peer.train.toy_dataset import build_toy_dataset


@pytest.fixture
def dataset(tmp_path: Path) -> tuple[RunSpec, Path]:
    return build_toy_dataset(tmp_path), tmp_path


def test_it_learns_and_spends_exactly_its_budget(dataset: tuple[RunSpec, Path]) -> None:
    spec, folder = dataset
    result = run_reference(spec, folder, precision=Precision.FP32)
    assert result.num_tokens == spec.budget_tokens
    assert result.outer_steps == -(-spec.budget_tokens // spec.strategy.global_batch_tokens)
    assert result.loss_nats_by_step[-1] < result.loss_nats_by_step[0] - 0.5
    assert result.heldout_bits_per_byte == pytest.approx(
        result.heldout_loss_nats / np.log(2), rel=1e-6
    )


def test_it_repeats_itself_to_the_bit(dataset: tuple[RunSpec, Path]) -> None:
    spec, folder = dataset
    runs = [ReferenceRun(spec, folder) for _ in range(2)]
    for _ in range(3):
        for run in runs:
            run.advance()
    assert np.array_equal(runs[0].params, runs[1].params)


def test_micro_batches_only_round_differently(dataset: tuple[RunSpec, Path]) -> None:
    spec, folder = dataset
    runs = [ReferenceRun(spec, folder) for _ in range(2)]
    runs[1].micro_batch_sequences = 3
    for run in runs:
        run.advance()
    difference = np.linalg.norm(runs[0].averaged - runs[1].averaged)
    assert difference <= 1e-5 * np.linalg.norm(runs[0].averaged)


def test_command_line(
    dataset: tuple[RunSpec, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    spec, folder = dataset
    path = tmp_path / "run.toml"
    path.write_text(spec.to_toml())
    arguments = ["--spec", str(path), "--dataset", str(folder), "--num-tokens", "240", "--json"]
    assert main([*arguments, "--precision", "fp32"]) == 0
    plain = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert plain["num_tokens"] == 240 and plain["heldout_bits_per_byte"] > 0
    path.write_text(spec.to_toml().replace("seed =", "sead ="))
    assert main(arguments) == 2
    assert "seed" in capsys.readouterr().err


def test_probe_chooses_and_says_why() -> None:
    from peer.train.step import MicroStep

    model, flat = build(SPEC.model)
    step = MicroStep(model, flat)
    plan = probe_plan(step, kernels=find_kernels(Path(STEP_CACHE.name)))
    assert plan.precision is step.precision
    assert 1 <= plan.micro_batch_sequences <= 8
    assert "fp32" in plan.reason and "memory" in str(plan)
    assert not flat.grads.any()
    assert sequence_bytes(SPEC.model, is_cpu=True) > sequence_bytes(SPEC.model, is_cpu=False)
