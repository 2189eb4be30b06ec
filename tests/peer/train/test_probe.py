"""How a micro-batch is run: chosen from what was measured, with its reason, once."""

import fcntl
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from peer.model import kernels as kernels_module
from peer.model.decoder import Decoder, FlatParameters
from peer.model.kernels import find_kernels
from peer.model.native import NativeDecoder
from peer.model.objectives import Examples
from peer.train.probe import (
    StepPlan,
    Trial,
    choose,
    load_plan,
    measure_product_flop_per_second,
    probe_plan,
    set_up_step,
)
from peer.train.step import Execution, MicroStep, Precision, StepResult
from protos.contract.errors import MachineError
from tests.peer.model.tiny import BASE, build, random_windows
from tests.peer.train.harness import STEP_CACHE


def trial(execution: Execution, precision: Precision, milliseconds: float | None) -> Trial:
    seconds = None if milliseconds is None else milliseconds / 1000
    reason = "no compiler" if milliseconds is None else ""
    return Trial(execution=execution, precision=precision, sequence_seconds=seconds, reason=reason)


def trials(*milliseconds: float | None) -> list[Trial]:
    """Of eager bf16, eager fp32, native bf16, native fp32."""
    executions = (Execution.EAGER, Execution.EAGER, Execution.NATIVE, Execution.NATIVE)
    precisions = (Precision.BF16, Precision.FP32) * 2
    return [trial(*way) for way in zip(executions, precisions, milliseconds, strict=True)]


@pytest.mark.parametrize(
    ("milliseconds", "expected"),
    [
        ((10, 20, 5, 9), (Execution.NATIVE, Precision.BF16)),
        ((300, 20, 290, 12), (Execution.NATIVE, Precision.FP32)),  # bf16 is emulated
        ((10, 20, 9.5, 18), (Execution.EAGER, Precision.BF16)),  # not clearly faster
        ((18, 20, 17, 19), (Execution.EAGER, Precision.FP32)),
        ((10, 20, None, None), (Execution.EAGER, Precision.BF16)),
    ],
)
def test_the_fastest_by_a_margin(
    milliseconds: tuple[float | None, ...], expected: tuple[Execution, Precision]
) -> None:
    chosen = choose(trials(*milliseconds))
    assert (chosen.execution, chosen.precision) == expected


def test_what_the_owner_wants_is_had_or_refused() -> None:
    chosen = choose(trials(10, 20, 50, 90), wanted="native")
    assert (chosen.execution, chosen.precision) == (Execution.NATIVE, Precision.BF16)
    with pytest.raises(MachineError, match="no compiler") as refused:
        choose(trials(10, 20, None, None), wanted="native")
    assert "eager" in refused.value.allowed


