"""Every layout on real gloo processes gives the gradients, norm and loss of one process.

Tiny shapes; the processes are started once for all tests (conftest.py).
"""

import math
import resource
import signal
import time
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from peer.model.inner_optimizer import adamw
from peer.model.loss import examples_on, summed_loss
from peer.model.objectives import IGNORED, ExampleBuilder, Examples
from peer.model.probe import LayerStats
from peer.parallel.faults import LocalRankError
from peer.parallel.layout import Layout, Schedule
from peer.parallel.ranks import LocalRanks, end_of_rank, is_loader_out_of_memory
from peer.train.node_step import NodeStep
from peer.train.probed_step import ProbedNodeStep, ProbedStep, Timer
from peer.train.step import MicroStep
from protos.contract.digest import Float32Vector
from protos.contract.model_shape import ModelShape
from protos.contract.run_spec import ModelSpec, ObjectiveSpec, OptimizerSpec
from tests.peer.model.tiny import BASE, build

pytestmark = pytest.mark.slow

DEEP = replace(BASE, num_layers=4)
ODD = replace(BASE, vocab_size=61, has_tied_embeddings=False)  # 61 does not divide by 2
ONE_KV = replace(BASE, num_kv_heads=1)
NUM_WINDOWS = 7


@dataclass(frozen=True, slots=True)
class Reference:
    """What one process gives."""

    params: Float32Vector
    grads: Float32Vector
    total_nats: float


def examples_for(spec: ModelSpec, *, num_windows: int = NUM_WINDOWS, is_plain: bool) -> Examples:
    generator = np.random.default_rng(5)
    tokens = generator.integers(0, spec.vocab_size, (num_windows, spec.seq_len + 1))
    if is_plain:
        return Examples(inputs_BT=tokens[:, :-1].copy(), labels_BT=tokens[:, 1:].copy())
    labels = tokens[:, 1:].copy()
    labels[:, :4] = IGNORED
    return Examples(
        inputs_BT=tokens[:, :-1].copy(),
        labels_BT=labels,
        weights_B=generator.uniform(0.5, 2.0, num_windows).astype(np.float32),
        prefix_B=generator.integers(1, spec.seq_len, num_windows),
        documents_BT=np.cumsum(tokens[:, :-1] == 3, axis=1),
    )


def reference(
    spec: ModelSpec, examples: Examples, *, is_bf16: bool = False, scale: float = 1.0
) -> Reference:
    model, flat = build(spec)
    flat.values.mul_(scale)
    inputs, labels, weights, mask = examples_on(examples, torch.device("cpu"))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_bf16):
        loss = summed_loss(model(inputs, mask=mask), labels, weights)
    loss.backward()
    return Reference(flat.values.numpy(), flat.grads.numpy(), float(loss.detach()))


def tolerance(spec: ModelSpec, examples: Examples) -> float:
    """Relative, for gradients of one parameter: 2e-6, or twice what rounding makes of those of one
    process on this processor's kernels (fp32 against fp64; norms and loss are fp32 in both).
    """
    model, _ = build(spec)
    model.double()
    inputs, labels, weights, mask = examples_on(examples, torch.device("cpu"))
    summed_loss(model(inputs, mask=mask), labels, weights).backward()
    grads = [parameter.grad.flatten() for parameter in model.parameters()]
    exact = torch.cat(grads).numpy()
    rounding = relative_by_parameter(spec, reference(spec, examples).grads, exact)
    return max(2e-6, 2.0 * max(rounding.values()))


def relative_by_parameter(
    spec: ModelSpec, found: Float32Vector, expected: Float32Vector
) -> dict[str, float]:
    errors, begin = {}, 0
    for name, dimensions in ModelShape.from_spec(spec).parameter_table():
        end = begin + math.prod(dimensions)
        difference = np.linalg.norm(found[begin:end].astype(float) - expected[begin:end])
        errors[name] = float(difference / np.linalg.norm(expected[begin:end].astype(float)))
        begin = end
    return errors


SMOOTH = OptimizerSpec(clip_norm=0.1, epsilon=1e-3)
"""An epsilon near the gradients, so that Adam does not make steps out of their rounding."""


def configure(
    node: LocalRanks, spec: ModelSpec, layout: Layout, optimizer: OptimizerSpec = SMOOTH
) -> int:
    """Returns the number of the model's values."""
    node.configure(spec, optimizer, layout, timeout_seconds=30.0)
    return ModelShape.from_spec(spec).num_parameters


