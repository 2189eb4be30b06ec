"""Llama-family decoder whose parameters are views into one flat fp32 vector.

Names and shapes are exactly ModelShape.parameter_table(), and the flat vector is the canonical one,
so loading a state is one copy and collecting a gradient is one copy. A tied head is the embedding
matrix used twice; autograd adds both uses into its one gradient.

Letters: B sequences, T positions, D model width, F MLP width, V vocabulary.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peer.model.attention import Attention, Weight, rope_tables
from peer.model.masks import attention_mask
from protos.contract.model_shape import ModelShape
from protos.contract.run_spec import ModelSpec

KeyValueCache = list[list[Tensor]]
"""For each layer nothing yet, or its keys_BGSK and values_BGSK."""


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
        self.w1 = Weight(spec.d_ff, spec.d_model)
        self.w3 = Weight(spec.d_ff, spec.d_model)
        self.w2 = Weight(spec.d_model, spec.d_ff)

    def forward(self, x_BTD: Tensor) -> Tensor:
        gate_BTF = F.silu(F.linear(x_BTD, self.w1.weight))
        return F.linear(gate_BTF * F.linear(x_BTD, self.w3.weight), self.w2.weight)


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


class Decoder(nn.Module):
    """The model; usable once FlatParameters has given it memory."""

    def __init__(self, spec: ModelSpec, *, device: torch.device | None = None) -> None:
        super().__init__()
        self.spec = spec
        device = torch.device("cpu") if device is None else device
        self.tok_embeddings = Weight(spec.vocab_size, spec.d_model)
        self.layers = nn.ModuleDict({str(index): Layer(spec) for index in range(spec.num_layers)})
        self.norm = Norm(spec)
        if not spec.has_tied_embeddings:
            self.output = Weight(spec.vocab_size, spec.d_model)
        self._rope = rope_tables(spec, num_positions=spec.seq_len, device=device)
        self._mask_TT = attention_mask(spec.seq_len, device=device)

    def forward(
        self, tokens_BT: Tensor, cache: KeyValueCache | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Logits_BTV of the next token at each position; with a cache, of the T positions after the
        cached ones.

        At most seq_len positions in all. `mask`: mask_TS or mask_BTS of peer/model/masks.py instead
        of the causal one, S being all positions so far.
        """
        begin = cache[0][0].shape[2] if cache is not None and cache[0] else 0
        end = begin + tokens_BT.shape[1]
        assert end <= self.spec.seq_len, f"{end} positions; the model has {self.spec.seq_len}"
        rope = (self._rope[0][begin:end], self._rope[1][begin:end])
        is_causal = mask is None and cache is None
        mask_TS = self._mask_TT[begin:end, :end] if mask is None else mask
        x_BTD = F.embedding(tokens_BT, self.tok_embeddings.weight)
        for index, layer in enumerate(self.layers.values()):
            layer_cache = None if cache is None else cache[index]
            x_BTD = layer(x_BTD, rope, mask_TS, layer_cache, is_causal=is_causal)
        is_tied = self.spec.has_tied_embeddings
        head = self.tok_embeddings.weight if is_tied else self.output.weight
        return F.linear(self.norm(x_BTD), head)

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