@pytest.mark.parametrize(
    ("fp32_seconds", "bf16_seconds", "expected", "reasons", "allowed_seconds"),
    [
        (0.5, 0.2, Precision.BF16, ("fp32 500 ms", "bf16 200 ms"), 6.0),
        (5.0, 2.5, Precision.BF16, ("fp32 5000 ms", "bf16 2500 ms"), 17.0),
        (0.5, 32.0, Precision.FP32, ("took 2 s, 64 times as long as the best",), 8.0),
        (5.0, 320.0, Precision.FP32, ("took 20 s, 64 times as long",), 55.0),
        (18.0, 300.0, Precision.FP32, ("bf16 not tried: 3 tokens took 19 s",), 90.0),
        (40.0, 10.0, Precision.BF16, ("48 tokens (by the first 3, because", "fp32 40000 ms"), 9.0),
        (600.0, 150.0, Precision.BF16, ("48 tokens (by the first 1, because",), 32.0),
        (3600.0, 900.0, Precision.FP32, ("bf16 not tried: measuring the others took 75 s",), 76.0),
    ],
    ids=[
        "fast",
        "slow",
        "emulated",
        "slow-and-emulated",
        "slower-and-emulated",
        "very-slow",
        "minutes",
        "hour",
    ],
)
def test_measuring_ends_soon_whatever_a_sequence_takes(
    fp32_seconds: float,
    bf16_seconds: float,
    expected: Precision,
    reasons: tuple[str, ...],
    allowed_seconds: float,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now_seconds, run = [0.0], MicroStep.run

    def timed(self: MicroStep, examples: Examples) -> StepResult:
        whole_seconds = fp32_seconds if self.precision is Precision.FP32 else bf16_seconds
        now_seconds[0] += whole_seconds * examples.inputs_BT.shape[1] / self.model.spec.seq_len
        return run(self, examples)

    monkeypatch.setattr(MicroStep, "run", timed)
    monkeypatch.setattr("time.thread_time", lambda: now_seconds[0])
    step = MicroStep(*build(replace(BASE, seq_len=48)))
    plan = probe_plan(step, kernels=find_kernels(cache))
    assert plan.precision is expected and now_seconds[0] < allowed_seconds
    for reason in reasons:
        assert reason in plan.reason


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache that holds kernels, but no plan."""
    find_kernels(Path(STEP_CACHE.name))
    for library in Path(STEP_CACHE.name).glob("*.so"):
        shutil.copy(library, tmp_path)
    return tmp_path


def test_a_choice_is_kept_with_its_reason(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = MicroStep(*build(BASE))
    plan = set_up_step(step, cache_dir=cache)
    assert (step.execution, step.precision) == (plan.execution, plan.precision)
    assert not step.parameters.grads.any()
    for way in ("eager bf16", "eager fp32", "native bf16", "native fp32", "memory"):
        assert way in str(plan)
    (kept,) = cache.glob("plan-*.json")
    assert load_plan(kept) == replace(plan, micro_batch_sequences=1, size_reason="")
    monkeypatch.setattr("peer.train.probe.probe_plan", None)  # must not be called again
    torch.set_num_threads(2)
    try:
        again = MicroStep(*build(BASE))
        found = set_up_step(again, cache_dir=cache)
    finally:
        torch.set_num_threads(1)
    assert found.reason == plan.reason
    assert (again.execution, again.precision) == (plan.execution, plan.precision)
    kept.write_text("{}")
    assert load_plan(kept) is None


def test_another_model_is_measured_anew(cache: Path) -> None:
    for spec in (BASE, replace(BASE, d_ff=48)):
        set_up_step(MicroStep(*build(spec)), cache_dir=cache)
    assert len(list(cache.glob("plan-*.json"))) == 2


def test_peers_that_start_together_measure_once(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[MicroStep] = []

    def counted(step: MicroStep, **options: Any) -> StepPlan:
        begun.append(step)
        return probe_plan(step, **options)

    monkeypatch.setattr("peer.train.probe.probe_plan", counted)
    steps = [MicroStep(*build(BASE)) for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        plans = list(pool.map(lambda step: set_up_step(step, cache_dir=cache), steps))
    assert len(begun) == 1
    assert len({plan.reason for plan in plans}) == 1 and len({s.how for s in steps}) == 1


def test_a_holder_that_does_not_end_is_not_waited_for(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("peer.train.probe._PATIENCE_SECONDS", 0.0)
    with (cache / "lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert set_up_step(MicroStep(*build(BASE)), cache_dir=cache).trials
    assert "not measured in turn" in caplog.text


def test_a_cache_that_cannot_be_written_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kernels_module, "COMPILERS", ("no-such-compiler",))
    (tmp_path / "file").write_text("")
    plan = set_up_step(MicroStep(*build(BASE)), cache_dir=tmp_path / "file")
    assert plan.execution is Execution.EAGER and "is not a directory" in plan.reason

    def full(*_: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr("os.replace", full)
    assert set_up_step(MicroStep(*build(BASE)), cache_dir=tmp_path / "full").trials
    assert "measured again next time" in caplog.text


def test_what_others_could_have_written_is_not_used(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_up_step(MicroStep(*build(BASE)), cache_dir=cache)
    (cache / "lock").unlink()
    cache.chmod(0o770)
    kept = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    asked: list[Path | None] = []
    monkeypatch.setattr(
        "peer.train.probe.find_kernels", lambda path: asked.append(path) or find_kernels(None)
    )
    plan = set_up_step(MicroStep(*build(BASE)), cache_dir=cache)
    assert plan.reason.endswith(
        f"nothing is kept: {cache} belongs to, or may be written by, others"
    )
    assert asked == [None], "neither loaded nor built there"
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == kept, "no lock, no plan"


def test_kernels_with_other_gradients_are_not_used(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrong(NativeDecoder):
        def run(self, *batch: Any) -> float:
            nats = super().run(*batch)
            self._parameters.grads.mul_(1.5)
            return nats

    monkeypatch.setattr("peer.train.step.NativeDecoder", Wrong)
    model = Decoder(BASE)
    step = MicroStep(model, FlatParameters(model))  # blank, as in a trainer
    plan = set_up_step(step, cache_dir=cache)
    assert plan.execution is Execution.EAGER is step.execution
    assert "native fp32 not tried: its gradients differ from torch's by 0.5" in plan.reason
    assert not step.parameters.values.any() and not step.parameters.grads.any()


def test_without_a_compiler_torch_does_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels_module, "COMPILERS", ("no-such-compiler",))
    plan = set_up_step(MicroStep(*build(BASE)), cache_dir=tmp_path)
    assert plan.execution is Execution.EAGER
    assert "native bf16 not tried: there is no C compiler (no-such-compiler)" in plan.reason
    with pytest.raises(MachineError, match="no-such-compiler"):
        set_up_step(MicroStep(*build(BASE)), wanted="native")


def test_every_execution_gives_the_same_step(cache: Path) -> None:
    inputs_BT, labels_BT = (t.numpy() for t in random_windows(BASE, num_windows=3))
    examples = Examples(inputs_BT=inputs_BT, labels_BT=labels_BT)
    model, flat = build(BASE)
    step = MicroStep(model, flat)
    expected = step.run(examples)
    grads = flat.grads.clone()
    set_up_step(step, wanted="native", cache_dir=cache)
    for precision, tolerance in ((Precision.FP32, 5e-6), (Precision.BF16, 3e-2)):
        step.precision = precision
        found = step.run(examples)
        assert found.num_tokens == expected.num_tokens and found.is_finite
        assert found.total_nats == pytest.approx(expected.total_nats, rel=tolerance)
        assert float((flat.grads - grads).norm() / grads.norm()) < tolerance
    flat.values[3] = np.nan
    assert not step.run(examples).is_finite


@pytest.mark.slow
def test_compiled_layers_give_the_same_step() -> None:
    inputs_BT, labels_BT = (t.numpy() for t in random_windows(BASE, num_windows=3))
    model, flat = build(BASE)
    step = MicroStep(model, flat)
    expected = []
    for rows in (slice(0, 2), slice(0, 3)):
        result = step.run(Examples(inputs_BT=inputs_BT[rows], labels_BT=labels_BT[rows]))
        expected.append((rows, result.total_nats, flat.grads.clone()))
    step.use_compiled(num_sequences=2)
    for rows, total_nats, grads in expected:  # three sequences were not compiled for: eager
        result = step.run(Examples(inputs_BT=inputs_BT[rows], labels_BT=labels_BT[rows]))
        assert result.total_nats == pytest.approx(total_nats, rel=1e-6)
        assert float((flat.grads - grads).norm() / grads.norm()) < 5e-6
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0


def test_the_ceiling_is_a_speed() -> None:
    assert measure_product_flop_per_second(torch.device("cpu"), Precision.FP32) > 1e8
