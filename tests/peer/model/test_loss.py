"""The loss in pieces is the loss of all logits, and so are its gradients."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from peer.model import loss as loss_module
from peer.model.objectives import IGNORED, Examples
from peer.train.step import MicroStep, Precision
from tests.peer.model.tiny import VARIANTS, build, random_windows


@pytest.mark.parametrize("variant", ["tied", "untied"])
@pytest.mark.parametrize("precision", list(Precision))
@pytest.mark.parametrize("is_plain", [True, False], ids=["causal", "weighed"])
def test_pieces_give_the_same_step(
    variant: str, precision: Precision, is_plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = VARIANTS[variant]
    inputs_BT, labels_BT = (t.numpy() for t in random_windows(spec, num_windows=3))
    examples = Examples(inputs_BT=inputs_BT, labels_BT=labels_BT)
    if not is_plain:
        labels_BT[:, :5] = IGNORED
        weights_B = np.array([0.5, 2.0, 1.0], dtype=np.float32)
        examples = replace(examples, labels_BT=labels_BT, weights_B=weights_B)
    model, flat = build(spec)
    step = MicroStep(model, flat, precision=precision)
    expected, grads = step.run(examples), flat.grads.clone()
    monkeypatch.setattr(loss_module, "MAX_WHOLE_LOGITS", 0)
    monkeypatch.setattr(loss_module, "PIECE_LOGITS", 7 * spec.vocab_size)  # does not divide
    found = step.run(examples)
    tolerance = 2e-6 if precision is Precision.FP32 else 2e-2
    assert found.total_nats == pytest.approx(expected.total_nats, rel=tolerance)
    assert float((flat.grads - grads).norm() / grads.norm()) <= tolerance
    flat.values[3] = np.nan
    assert not step.run(examples).is_finite


PEAK = """
import resource, torch
from peer.model.loss import {name}
hidden = torch.randn(1, 4096, 8, requires_grad=True)
weight = torch.randn(65536, 8, requires_grad=True)
labels = torch.zeros((1, 4096), dtype=torch.long)
{loss}.backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_logits_are_never_in_memory_at_once() -> None:
    """They are 1 GiB; a piece is 64 MiB, and a few of them are worked on."""
    peaks_kib = [
        int(subprocess.run([sys.executable, "-c", PEAK.format(name=name, loss=loss)],
                           capture_output=True, text=True, check=True).stdout)
        for name, loss in (
            ("pieced_loss", "pieced_loss(hidden, weight, labels)"),
            ("summed_loss", "summed_loss(hidden @ weight.t(), labels)"),
        )
    ]  # fmt: skip
    assert peaks_kib[0] < 2**20 and peaks_kib[1] > 2 * 2**20, peaks_kib


def test_a_head_that_is_not_trained_gets_no_gradient() -> None:
    hidden, weight = torch.randn(2, 5, 4, requires_grad=True), torch.randn(9, 4)
    labels = torch.arange(10).view(2, 5) % 9
    loss_module.pieced_loss(hidden, weight, labels).backward()
    found = hidden.grad.clone()
    hidden.grad = None
    loss_module.summed_loss(hidden @ weight.t(), labels).backward()
    assert torch.allclose(found, hidden.grad, atol=1e-5) and weight.grad is None
