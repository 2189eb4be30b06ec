"""What goes on inside: size of activations and gradients of each layer in one micro-batch.

Forward hooks look at what embedding, layers and final norm put out; gradients are read from the
parameters afterwards. Nothing is kept but a few sums, and nothing runs unless a probe is entered,
so training without one costs nothing; with one, a micro-batch costs two passes over its
activations.

What is kept are sums, so those of the parts of a model on several devices add up to the whole's.

Letters: B sequences, T positions, D model width.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from torch import Tensor, nn

from peer.model.decoder import Decoder

EMBEDDING, NORM = "embedding", "norm"
Sums = tuple[float, float, int]
"""Of values: squares, largest absolute value, how many."""
_NOTHING: Sums = (0.0, 0.0, 0)


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


def sums_of(values: Tensor) -> Sums:
    """Of one tensor."""
    if not values.numel():
        return _NOTHING
    values = values.float()
    return float(values.square().sum()), float(values.abs().max()), values.numel()


def _added(one: Sums, other: Sums) -> Sums:
    return one[0] + other[0], max(one[1], other[1]), one[2] + other[2]


def merged(parts: Iterable[Mapping[str, Sums]]) -> dict[str, Sums]:
    """Sums of each layer over what several ranks have seen of it."""
    whole: dict[str, Sums] = {}
    for part in parts:
        for layer, sums in part.items():
            whole[layer] = _added(whole.get(layer, _NOTHING), sums)
    return whole


def gradient_sums(grads: Iterable[tuple[str, Tensor]]) -> dict[str, Sums]:
    """Sums of each layer from gradients by the names of their parameters."""
    by_kind = {"tok_embeddings": EMBEDDING, "norm": NORM}
    found = []
    for name, grad in grads:
        kind, _, rest = name.partition(".")
        layer = rest.split(".")[0] if kind == "layers" else by_kind.get(kind)
        if layer is not None:  # the head's own matrix is no layer
            found.append({layer: sums_of(grad)})
    return merged(found)


def layer_stats(
    activations: Mapping[str, Sums], gradients: Mapping[str, Sums], *, num_tokens: int
) -> tuple[LayerStats, ...]:
    """From the first layer to the last."""
    numbers = sorted((layer for layer in activations if layer.isdecimal()), key=int)
    stats = []
    for layer in (EMBEDDING, *numbers, NORM):
        (out, out_max), (grad, grad_max) = (
            (math.sqrt(squares / count), largest) if count else (math.nan, math.nan)
            for squares, largest, count in (
                sums.get(layer, _NOTHING) for sums in (activations, gradients)
            )
        )
        stats.append(
            LayerStats(
                layer=layer,
                activation_rms=out,
                activation_max=out_max,
                gradient_rms=grad / num_tokens,
                gradient_max=grad_max / num_tokens,
            )
        )
    return tuple(stats)


class LayerProbe:
    """Watches a model, or a rank's parts of one, while entered; `stats` afterwards."""

    def __init__(self, *parts: Decoder, looks_always: bool = True) -> None:
        """Without `looks_always` only what passes within `looking_at` counts."""
        self.activations: dict[str, Sums] = {}
        self._parts = parts
        self._looks_always = self._is_looking = looks_always
        self._windows_B: Tensor | None = None
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        self.activations.clear()
        for part in self._parts:
            layers = list(part.layers.items())
            if part.part.is_first:  # looked up without calling the module in some layouts
                hook = layers[0][1].register_forward_pre_hook(self._before_first)
                self._handles.append(hook)
            watched = [*layers, (NORM, part.norm)] if part.part.is_last else layers
            for name, module in watched:
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
        self._handles.clear()

    @contextmanager
    def looking_at(self, windows_B: Tensor) -> Iterator[None]:
        """What passes now counts, of the windows for which `windows_B` is true."""
        self._windows_B, self._is_looking = windows_B, True
        try:
            yield
        finally:
            self._windows_B, self._is_looking = None, self._looks_always

    def stats(self, *, num_tokens: int) -> tuple[LayerStats, ...]:
        """From the first layer to the last, of what passed since entering."""
        grads = (
            (name, parameter.grad)
            for part in self._parts
            for name, parameter in part.named_parameters()
            if parameter.grad is not None
        )
        return layer_stats(self.activations, gradient_sums(grads), num_tokens=num_tokens)

    def _before_first(self, _module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._note(EMBEDDING, inputs[0])

    def _hook(self, name: str) -> Any:
        def note(_module: nn.Module, _inputs: Any, out_BTD: Tensor) -> None:
            self._note(name, out_BTD)

        return note

    def _note(self, name: str, x_BTD: Tensor) -> None:
        if not self._is_looking:
            return
        values = x_BTD.detach()
        if hasattr(values, "to_local"):  # a share of the positions
            values = values.to_local()
        if self._windows_B is not None:
            values = values[self._windows_B]
        before = self.activations.get(name, _NOTHING)
        self.activations[name] = _added(before, sums_of(values))
