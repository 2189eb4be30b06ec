"""The probe sees what a layer put out and what its gradient is, and only while it is entered."""

import math
from pathlib import Path

import pytest
import torch

from peer.model.kernels import find_kernels
from peer.model.loss import summed_loss
from peer.model.objectives import Examples
from peer.model.probe import LayerProbe, LayerStats
from peer.train.probed_step import ProbedStep, Timer
from peer.train.step import MicroStep, Precision
from tests.peer.model.tiny import BASE, VARIANTS, build, random_windows


@pytest.mark.parametrize("variant", ["tied", "untied"])
def test_statistics_are_those_of_the_layers(variant: str) -> None:
    model, flat = build(VARIANTS[variant])
    inputs_BT, labels_BT = random_windows(VARIANTS[variant], num_windows=3)
    kept: list[torch.Tensor] = []
    handle = model.layers["1"].register_forward_hook(lambda _m, _i, out: kept.append(out.detach()))
    flat.grads.zero_()
    with LayerProbe(model) as probe:
        summed_loss(model(inputs_BT), labels_BT).backward()
    handle.remove()
    by_layer = {stats.layer: stats for stats in probe.stats(num_tokens=labels_BT.numel())}
    assert list(by_layer) == ["embedding", "0", "1", "norm"]
    layer = by_layer["1"]
    assert layer.activation_rms == pytest.approx(float(kept[0].square().mean().sqrt()), rel=1e-5)
    assert layer.activation_max == pytest.approx(float(kept[0].abs().max()))
    grads = torch.cat([p.grad.flatten() for p in model.layers["1"].parameters()])
    rms = float(grads.square().mean().sqrt()) / labels_BT.numel()
    assert layer.gradient_rms == pytest.approx(rms, rel=1e-4)
    embedded = model.tok_embeddings.weight[inputs_BT]
    assert by_layer["embedding"].activation_rms == pytest.approx(
        float(embedded.detach().square().mean().sqrt()), rel=1e-5
    )
    before = probe.stats(num_tokens=1)
    model(inputs_BT)
    assert [s.activation_rms for s in probe.stats(num_tokens=1)] == [
        s.activation_rms for s in before
    ]


def test_a_probed_step_trains_the_same_and_reports_at_its_interval() -> None:
    model, flat = build(VARIANTS["untied"])
    inputs_BT, labels_BT = random_windows(VARIANTS["untied"], num_windows=2)
    examples = Examples(inputs_BT=inputs_BT.numpy(), labels_BT=labels_BT.numpy())
    plain = MicroStep(model, flat)
    expected = plain.run(examples)
    grads = flat.grads.clone()
    now, reports = [0.0], list[tuple[LayerStats, ...]]()
    step = ProbedStep(plain, timer=Timer(10, clock=lambda: now[0]), report=reports.append)
    for now[0] in (0.0, 5.0, 9.9, 10.0, 15.0):
        assert step.run(examples) == expected
        assert torch.equal(flat.grads, grads)
    assert len(reports) == 2 and all(math.isfinite(s.gradient_max) for s in reports[0])


def test_a_probed_step_goes_on_natively_between_its_looks(tmp_path: Path) -> None:
    model, flat = build(BASE)
    inputs_BT, labels_BT = random_windows(BASE, num_windows=2)
    examples = Examples(inputs_BT=inputs_BT.numpy(), labels_BT=labels_BT.numpy())
    plain = MicroStep(model, flat, precision=Precision.BF16)
    eager = plain.run(examples).total_nats
    plain.use_native(find_kernels(tmp_path))
    native = plain.run(examples).total_nats
    assert native != eager, "rounding tells who ran"
    now, reports = [0.0], list[tuple[LayerStats, ...]]()
    step = ProbedStep(plain, timer=Timer(10, clock=lambda: now[0]), report=reports.append)
    assert step.how == "bf16 native"
    found = []
    for now[0] in (0.0, 5.0, 10.0):
        found.append(step.run(examples).total_nats)
    assert found == [eager, native, eager]
    assert all(stats.activation_rms > 0 for report in reports for stats in report)
