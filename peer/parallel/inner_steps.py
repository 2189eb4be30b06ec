"""Inner optimizer steps (diloco) on one device's flat parameters; the other layouts make the same
steps on their shards (engine.py).
"""

from typing import Protocol

import torch

from peer.model.decoder import Decoder, FlatParameters
from peer.model.inner_optimizer import InnerOptimizer
from protos.contract.run_spec import OptimizerSpec


class InnerSteps(Protocol):
    """Takes in micro-batch gradients and makes steps of them."""

    def add_grads(self, *, is_first: bool, is_whole: bool) -> None:
        """Take in the gradient of a micro-batch: the first of a step, and the last if whole."""
        ...

    def step(self, *, num_tokens: int, learning_rate: float) -> None:
        """Divide the sum by its tokens, clip, one step of the spec's optimizer."""
        ...


class FlatInnerSteps:
    """InnerSteps of a whole model on one device."""

    def __init__(self, spec: OptimizerSpec, model: Decoder, parameters: FlatParameters) -> None:
        self._spec, self._grads = spec, parameters.grads
        self._optimizer = InnerOptimizer(spec, list(model.named_parameters()))
        self._summed: torch.Tensor | None = None
        self._is_summed = False

    def add_grads(self, *, is_first: bool, is_whole: bool) -> None:
        """A step of one micro-batch needs no second buffer."""
        if not is_first:
            assert self._summed is not None
            self._summed.add_(self._grads)
        elif not is_whole:
            if self._summed is None:
                self._summed = torch.empty_like(self._grads)
            self._summed.copy_(self._grads)
        self._is_summed = not (is_first and is_whole)

    def step(self, *, num_tokens: int, learning_rate: float) -> None:
        """See InnerSteps."""
        grads = self._grads
        if self._is_summed:
            assert self._summed is not None
            grads.copy_(self._summed)
        grads.div_(num_tokens)
        norm = float(torch.linalg.vector_norm(grads))
        clip = self._spec.clip_norm / (norm + 1e-6)
        if clip < 1.0:
            grads.mul_(clip)
        self._optimizer.step(lr=learning_rate)
