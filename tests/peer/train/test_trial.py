"""A trial in its process: what is asked for is trained, measured at its marks, and told exactly."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from peer.daemon.trials import needed_chunks
from peer.train.trial import main, run_trial
from protos.contract.chunk_format import Manifest
from protos.contract.errors import UsageError
from protos.contract.model_shape import ModelShape
from protos.contract.run_spec import RunSpec, ScheduleSpec
from tests.peer.train.toy_dataset import build_toy_dataset


@pytest.fixture
def trial(tmp_path: Path) -> tuple[RunSpec, Path]:
    spec = build_toy_dataset(tmp_path)
    return replace(spec, schedule=ScheduleSpec(lr_warmup_tokens=0, cooldown_ratio=0.0)), tmp_path


def test_points_at_the_marks_and_the_same_again(trial: tuple[RunSpec, Path]) -> None:
    spec, folder = trial
    batch = spec.strategy.global_batch_tokens
    marks = [batch * 2, batch * 5, spec.budget_tokens]
    results = [run_trial(spec, folder, marks) for _ in range(2)]
    first = results[0]
    assert [point["tokens"] for point in first["points"]] == marks
    assert first["points"][-1]["total_nats"] < first["points"][0]["total_nats"]
    shape = ModelShape.from_spec(spec.model)
    assert first["params_n"] == shape.num_matmul_parameters
    assert first["run_digest"] == spec.run_digest and first["convention"] == "matmul"
    assert first["params_digest"] == results[1]["params_digest"]
    other = run_trial(replace(spec, seed=spec.seed + 1), folder, marks)
    assert other["params_digest"] != first["params_digest"]


def test_command_line_writes_one_result(trial: tuple[RunSpec, Path]) -> None:
    spec, folder = trial
    (folder / "spec.json").write_bytes(spec.to_wire())
    common = ["--spec", str(folder / "spec.json"), "--dataset", str(folder), "--result"]
    done = folder / "result.json"
    assert main([*common, str(done), "--marks", str(spec.budget_tokens)]) == 0
    assert json.loads(done.read_text())["seed"] == spec.seed
    refused = folder / "refused.json"
    assert main([*common, str(refused), "--marks", "5,3"]) == UsageError.exit_code
    assert not refused.exists()


def test_chunks_of_a_trial(trial: tuple[RunSpec, Path]) -> None:
    spec, folder = trial
    manifest = Manifest.from_bytes((folder / "manifest.json").read_bytes())
    assert len(needed_chunks(replace(spec, budget_tokens=spec.model.seq_len), manifest)) == 1
    many = replace(spec, budget_tokens=spec.model.seq_len * 1000)
    assert sorted(needed_chunks(many, manifest)) == [0, 1, 2]


@pytest.mark.parametrize("peak_lr", [1e4, 1e30])
def test_a_learning_rate_that_diverges_has_that_as_its_result(
    trial: tuple[RunSpec, Path], peak_lr: float
) -> None:
    spec, folder = trial
    spec = replace(spec, optimizer=replace(spec.optimizer, peak_lr=peak_lr, clip_norm=1e9))
    batch = spec.strategy.global_batch_tokens
    found = run_trial(spec, folder, [batch, spec.budget_tokens])
    assert "loss" in found["divergence"] and "tokens" in found["divergence"]
    assert len(found["points"]) < 2 and found["run_digest"] == spec.run_digest


def test_the_daemon_hears_that_training_comes_round(trial: tuple[RunSpec, Path]) -> None:
    spec, folder = trial
    told: list[float] = []
    run_trial(spec, folder, [spec.budget_tokens], tell=told.append)
    assert len(told) >= 2 and all(0 < seconds < 60 for seconds in told)
    assert told[-1] >= told[0]  # an evaluation is announced as a longer turn
