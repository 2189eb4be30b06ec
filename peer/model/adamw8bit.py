"""AdamW whose two moments take a byte a value each, instead of four.

Block-wise 8-bit states (Dettmers et al. 2022, arXiv 2110.02861, section 2.1): 256 neighbours share
one fp32 scale, the largest of their magnitudes. Two things differ from the paper. Levels are
logarithmic, 25 to the decade, so the relative error is the same for all (10 % at most): second
moments cover 10 decades below the scale, first moments 5 and the sign. And rounding is stochastic
and without bias, because a second moment loses some percent a step at most: rounded to the nearest
level it would never come down again. One that is not zero is never rounded to zero, so no value
takes a step that is divided by epsilon alone.

The step itself is made with moments that are not rounded yet, block by block with temporaries of a
bounded size, by torch's elementwise operations: it runs on every device, but on a CPU takes 25
times as long as fused AdamW (40 ns a value), so it is meant for GPUs. Vectors keep fp32 moments
(InnerOptimizer). It is for inner steps, whose moments are a peer's own: random numbers and device
decide the last bits.

Letters: N blocks, K = 256 values of a block.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from protos.contract.run_spec import OptimizerSpec

BLOCK_VALUES = 256
STATE_BYTES = 2 * (1 + 4 / BLOCK_VALUES)
"""Of both moments of one value."""
_LEVELS_PER_DECADE = 25
_LOG_STEP = math.log(10) / _LEVELS_PER_DECADE
_GROWTH = math.expm1(_LOG_STEP)
"""From one level to the next, relative."""
_FIRST_LEVELS, _SECOND_LEVELS = 127, 255
_TINY = 1e-37
_SLICE_BLOCKS = {"cpu": 2**10}
"""Worked on at once: what stays in a CPU's cache."""
_MANY_BLOCKS = 2**14


def encode(
    values_NK: Tensor, uniform_NK: Tensor, *, num_levels: int, is_kept: bool
) -> tuple[Tensor, Tensor]:
    """(levels 0 to `num_levels` as floats, scales_N1) of magnitudes; `uniform_NK` in [0, 1) decides
    which of two neighbours it is, so that the mean is the value. `is_kept`: what is not 0 is at
    least the smallest level.
    """
    scales_N1 = values_NK.amax(dim=1, keepdim=True)
    ratios = values_NK / scales_N1.clamp_min(_TINY)
    places = ratios.clamp_min(_TINY).log_().div_(_LOG_STEP).add_(num_levels)
    levels = places.floor()
    chances = places.sub_(levels).mul_(_LOG_STEP).expm1_().div_(_GROWTH)
    levels += uniform_NK < chances
    smallest = math.exp(_LOG_STEP * (1 - num_levels))
    if is_kept:
        levels = torch.where(values_NK > 0, levels.clamp_(1, num_levels), 0.0)
    else:
        is_least = (uniform_NK < ratios / smallest).float()
        levels = torch.where(ratios < smallest, is_least, levels.clamp_(1, num_levels))
    return levels, scales_N1


def decode(levels_NK: Tensor, scales_N1: Tensor, *, num_levels: int) -> Tensor:
    """Magnitudes of levels."""
    values = ((levels_NK - num_levels) * _LOG_STEP).exp_().mul_(scales_N1)
    return torch.where(levels_NK > 0, values, 0.0)


class AdamW8bit(torch.optim.Optimizer):
    """AdamW with decoupled decay of all that it is given; parameters must be contiguous."""

    def __init__(self, spec: OptimizerSpec, parameters: Iterable[nn.Parameter]) -> None:
        """Moments are zero."""
        super().__init__(parameters, {"lr": spec.peak_lr})
        self._spec = spec
        self._num_steps = 0
        self._generators: dict[torch.device, torch.Generator] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step on the gradients that lie in the parameters."""
        assert closure is None
        self._num_steps += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.numel():
                    self._step(parameter, lr=float(group["lr"]))

    def _step(self, parameter: nn.Parameter, *, lr: float) -> None:
        values, grads = parameter.view(-1), parameter.grad.reshape(-1)  # type: ignore[union-attr]
        state = self.state[parameter]
        if not state:
            num_blocks = -(-values.numel() // BLOCK_VALUES)
            for name, dtype in (("first", torch.int8), ("second", torch.uint8)):
                shape = num_blocks, BLOCK_VALUES
                state[name] = torch.zeros(shape, dtype=dtype, device=values.device)
                state[f"{name}_scales"] = torch.zeros((num_blocks, 1), device=values.device)
        size = BLOCK_VALUES * _SLICE_BLOCKS.get(values.device.type, _MANY_BLOCKS)
        for begin in range(0, values.numel(), size):
            part, grad = values[begin : begin + size], grads[begin : begin + size]
            blocks = slice(begin // BLOCK_VALUES, -(-(begin + part.numel()) // BLOCK_VALUES))
            update = self._update(
                F.pad(grad.float(), (0, -part.numel() % BLOCK_VALUES)).view(-1, BLOCK_VALUES),
                {name: tensor[blocks] for name, tensor in state.items()},
            )
            part.mul_(1 - lr * self._spec.weight_decay)
            part.sub_(update.view(-1)[: part.numel()], alpha=lr)

    def _update(self, grads_NK: Tensor, state: dict[str, Tensor]) -> Tensor:
        """Fold a gradient into the moments; returns what lr multiplies."""
        spec = self._spec
        sign_and_level = state["first"].float()
        first = decode(sign_and_level.abs(), state["first_scales"], num_levels=_FIRST_LEVELS)
        first = first.copysign_(sign_and_level).lerp_(grads_NK, 1 - spec.beta1)
        second = decode(
            state["second"].float(), state["second_scales"], num_levels=_SECOND_LEVELS
        ).lerp_(grads_NK.square(), 1 - spec.beta2)
        for name, moment, num_levels in (
            ("first", first, _FIRST_LEVELS),
            ("second", second, _SECOND_LEVELS),
        ):
            levels, scales_N1 = encode(
                moment.abs(),
                self._uniform(moment),
                num_levels=num_levels,
                is_kept=name == "second",
            )
            state[name].copy_(levels.copysign_(moment))
            state[f"{name}_scales"].copy_(scales_N1)
        root = second.div_(1 - spec.beta2**self._num_steps).sqrt_().add_(spec.epsilon)
        return first.div_(1 - spec.beta1**self._num_steps).div_(root)

    def _uniform(self, like: Tensor) -> Tensor:
        if like.device not in self._generators:
            self._generators[like.device] = torch.Generator(like.device).manual_seed(0)
        generator = self._generators[like.device]
        return torch.rand(like.shape, generator=generator, device=like.device)
