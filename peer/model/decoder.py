"""Llama-family decoder whose parameters are views into one flat fp32 vector.

Names and shapes are exactly ModelShape.parameter_table(), and the flat vector is the canonical one,
so loading a state is one copy and collecting a gradient is one copy. A tied head is the embedding
matrix used twice; autograd adds both uses into its one gradient.

A `DecoderPart` is a run of layers, with the embedding if it holds the first and the head if it has
the last: what one pipeline stage builds. Names stay those of the whole model.

Letters: B sequences, T positions, D model width, F MLP width, V vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peer.model.attention import Attention, Embedding, Linear, Weight, rope_tables
from peer.model.masks import attention_mask
from protos.contract.digest import Float32Vector
from protos.contract.model_shape import ModelShape
from protos.contract.run_spec import ModelSpec

_Filled = TypeVar("_Filled")
KeyValueCache = list[list[Tensor]]
"""For each layer nothing yet, or its keys_BGSK and values_BGSK."""
HeadUse = Callable[[Tensor, Tensor], Tensor]
"""What to make of the normed hidden_BTD and the head's weight_VD instead of logits."""


class Norm(Weight):
    """RMSNorm, computed in fp32 (Zhang and Sennrich 2019)."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec.d_model)
        self.epsilon = spec.norm_epsilon

    def forward(self, x_BTD: Tensor) -> Tensor:
        x = x_BTD.float()
        return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.epsilon) * self.weight


class Mlp(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x) (Shazeer 2020)."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.w1 = Linear(spec.d_ff, spec.d_model)
        self.w3 = Linear(spec.d_ff, spec.d_model)
        self.w2 = Linear(spec.d_model, spec.d_ff)

    def forward(self, x_BTD: Tensor) -> Tensor:
        out_BTD: Tensor = self.w2(F.silu(self.w1(x_BTD)) * self.w3(x_BTD))
        return out_BTD


class Layer(nn.Module):
    """Pre-norm attention and MLP around the residual stream."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.attention_norm = Norm(spec)
        self.attention = Attention(spec)
        self.mlp_norm = Norm(spec)
        self.mlp = Mlp(spec)

    def forward(
        self,
        x_BTD: Tensor,
        rope: tuple[Tensor, Tensor],
        mask_TS: Tensor,
        cache: list[Tensor] | None,
        *,
        is_causal: bool,
    ) -> Tensor:
        normed_BTD = self.attention_norm(x_BTD)
        x_BTD = x_BTD + self.attention(normed_BTD, rope, mask_TS, cache, is_causal=is_causal)
        mlp_BTD: Tensor = self.mlp(self.mlp_norm(x_BTD))
        return x_BTD + mlp_BTD


class Head(nn.Module):
    """Logits of the normed residual stream; the matrix is another module's parameter."""

    def forward(self, x_BTD: Tensor, weight_VD: Tensor) -> Tensor:
        return F.linear(x_BTD, weight_VD)


@dataclass(frozen=True, slots=True)
class DecoderPart:
    """Layers begin to end (excluded) of a model of `num_layers`."""

    begin: int
    end: int
    num_layers: int

    @property
    def is_first(self) -> bool:
        """It looks tokens up."""
        return self.begin == 0

    @property
    def is_last(self) -> bool:
        """It gives logits."""
        return self.end == self.num_layers


