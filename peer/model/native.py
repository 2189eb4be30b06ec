"""Forward and backward of the whole decoder by hand, for CPUs: torch's matrix products, and
kernels.c for everything between them.

Why not autograd: on a CPU with fast bf16 products half of an eager step goes into element-wise
passes over memory, and the products of weight gradients, whose inputs both come transposed, run at
a third of the speed of the others. Here each pass does all that can be done to a row while it is in
the cache, one input of those products is transposed first, causal attention leaves out the upper
blocks of the scores, the residual stream stays fp32 without copies, logits exist for a few hundred
tokens at a time, and each gradient is written once, straight into the flat vector. Arithmetic is
that of the reference (Decoder under autocast), which tests compare it with.

Letters: B sequences, T positions, N = B * T, D model width, H query heads, G key/value heads, R = H
/ G, K head width, M positions of a block of queries, F MLP width, V vocabulary.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from peer.model.attention import rope_tables
from peer.model.decoder import Decoder, FlatParameters
from peer.model.kernels import MAX_POSITIONS, Kernels
from protos.contract.model_shape import ModelShape

LOGITS_BYTES = 16 * 2**20
"""Most bytes of logits at a time."""
_MIN_LOGIT_ROWS = 128
_QUERY_BLOCK = 128
_GAIN_PARTS = 16
_STRIDE_PADDING = 32
"""Values behind each row of a transposed matrix: rows a power of two apart share cache sets."""


@dataclass(frozen=True, slots=True)
class _LayerWeights:
    """Views of a flat vector; wqkv holds wq, wk, wv one after another, w13 w1 and w3."""

    attention_norm: Tensor
    wqkv: Tensor
    wo: Tensor
    mlp_norm: Tensor
    w13: Tensor
    w2: Tensor


@dataclass(frozen=True, slots=True)
class _Weights:
    embedding: Tensor
    layers: list[_LayerWeights]
    norm: Tensor
    head: Tensor


@dataclass(frozen=True, slots=True)
class _Saved:
    """What the backward pass of a layer reads."""

    x: Tensor
    x_rsqrt: Tensor
    normed: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    ratios: list[Tensor]
    merged: Tensor
    middle: Tensor
    middle_rsqrt: Tensor
    middle_normed: Tensor
    gate_up: Tensor
    hidden: Tensor


def _views(flat: Tensor, shape: ModelShape) -> _Weights:
    offset = 0
    by_name: dict[str, tuple[int, tuple[int, ...]]] = {}
    for name, dimensions in shape.parameter_table():
        by_name[name.removesuffix(".weight")] = (offset, dimensions)
        offset += torch.Size(dimensions).numel()

    def view(*names: str) -> Tensor:
        begin, first = by_name[names[0]]
        for one, following in pairwise(names):
            at, dimensions = by_name[one]
            assert by_name[following][0] == at + torch.Size(dimensions).numel()
        rows = sum(by_name[name][1][0] for name in names)
        dimensions = (rows, *first[1:])
        return flat[begin : begin + torch.Size(dimensions).numel()].view(dimensions)

    layers = []
    for index in range(shape.num_layers):
        at = f"layers.{index}."
        layers.append(
            _LayerWeights(
                view(at + "attention_norm"),
                view(*(f"{at}attention.{name}" for name in ("wq", "wk", "wv"))),
                view(at + "attention.wo"),
                view(at + "mlp_norm"),
                view(at + "mlp.w1", at + "mlp.w3"),
                view(at + "mlp.w2"),
            )
        )
    embedding = view("tok_embeddings")
    head = view("output") if "output" in by_name else embedding
    return _Weights(embedding, layers, view("norm"), head)


class NativeDecoder:
    """The training step of a decoder on CPU; `run` leaves the gradients in the flat vector."""

    def __init__(self, model: Decoder, parameters: FlatParameters, kernels: Kernels) -> None:
        self._spec, self._call, self._parameters = model.spec, kernels, parameters
        self._dtype = kernels.dtype
        shape = ModelShape.from_spec(model.spec)
        self._gains = _views(parameters.values, shape)
        self._grads = _views(parameters.grads, shape)
        is_fp32 = self._dtype is torch.float32
        self._values = (
            parameters.values if is_fp32 else torch.empty_like(parameters.values, dtype=self._dtype)
        )
        self._weights = _views(self._values, shape)
        device = parameters.values.device
        self._cos, self._sin = rope_tables(
            model.spec, num_positions=model.spec.seq_len, device=device
        )
        self._B = self._T = 0
        self._mask: Tensor | None = None

    @torch.no_grad()
    def run(
        self,
        inputs_BT: Tensor,
        labels_BT: Tensor,
        weights_B: Tensor | None,
        mask: Tensor | None,
    ) -> float:
        """Summed loss in nats; the gradients of it replace those in the flat vector."""
        self._B, self._T = inputs_BT.shape
        longest = min(self._spec.seq_len, MAX_POSITIONS)
        assert longest >= self._T
        self._mask = None if mask is None else mask.float().contiguous()
        if self._values is not self._parameters.values:
            count = self._values.numel()
            self._call("cast", self._parameters.values, self._values, count, 1)
        x = self._gains.embedding[inputs_BT.flatten()]
        saved, pending = [], None
        for index in range(self._spec.num_layers):
            one, pending = self._layer(index, x, pending)
            saved.append(one)
            x = one.middle
        x, normed, rsqrt = self._norm(x, pending, self._gains.norm)
        nats, dnormed = self._head(normed, labels_BT, weights_B)
        dx = torch.zeros_like(x)
        dvalue = self._norm_grad(dnormed, x, self._gains.norm, rsqrt, dx, self._grads.norm)
        for index in reversed(range(self._spec.num_layers)):
            dvalue = self._layer_grad(index, saved.pop(), dx, dvalue)
        if not self._spec.has_tied_embeddings:
            self._grads.embedding.zero_()
        self._grads.embedding.index_add_(0, inputs_BT.flatten(), dx)
        return nats

    # Pieces.

    def _empty(self, *dimensions: int) -> Tensor:
        return torch.empty(dimensions, dtype=self._dtype)

    def _norm(self, x: Tensor, add: Tensor | None, gain: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(x + add, its norm in the products' dtype, 1 / root mean square of its rows)."""
        N, D = x.shape
        total = x if add is None else torch.empty_like(x)
        out, rsqrt = self._empty(N, D), torch.empty(N)
        self._call("norm", x, add, gain, total, out, rsqrt, N, D, float(self._spec.norm_epsilon))
        return total, out, rsqrt

    def _norm_grad(
        self, dn: Tensor, x: Tensor, gain: Tensor, rsqrt: Tensor, dx: Tensor, dgain: Tensor
    ) -> Tensor:
        """Adds to dx, and returns it in the products' dtype."""
        N, D = x.shape
        dvalue, parts = self._empty(N, D), torch.empty(_GAIN_PARTS, D)
        self._call("norm_grad", dn, x, gain, rsqrt, dx, dvalue, parts, N, D, _GAIN_PARTS)
        torch.sum(parts, 0, out=dgain)
        return dvalue

    def _weight_grad(
        self, doutput: Tensor, inputs: Tensor, grad: Tensor, *, is_sum: bool = False
    ) -> None:
        """grad = doutput^T inputs, or grad += it; the narrower of the two is transposed first."""
        if self._dtype is torch.float32:
            torch.addmm(grad, doutput.t(), inputs, beta=float(is_sum), out=grad)
        elif doutput.shape[1] <= inputs.shape[1]:
            product = self._transposed(doutput) @ inputs
            self._call("widen", product, grad, *product.shape, int(is_sum))
        else:
            product = self._transposed(inputs) @ doutput
            self._call("widen_transposed", product, grad, *product.shape, int(is_sum))

    def _transposed(self, matrix: Tensor) -> Tensor:
        """A view of rows with zeros behind them."""
        rows, columns = matrix.shape
        out = self._empty(columns, rows + _STRIDE_PADDING)[:, :rows]
        self._call("transpose", matrix, out, rows, columns, rows + _STRIDE_PADDING)
        return out

    # A layer.

    def _layer(self, index: int, x: Tensor, pending: Tensor | None) -> tuple[_Saved, Tensor]:
        """`x` lacks `pending`, what the layer before adds to the stream; so does `middle` lack what
        is returned.
        """
        spec, call = self._spec, self._call
        weights, gains = self._weights.layers[index], self._gains.layers[index]
        N = x.shape[0]
        x, normed, rsqrt = self._norm(x, pending, gains.attention_norm)
        q, k, v = self._split(normed @ weights.wqkv.t())
        blocks, ratios = self._attention(q, k, v)
        merged = self._empty(N, spec.num_heads * spec.head_dim)
        call("merge_heads", merged, blocks, *self._head_sizes(), 0)
        attended = merged @ weights.wo.t()
        middle, middle_normed, middle_rsqrt = self._norm(x, attended, gains.mlp_norm)
        gate_up = middle_normed @ weights.w13.t()
        hidden = self._empty(N, spec.d_ff)
        call("swiglu", gate_up, hidden, N, spec.d_ff)
        saved = _Saved(
            x, rsqrt, normed, q, k, v, ratios, merged,
            middle, middle_rsqrt, middle_normed, gate_up, hidden,
        )  # fmt: skip
        return saved, hidden @ weights.w2.t()

    def _layer_grad(self, index: int, saved: _Saved, dx: Tensor, dvalue: Tensor) -> Tensor:
        """Turns dx, also given in the products' dtype, from the layer's output to its input."""
        call, spec = self._call, self._spec
        weights, grads = self._weights.layers[index], self._grads.layers[index]
        gains = self._gains.layers[index]
        N = dx.shape[0]
        self._weight_grad(dvalue, saved.hidden, grads.w2)
        call("swiglu_grad", saved.gate_up, dvalue @ weights.w2, N, spec.d_ff)
        self._weight_grad(saved.gate_up, saved.middle_normed, grads.w13)
        dvalue = self._norm_grad(
            saved.gate_up @ weights.w13,
            *(saved.middle, gains.mlp_norm, saved.middle_rsqrt, dx, grads.mlp_norm),
        )
        self._weight_grad(dvalue, saved.merged, grads.wo)
        dblocks = torch.empty_like(saved.q)
        call("merge_heads", dvalue @ weights.wo, dblocks, *self._head_sizes(), 1)
        dflat = self._attention_grad(saved, dblocks)
        self._weight_grad(dflat, saved.normed, grads.wqkv)
        return self._norm_grad(
            dflat @ weights.wqkv,
            *(saved.x, gains.attention_norm, saved.x_rsqrt, dx, grads.attention_norm),
        )

    # Attention.

    @property
    def _M(self) -> int:
        """Positions of a block of queries: all if there is a mask or blocks would not fit."""
        is_split = self._mask is None and self._T % _QUERY_BLOCK == 0
        return _QUERY_BLOCK if is_split else self._T

    def _head_sizes(self) -> tuple[int, ...]:
        spec = self._spec
        return self._B, self._T, spec.num_heads, spec.num_kv_heads, spec.head_dim, self._M

    def _split(self, flat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        B, T, H, G, K, M = self._head_sizes()
        q = self._empty(T // M, B * G, H // G * M, K)
        k, v = self._empty(B * G, T, K), self._empty(B * G, T, K)
        sizes = self._head_sizes()
        self._call("split_heads", flat, q, k, v, self._cos, self._sin, *sizes, float(K**-0.5))
        return q, k, v

    def _attention(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, list[Tensor]]:
        B, T, H, G, _, M = self._head_sizes()
        out, ratios = torch.empty_like(q), []
        mask = self._mask
        for index in range(T // M):
            end = (index + 1) * M
            scores = q[index] @ k[:, :end].transpose(1, 2)
            rows_per_mask = H * T if mask is not None and mask.dim() == 3 else B * H * T
            sizes = (scores.numel() // end, end, M, index * M, rows_per_mask, T)
            self._call("softmax", scores, mask, *sizes)
            torch.bmm(scores, v[:, :end], out=out[index])
            ratios.append(scores)
        return out, ratios

    def _attention_grad(self, saved: _Saved, dblocks: Tensor) -> Tensor:
        B, T, H, G, K, M = self._head_sizes()
        dq, dk, dv = torch.empty_like(saved.q), None, None
        for index in reversed(range(T // M)):
            end = (index + 1) * M
            ratios = saved.ratios.pop()
            k, v, q = saved.k[:, :end], saved.v[:, :end], saved.q[index]
            dscores = dblocks[index] @ v.transpose(1, 2)
            self._call("softmax_grad", ratios, dscores, ratios.numel() // end, end)
            torch.bmm(dscores, k, out=dq[index])
            dk_part = dscores.transpose(1, 2) @ q
            dv_part = ratios.transpose(1, 2) @ dblocks[index]
            if dk is None or dv is None:  # the last block sees all keys
                dk, dv = dk_part, dv_part
            else:
                dk[:, :end] += dk_part
                dv[:, :end] += dv_part
        dflat = self._empty(B * T, (H + 2 * G) * K)
        rope = (self._cos, self._sin)
        sizes = self._head_sizes()
        self._call("split_heads_grad", dflat, dq, dk, dv, *rope, *sizes, float(K**-0.5))
        return dflat

    # Loss.

    def _head(
        self, normed: Tensor, labels_BT: Tensor, weights_B: Tensor | None
    ) -> tuple[float, Tensor]:
        """(summed loss, gradient of `normed`); the head's gradient is written too."""
        N, V = normed.shape[0], self._spec.vocab_size
        head, grad = self._weights.head, self._grads.head
        labels = labels_BT.flatten().contiguous()
        weights = None
        if weights_B is not None:
            weights = weights_B.float().repeat_interleave(self._T).contiguous()
        nats, dnormed = torch.empty(N, dtype=torch.float64), torch.empty_like(normed)
        size = max(_MIN_LOGIT_ROWS, LOGITS_BYTES // (V * normed.element_size()))
        for begin in range(0, N, size):
            rows = slice(begin, min(begin + size, N))
            logits = normed[rows] @ head.t()
            row_weights = None if weights is None else weights[rows]
            self._call(
                "cross_entropy", logits, labels[rows], row_weights, nats[rows], *logits.shape
            )
            torch.mm(logits, head, out=dnormed[rows])
            self._weight_grad(logits, normed[rows], grad, is_sum=begin > 0)
        return float(nats.sum()), dnormed
