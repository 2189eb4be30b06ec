"""The plan that a trainer makes of its configuration, and the plan after a fault."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from peer.shared_vectors import SharedVectors
from peer.train.workbench import build_workbench, leader_position, plan_for
from protos.contract.errors import MachineError
from protos.contract.run_spec import OptimizerSpec, StrategySpec
from tests.peer.model.tiny import SPEC

MESSAGE: dict[str, Any] = {
    "device": "auto",
    "devices": "cpu:2",
    "layout": "tp=2",
    "memory_limit_bytes": 4 * 2**30,
    "num_threads": 2,
    "max_micro_batch_sequences": None,
}


def test_the_wish_is_planned() -> None:
    plan, positions = plan_for(SPEC, MESSAGE)
    assert plan.layout.tp == 2 and positions == (0, 1)
    assert 0 < plan.devices[0].memory_bytes < 2 * 2**30, "each device is half of what is left"


def test_a_lost_device_is_not_planned_with_and_the_reason_says_so() -> None:
    plan, positions = plan_for(SPEC, MESSAGE | {"lost_devices": [1]})
    assert plan.layout.num_ranks == 1 and positions == (0,)
    assert plan.reason.startswith("2 devices were asked for and 1 is left")
    plan, positions = plan_for(SPEC, MESSAGE | {"devices": "cpu:3", "lost_devices": [1]})
    assert plan.layout.tp == 2 and positions == (0, 2)


def test_when_every_device_is_lost_the_owner_is_told() -> None:
    with pytest.raises(MachineError, match="all devices that were lent are lost: cpu, cpu") as told:
        plan_for(SPEC, MESSAGE | {"lost_devices": [0, 1]})
    assert told.value.allowed and "nvidia-smi" in told.value.remedy
    assert leader_position(MESSAGE | {"lost_devices": [0]}) == 1


def test_a_gpu_that_torch_cannot_use_is_named_where_the_choice_is_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = MESSAGE | {"device": "auto", "devices": "", "layout": "auto"}
    assert "NVIDIA" not in plan_for(SPEC, message)[0].reason
    (tmp_path / "version").write_text("NVRM version")
    monkeypatch.setattr("peer.parallel.devices._NVIDIA_DRIVER", tmp_path / "version")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.init", too_old)
    assert plan_for(SPEC, message)[0].reason.startswith(
        "the NVIDIA device here is not used (The NVIDIA driver on your system is too old (found "
        "version 11040).): one device on"
    )
    with pytest.raises(MachineError, match="found version 11040") as refused:
        plan_for(SPEC, message | {"device": "cuda:0"})
    assert "update the NVIDIA driver" in refused.value.remedy


def too_old() -> None:
    raise RuntimeError(
        "The NVIDIA driver on your system is too old (found version 11040).\nPlease update"
    )


def test_memory_that_was_not_enough_is_saved_by_recomputation() -> None:
    plan, _ = plan_for(SPEC, MESSAGE | {"saves_memory": True, "max_micro_batch_sequences": 1})
    assert plan.layout.has_checkpointing and plan.layout.turn_sequences == 1
    assert "activations are recomputed" in plan.reason


def test_too_little_memory_names_the_missing_gigabytes() -> None:
    with pytest.raises(MachineError, match="GiB are missing"):
        plan_for(SPEC, MESSAGE | {"memory_limit_bytes": 2**29})


def test_one_device_is_planned_as_ever() -> None:
    plan, _ = plan_for(SPEC, MESSAGE | {"device": "cpu", "devices": "", "layout": "auto"})
    assert plan.layout.num_ranks == 1 and not plan.layout.has_checkpointing


def test_moments_of_a_byte_take_a_quarter_of_the_planned_memory() -> None:
    strategy = StrategySpec(name="diloco", inner_steps=2, inner_batch_tokens=SPEC.model.seq_len)
    message = MESSAGE | {"devices": "", "device": "cpu", "layout": "auto"}
    planned = []
    for name in ("adamw", "adamw8bit"):
        spec = replace(SPEC, strategy=strategy, optimizer=OptimizerSpec(name=name))
        plan, _ = plan_for(spec, message)
        planned.append(plan.table.optimizer_bytes - plan.table.gradients_bytes)
    assert planned[1] == pytest.approx(planned[0] * 65 / 256, rel=1e-3)


@pytest.mark.parametrize(("optimizer", "said"), [("muon", "muon"), ("adamw", "native step")])
def test_auto_takes_one_device_where_ranks_cannot_or_are_slower(optimizer: str, said: str) -> None:
    strategy = StrategySpec(name="diloco", inner_steps=2, inner_batch_tokens=SPEC.model.seq_len)
    spec = replace(SPEC, strategy=strategy, optimizer=OptimizerSpec(name=optimizer))
    plan, positions = plan_for(spec, MESSAGE | {"layout": "auto"})
    assert plan.layout.num_ranks == 1 and len(plan.devices) == 1 and positions == (0, 1)
    assert plan.reason.startswith("one device, for ") and said in plan.reason
    assert plan_for(spec, MESSAGE | {"layout": "dp=2"})[0].layout.dp == 2, "a wish is a wish"


def test_ranks_refuse_what_needs_one_device() -> None:
    strategy = StrategySpec(name="diloco", inner_steps=2, inner_batch_tokens=SPEC.model.seq_len)
    muon = replace(SPEC, strategy=strategy, optimizer=OptimizerSpec(name="muon"))
    vectors = SharedVectors.create(1, muon.strategy.state_vectors)
    with pytest.raises(MachineError, match="muon"):
        build_workbench(muon, MESSAGE | {"execution": "auto"}, vectors)
    with pytest.raises(MachineError, match="execution native"):
        build_workbench(SPEC, MESSAGE | {"execution": "native"}, vectors)