class Decoder(nn.Module):
    """The model, or a part of it; usable once FlatParameters or a layout has given it memory."""

    def __init__(
        self,
        spec: ModelSpec,
        *,
        device: torch.device | None = None,
        part: DecoderPart | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.part = part or DecoderPart(0, spec.num_layers, spec.num_layers)
        self.has_checkpointing = False
        """Keep only the input of each layer for the backward pass, and compute the rest again."""
        device = torch.device("cpu") if device is None else device
        has_tied_head = self.part.is_last and spec.has_tied_embeddings
        if self.part.is_first or has_tied_head:
            self.tok_embeddings = Embedding(spec.vocab_size, spec.d_model)
        indices = range(self.part.begin, self.part.end)
        self.layers = nn.ModuleDict({str(index): Layer(spec) for index in indices})
        if self.part.is_last:
            self.norm = Norm(spec)
            self.head = Head()
            if not spec.has_tied_embeddings:
                self.output = Weight(spec.vocab_size, spec.d_model)
        self._rope = rope_tables(spec, num_positions=spec.seq_len, device=device)
        self._mask_TT = attention_mask(spec.seq_len, device=device)

    def forward(
        self,
        tokens_BT: Tensor,
        cache: KeyValueCache | None = None,
        mask: Tensor | None = None,
        head: HeadUse | None = None,
    ) -> Tensor:
        """Logits_BTV of the next token at each position; with a cache, of the T positions after the
        cached ones; or what `head` makes in their place.

        At most seq_len positions in all. `mask`: mask_TS or mask_BTS of peer/model/masks.py instead
        of the causal one, S being all positions so far.
        """
        begin = cache[0][0].shape[2] if cache is not None and cache[0] else 0
        end = begin + tokens_BT.shape[1]
        x_BTD = self.run_layers(self.tok_embeddings(tokens_BT), begin, end, cache, mask)
        return self.logits(x_BTD) if head is None else head(self.norm(x_BTD), self.head_weight)

    def run_layers(
        self,
        x_BTD: Tensor,
        begin: int,
        end: int,
        cache: KeyValueCache | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """This part's layers on positions begin to end (excluded)."""
        assert end <= self.spec.seq_len, f"{end} positions; the model has {self.spec.seq_len}"
        rope = (self._rope[0][begin:end], self._rope[1][begin:end])
        is_causal = mask is None and cache is None
        mask_TS = self._mask_TT[begin:end, :end] if mask is None else mask
        for index, layer in enumerate(self.layers.values()):
            layer_cache = None if cache is None else cache[index]
            if self.has_checkpointing and torch.is_grad_enabled():
                x_BTD = checkpoint(
                    layer, x_BTD, rope, mask_TS, None, is_causal=is_causal, use_reentrant=False
                )
            else:
                x_BTD = layer(x_BTD, rope, mask_TS, layer_cache, is_causal=is_causal)
        return x_BTD

    def logits(self, x_BTD: Tensor) -> Tensor:
        """Logits_BTV of the last layer's output."""
        logits_BTV: Tensor = self.head(self.norm(x_BTD), self.head_weight)
        return logits_BTV

    @property
    def head_weight(self) -> nn.Parameter:
        """weight_VD of the output head, which may be the embedding."""
        is_tied = self.spec.has_tied_embeddings
        weight: nn.Parameter = (self.tok_embeddings if is_tied else self.output).weight
        return weight

    def empty_cache(self) -> KeyValueCache:
        """A cache that holds nothing yet."""
        return [[] for _ in range(self.spec.num_layers)]


class FlatParameters:
    """One flat fp32 vector for a decoder's parameters and, if asked for, one for its gradients."""

    def __init__(
        self,
        model: Decoder,
        *,
        device: torch.device | None = None,
        has_grads: bool = True,
        values: Tensor | None = None,
    ) -> None:
        """Give the model memory: its parameters become views of `values` (zeros if not given)."""
        table = ModelShape.from_spec(model.spec).parameter_table()
        num_values = sum(math.prod(shape) for _, shape in table)
        device = torch.device("cpu") if device is None else device
        self.values = torch.zeros(num_values, device=device) if values is None else values
        assert self.values.numel() == num_values and self.values.dtype == torch.float32
        self.grads = torch.zeros(num_values if has_grads else 0, device=device)
        offset = 0
        for name, shape in table:
            end = offset + math.prod(shape)
            parameter = nn.Parameter(self.values[offset:end].view(shape), requires_grad=has_grads)
            if has_grads:
                parameter.grad = self.grads[offset:end].view(shape)
            model.get_submodule(name.removesuffix(".weight")).weight = parameter
            offset = end
        assert [name for name, _ in table] == [name for name, _ in model.named_parameters()]

    # What a strategy asks of parameters (peer/swarm/strategy.py: TrainedParameters).

    def load(self, fill: Callable[[Float32Vector], _Filled]) -> _Filled:
        """Have `fill` write all values, canonical order; returns what it returns."""
        if self.values.device.type == "cpu":
            return fill(self.values.detach().numpy())
        host = torch.empty(self.values.numel(), dtype=torch.float32)
        filled = fill(host.numpy())
        self.values.copy_(host)
        return filled

    def host_values(self) -> Float32Vector:
        """All values, canonical order; on CPU the very memory of the model."""
        values: Float32Vector = self.values.detach().cpu().numpy()
        return values

    def add_grads_to(self, total: Float32Vector) -> None:
        """Add the micro-batch's gradient."""
        np.add(total, self.grads.cpu().numpy(), out=total)

    def collect_grads(self, total: Float32Vector) -> None:
        """`total` holds them already."""

    def forget_grads(self) -> None:
        """The next micro-batch replaces them."""