CASES = {
    "one": (BASE, Layout(micro_batch_sequences=3)),
    "one-checkpointed": (BASE, Layout(has_checkpointing=True, micro_batch_sequences=8)),
    "dp": (BASE, Layout(dp=3, micro_batch_sequences=2)),
    "fsdp": (BASE, Layout(dp=2, is_sharded=True, micro_batch_sequences=2)),
    "fsdp-untied": (ODD, Layout(dp=3, is_sharded=True, has_checkpointing=True)),
    "tp": (BASE, Layout(tp=2, micro_batch_sequences=4)),
    "tp-odd-vocabulary": (ODD, Layout(tp=2, has_checkpointing=True, micro_batch_sequences=8)),
    "tp-one-kv-head": (ONE_KV, Layout(tp=2, micro_batch_sequences=8)),
    "tp-4-of-2-kv-heads": (BASE, Layout(tp=4, micro_batch_sequences=8)),
    "tp-2-of-3-kv-heads": (
        replace(BASE, num_heads=6, num_kv_heads=3),
        Layout(tp=2, micro_batch_sequences=8),
    ),
    "pp": (DEEP, Layout(pp=2, micro_batch_sequences=2, num_micro_batches=4)),
    "pp-gpipe": (ODD, Layout(pp=2, schedule=Schedule.GPIPE, has_checkpointing=True)),
    "pp-3-stages": (DEEP, Layout(pp=3, micro_batch_sequences=1)),
    "pp-interleaved": (DEEP, Layout(pp=2, schedule=Schedule.INTERLEAVED)),
    "pp-zero-bubble": (DEEP, Layout(pp=2, schedule=Schedule.ZERO_BUBBLE)),
    "tp-pp": (DEEP, Layout(tp=2, pp=2, micro_batch_sequences=2)),
    "tp-pp-odd": (ODD, Layout(tp=2, pp=2, micro_batch_sequences=2, has_checkpointing=True)),
    "dp-tp": (BASE, Layout(dp=2, tp=2, micro_batch_sequences=2)),
    "dp-pp": (DEEP, Layout(dp=2, pp=2, micro_batch_sequences=2)),
}


def trained_as_one_process(node: LocalRanks, name: str, examples: Examples) -> Reference:
    """Run a turn in a layout, whose loss must be that of one process; returns what that one has."""
    spec, layout = CASES[name]
    expected = reference(spec, examples)
    size = configure(node, spec, layout)
    node.vector[:size] = expected.params
    node.call("load")
    total_nats, is_finite = node.run(examples)
    assert is_finite and total_nats == pytest.approx(expected.total_nats, rel=2e-6)
    return expected


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("is_plain", [True, False], ids=["causal", "masked"])
def test_gradients_loss_and_norm_are_those_of_one_process(
    node: LocalRanks, name: str, is_plain: bool
) -> None:
    spec, layout = CASES[name]
    examples = examples_for(spec, is_plain=is_plain)
    expected = trained_as_one_process(node, name, examples)
    size = expected.params.size
    for _ in range(2):  # before and after the ranks have summed up what the norm needs
        node.vector[:size] = np.nan
        node.call("store_grads")
        errors = relative_by_parameter(spec, node.vector[:size], expected.grads)
        assert max(errors.values()) <= tolerance(spec, examples), errors
        norms = [answer["norm"] for answer in node.call("norm")]
        assert (
            norms
            == [pytest.approx(float(np.linalg.norm(expected.grads.astype(float))), rel=1e-6)]
            * layout.num_ranks
        )


@pytest.mark.parametrize("name", ["fsdp", "tp-odd-vocabulary", "pp", "tp-pp"])
def test_answers_are_trained_as_on_one_device(node: LocalRanks, name: str) -> None:
    """Records beside each other in a window, of which only answers are predicted."""
    spec, _ = CASES[name]
    tokens = np.random.default_rng(7).integers(1, spec.vocab_size, (NUM_WINDOWS, spec.seq_len + 1))
    tokens[:, [0, 2, 5, 8]] = 0  # begins, answer, begins again, answer
    tokens[:, -1] = 0
    builder = ExampleBuilder(
        ObjectiveSpec(name="answers"), seed=0, num_text_tokens=spec.vocab_size, eos_token_id=0
    )
    keys = [(0, 0, window) for window in range(NUM_WINDOWS)]
    examples = builder.build(tokens[:, :-1], tokens[:, 1:], keys)
    assert 0 < examples.num_predicted < examples.num_tokens
    expected = trained_as_one_process(node, name, examples)
    size = expected.params.size
    node.call("store_grads")
    errors = relative_by_parameter(spec, node.vector[:size], expected.grads)
    assert max(errors.values()) <= tolerance(spec, examples), errors


