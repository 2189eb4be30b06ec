"""What goes on inside: size of activations and gradients of each layer in one micro-batch.

Forward hooks look at what embedding, layers and final norm put out; gradients are read from the
parameters afterwards. Nothing is kept but a few sums, and nothing runs unless a probe is entered,
so training without one costs nothing; with one, a micro-batch costs two passes over its
activations.

Letters: B sequences, T positions, D model width.
"""

import math
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from peer.model.decoder import Decoder

EMBEDDING, NORM = "embedding", "norm"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerStats:
    """One layer in one micro-batch. Gradients are those of the summed loss, divided by its tokens;
    nan where there was no backward pass.
    """

    layer: str
    """Index of the layer, or embedding, or norm."""
    activation_rms: float
    activation_max: float
    """Largest absolute value of what it put out."""
    gradient_rms: float
    gradient_max: float


class LayerProbe:
    """Watches a model while entered; `stats` afterwards."""

    def __init__(self, model: Decoder) -> None:
        self._modules: dict[str, nn.Module] = {EMBEDDING: model.tok_embeddings}
        self._modules |= dict(model.layers.items())
        self._modules[NORM] = model.norm
        self._seen: dict[str, tuple[float, float, int]] = {}
        self._handles: list[Any] = []
        self._model = model

    def __enter__(self) -> Self:
        self._seen.clear()
        first = next(iter(self._model.layers.values()))
        self._handles = [first.register_forward_pre_hook(self._before_first)]
        for name, module in self._modules.items():
            if name != EMBEDDING:  # looked up without calling the module in some layouts
                self._handles.append(module.register_forward_hook(self._hook(name)))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def stats(self, *, num_tokens: int) -> tuple[LayerStats, ...]:
        """From the first layer to the last, of what passed since entering."""
        found = []
        for name, module in self._modules.items():
            square_sum, largest, count = self._seen.get(name, (math.nan, math.nan, 1))
            grads = [p.grad for p in module.parameters() if p.grad is not None]
            num_values = sum(grad.numel() for grad in grads)
            grad_squares = sum(float(grad.double().square().sum()) for grad in grads)
            grad_max = max((float(grad.abs().max()) for grad in grads), default=math.nan)
            found.append(
                LayerStats(
                    layer=name,
                    activation_rms=math.sqrt(square_sum / count),
                    activation_max=largest,
                    gradient_rms=math.sqrt(grad_squares / num_values) / num_tokens
                    if num_values
                    else math.nan,
                    gradient_max=grad_max / num_tokens,
                )
            )
        return tuple(found)

    def _before_first(self, _module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._note(EMBEDDING, inputs[0])

    def _hook(self, name: str) -> Any:
        def note(_module: nn.Module, _inputs: Any, out_BTD: Tensor) -> None:
            self._note(name, out_BTD)

        return note

    def _note(self, name: str, x_BTD: Tensor) -> None:
        with torch.no_grad():
            values = x_BTD.detach().float()
            before, largest, count = self._seen.get(name, (0.0, 0.0, 0))
            self._seen[name] = (
                before + float(values.square().sum()),
                max(largest, float(values.abs().max())),
                count + values.numel(),
            )
