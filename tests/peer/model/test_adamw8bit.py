"""AdamW with moments of a byte: its code, its steps beside torch's, and what it takes."""

import pytest
import torch
from torch import nn

from peer.model.adamw8bit import STATE_BYTES, AdamW8bit, decode, encode
from protos.contract.run_spec import OptimizerSpec

SPEC = OptimizerSpec(name="adamw8bit", peak_lr=1e-2, weight_decay=0.1)


def torchs(parameter: nn.Parameter) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        [parameter], lr=SPEC.peak_lr, betas=(SPEC.beta1, SPEC.beta2), eps=SPEC.epsilon,
        weight_decay=SPEC.weight_decay,
    )  # fmt: skip


@pytest.mark.parametrize(("num_levels", "decades"), [(127, 5), (255, 10)])
def test_a_level_is_near_and_its_mean_is_the_value(num_levels: int, decades: int) -> None:
    generator = torch.Generator().manual_seed(0)
    values = 10 ** -(decades * torch.rand((1, 256), generator=generator).double())
    values = (7 * values / values.amax()).float()
    found = []
    for _ in range(2000):
        uniform = torch.rand(values.shape, generator=generator)
        levels, scales = encode(values, uniform, num_levels=num_levels, is_kept=False)
        assert levels.max() == num_levels and levels.min() >= 0
        found.append(decode(levels, scales, num_levels=num_levels) / values)
    ratios = torch.stack(found)
    assert ((ratios - 1).abs() < 0.1).all()
    assert ((ratios.mean(dim=0) - 1).abs() < 0.005).all()


def test_what_is_too_small_is_zero_or_the_least_without_bias_unless_it_is_kept() -> None:
    values = torch.tensor([[1.0, 1e-7, 0.0, 2e-15]]).repeat(20_000, 1)
    uniform = torch.rand(values.shape, generator=torch.Generator().manual_seed(1))
    levels, scales = encode(values, uniform, num_levels=127, is_kept=False)
    small = decode(levels, scales, num_levels=127)[:, 1]
    assert set(levels[:, 1].tolist()) == {0.0, 1.0}
    assert float(small.mean()) == pytest.approx(1e-7, rel=0.25)
    levels, scales = encode(values, uniform, num_levels=255, is_kept=True)
    assert levels[0].tolist()[0] == 255 and levels[0, 2] == 0 and (levels[:, 3] == 1).all()
    nothing = torch.zeros(2, 256)
    levels, scales = encode(nothing, nothing, num_levels=255, is_kept=True)
    assert not decode(levels, scales, num_levels=255).any()


def test_steps_are_near_those_of_torch_and_the_first_is_the_same() -> None:
    generator = torch.Generator().manual_seed(2)
    begin = torch.randn((700, 403), generator=generator)  # a rest of a block, and of a slice
    ours, theirs = nn.Parameter(begin.clone()), nn.Parameter(begin.clone())
    optimizers = AdamW8bit(SPEC, [ours]), torchs(theirs)
    spread = 10 ** torch.empty(begin.shape).uniform_(-3, 0, generator=generator)
    for step in range(20):
        grad = (torch.randn(begin.shape, generator=generator) + 0.5) * spread
        ours.grad, theirs.grad = grad.clone(), grad
        for optimizer in optimizers:
            optimizer.step()
        if step == 0:
            assert torch.allclose(ours, theirs, atol=1e-6)
    moved, wanted = (ours - begin).detach(), (theirs - begin).detach()
    assert float((moved - wanted).norm() / wanted.norm()) < 0.05
    state = sum(t.numel() * t.element_size() for t in optimizers[0].state[ours].values())
    assert state / begin.numel() == pytest.approx(STATE_BYTES, rel=0.01) and STATE_BYTES < 2.1


def test_a_second_moment_comes_down_again() -> None:
    """Rounded to the nearest level it would stay where it was for ever."""
    parameter = nn.Parameter(torch.zeros(2, 256))
    spec = OptimizerSpec(name="adamw8bit", beta2=0.999)
    optimizer = AdamW8bit(spec, [parameter])
    for step in range(301):
        parameter.grad = torch.full((2, 256), 1.0 if step == 0 else 0.0)
        parameter.grad[:, 0] = 3.0  # keeps the scale up
        optimizer.step()
    state = optimizer.state[parameter]
    second = decode(state["second"].float(), state["second_scales"], num_levels=255)
    assert float(second[:, 1:].mean()) == pytest.approx(1e-3 * 0.999**300, rel=0.05)