@pytest.mark.parametrize("name", ["tp", "tp-pp"])
def test_bf16_gradients_differ_by_rounding_only(node: LocalRanks, name: str) -> None:
    spec, layout = CASES[name]
    examples = examples_for(spec, is_plain=True)
    expected = reference(spec, examples, is_bf16=True, scale=0.5)
    size = configure(node, spec, layout)
    node.vector[:size] = expected.params
    node.call("load")
    node.run(examples, is_bf16=True)
    node.call("store_grads")
    found, wanted = node.vector[:size].astype(float), expected.grads.astype(float)
    assert np.linalg.norm(found - wanted) <= 2e-2 * np.linalg.norm(wanted)


@pytest.mark.parametrize(
    "name", ["dp", "fsdp-untied", "tp-one-kv-head", "pp", "pp-zero-bubble", "tp-pp-odd", "dp-pp"]
)
def test_layers_look_as_on_one_device(node: LocalRanks, name: str) -> None:
    """Also with windows that fill a turn up, and with recomputation, which pass layers twice."""
    spec, layout = CASES[name]
    examples = examples_for(spec, is_plain=False)
    model, flat = build(spec)
    reports: list[tuple[LayerStats, ...]] = []
    timer = Timer(0.0)
    ProbedStep(MicroStep(model, flat), timer=timer, report=reports.append).run(examples)
    size = configure(node, spec, layout)
    node.vector[:size] = flat.values.numpy()
    node.call("load")
    step = ProbedNodeStep(NodeStep(spec, node), timer=timer, report=reports.append)
    for _ in range(2):  # the second adds to the gradients of the first, and is not looked at
        step.run(examples)
    expected, found = reports
    assert [layer.layer for layer in found] == [layer.layer for layer in expected]
    for one, other in zip(expected, found, strict=True):
        assert astuple(other)[1:] == pytest.approx(astuple(one)[1:], rel=2e-5), one.layer
    node.vector[:size] = np.nan
    node.call("store_grads")
    twice = 2 * reference(spec, examples).grads
    assert max(relative_by_parameter(spec, node.vector[:size], twice).values()) <= 2e-6


@pytest.mark.parametrize("name", ["fsdp", "tp-odd-vocabulary", "pp-zero-bubble", "tp-pp"])
def test_parameters_go_in_and_come_out_bit_for_bit(node: LocalRanks, name: str) -> None:
    """So initial values, states and checkpoints of one layout are those of any other."""
    spec, layout = CASES[name]
    size = configure(node, spec, layout)
    values = np.random.default_rng(3).standard_normal(size).astype(np.float32)
    node.vector[:size] = values
    node.call("load")
    node.vector[:size] = np.nan
    node.call("store")
    np.testing.assert_array_equal(node.vector[:size], values)


@pytest.mark.parametrize("name", ["fsdp", "tp-one-kv-head", "pp", "tp-pp", "dp-pp"])
def test_inner_steps_and_turns_that_add_up_are_those_of_one_process(
    node: LocalRanks, name: str
) -> None:
    """Two inner steps of two turns each, clipped, ends near the same AdamW on one device."""
    spec, layout = CASES[name]
    turns = [examples_for(spec, num_windows=n, is_plain=False) for n in (4, 1, 3, 2)]
    model, flat = build(spec)
    optimizer = adamw(SMOOTH, list(model.parameters()))
    size = configure(node, spec, layout)
    node.vector[:size] = flat.values.numpy()
    node.call("load")
    for begin in (0, 2):
        num_tokens = 0
        flat.grads.zero_()
        for examples in turns[begin : begin + 2]:
            inputs, labels, weights, mask = examples_on(examples, torch.device("cpu"))
            summed_loss(model(inputs, mask=mask), labels, weights).backward()
            num_tokens += examples.num_tokens
            node.run(examples)
        flat.grads.div_(num_tokens)
        norm = float(flat.grads.double().norm())
        flat.grads.mul_(min(1.0, 0.1 / (norm + 1e-6)))
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 1e-3
        optimizer.step()
        node.call("inner_step", num_tokens=num_tokens, learning_rate=1e-3)
    node.call("store")
    moved = np.abs(node.vector[:size] - flat.values.numpy()).max()
    assert moved <= 2e-6


@pytest.mark.parametrize("name", ["fsdp", "tp-pp"])
def test_moments_of_a_byte_make_the_same_first_step(node: LocalRanks, name: str) -> None:
    """Later steps differ by rounding, which is not that of one process."""
    spec, layout = CASES[name]
    examples = examples_for(spec, is_plain=True)
    model, flat = build(spec)
    optimizer = adamw(SMOOTH, list(model.parameters()))
    size = configure(node, spec, layout, replace(SMOOTH, name="adamw8bit"))
    node.vector[:size] = before = flat.values.numpy().copy()
    node.call("load")
    inputs, labels, weights, mask = examples_on(examples, torch.device("cpu"))
    summed_loss(model(inputs, mask=mask), labels, weights).backward()
    flat.grads.div_(examples.num_tokens)
    flat.grads.mul_(min(1.0, 0.1 / (float(flat.grads.double().norm()) + 1e-6)))
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 1e-3
    optimizer.step()
    found = []
    for _ in range(2):
        node.run(examples)
        node.call("inner_step", num_tokens=examples.num_tokens, learning_rate=1e-3)
        node.call("store")
        found.append(node.vector[:size].copy())
    assert np.abs(found[0] - flat.values.numpy()).max() <= 2e-6
    assert 1.5 < np.linalg.norm(found[1] - before) / np.linalg.norm(found[0] - before) < 2.1


@pytest.mark.parametrize("name", ["fsdp", "tp-pp"])
def test_values_that_are_not_finite_are_told(node: LocalRanks, name: str) -> None:
    spec, layout = CASES[name]
    size = configure(node, spec, layout)
    node.vector[:size] = np.nan
    node.call("load")
    assert node.run(examples_for(spec, is_plain=True))[1] is False
    node.vector[:size] = 0.01
    node.call("load")
    node.call("zero")
    assert node.run(examples_for(spec, is_plain=True))[1] is True


@pytest.mark.parametrize(
    ("number", "words"),
    [(signal.SIGKILL, "was ended by signal 9"), (signal.SIGSTOP, "does not answer")],
    ids=["killed", "stopped"],
)
def test_a_rank_that_dies_or_hangs_is_named_in_time(
    node: LocalRanks, number: signal.Signals, words: str
) -> None:
    spec, layout = CASES["tp"]
    node.configure(spec, OptimizerSpec(), layout, timeout_seconds=5.0)
    node.processes[1].send_signal(number)
    begin_seconds = time.monotonic()
    with pytest.raises(LocalRankError, match=words) as failure:
        node.run(examples_for(spec, is_plain=True))
    assert failure.value.lost_devices == (1,) and not failure.value.has_no_memory
    assert time.monotonic() - begin_seconds < 40.0


@pytest.mark.parametrize("axis", ["tp", "pp"])
def test_a_rank_without_memory_is_told_from_one_that_is_lost(node: LocalRanks, axis: str) -> None:
    """The limit is the kernel's, so the words are torch's own: threads and libraries fit into what
    is left, a rank's logits (128 MiB at least) do not.
    """
    spec = replace(BASE, vocab_size=2**15, seq_len=64)
    layout = replace(Layout(micro_batch_sequences=32, num_micro_batches=2), **{axis: 2})
    configure(node, spec, layout)
    node.call("load")
    pid = node.processes[1].pid
    size_pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
    limit_bytes = size_pages * resource.getpagesize() + 64 * 2**20
    resource.prlimit(pid, resource.RLIMIT_AS, (limit_bytes, limit_bytes))
    with pytest.raises(LocalRankError, match="local rank 1 is out of memory") as failure:
        node.run(examples_for(spec, num_windows=64, is_plain=True))
    assert failure.value.has_no_memory and failure.value.lost_devices == ()


def test_an_end_by_the_loader_is_lack_of_memory_once_a_rank_runs() -> None:
    """glibc exits with 127 where a thread finds no memory for its own variables."""
    assert is_loader_out_of_memory(127, during="run")
    assert end_of_rank(127, during="run").startswith("is out of memory")
    for code, kind in ((127, "start"), (126, "run"), (-9, "run"), (1, "run")):
        assert not is_loader_out_of_memory(code, during=kind)
        assert "memory" not in end_of_rank(code, during=kind)
