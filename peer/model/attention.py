"""Causal grouped-query attention with rotary positions.

Letters: B sequences, T query positions, S key positions, D model width, H query heads, G key/value
heads, R = H / G query heads that share a key/value head, K head width.

Rotary layout is that of transformers' Llama (first half of a head rotates with the second half), so
weights are exported without permutation. On CPU the products are explicit (scores, softmax,
values): torch's fused CPU kernel has a slow bf16 backward (measured, +22 % on the whole step at T =
256). Queries that share a key/value head are laid along the position axis instead of repeating keys
and values. On accelerators torch's fused kernel is used.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from protos.contract.run_spec import ModelSpec


class Weight(nn.Module):
    """One bias-free matrix or gain, without memory until FlatParameters gives it some."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape, device="meta"))


class Linear(Weight):
    """A matrix (out, in) that its input is multiplied with."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Embedding(Weight):
    """A matrix (V, D) of which rows are looked up."""

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return F.embedding(tokens_BT, self.weight)


def rope_tables(
    spec: ModelSpec, *, num_positions: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos_TK and sin_TK in fp32; both halves of K hold the same angles."""
    exponents = torch.arange(0, spec.head_dim, 2, dtype=torch.int64).float() / spec.head_dim
    frequencies = 1.0 / (spec.rope_theta**exponents)
    angles = torch.outer(torch.arange(num_positions).float(), frequencies)
    angles_TK = torch.cat((angles, angles), dim=-1)
    return angles_TK.cos().to(device), angles_TK.sin().to(device)


def apply_rope(x_BHTK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    """Rotate each head by its position's angles, in the dtype of x."""
    first, second = x_BHTK.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return x_BHTK * cos_TK.to(x_BHTK.dtype) + rotated * sin_TK.to(x_BHTK.dtype)


def per_head(mask: Tensor, num_head_axes: int) -> Tensor:
    """mask_TS as it is, mask_BTS with axes of size 1 for the heads behind B."""
    return mask if mask.dim() == 2 else mask[(slice(None), *[None] * num_head_axes)]


def explicit_attention(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, mask_TS: Tensor) -> Tensor:
    """Softmax(q k / sqrt(K) + mask) v as separate products; mask is 0 where allowed and -inf
    elsewhere, one mask_TS for all sequences or a mask_BTS of their own.
    """
    B, H, T, K = q_BHTK.shape
    G, S = k_BGSK.shape[1], k_BGSK.shape[2]
    R = H // G
    q = (q_BHTK * K**-0.5).reshape(B, G, R * T, K)
    scores = (q @ k_BGSK.transpose(-1, -2)).view(B, G, R, T, S) + per_head(mask_TS, 2).to(q.dtype)
    ratios = scores.softmax(dim=-1)
    out_BHTK: Tensor = (ratios.view(B, G, R * T, S) @ v_BGSK).view(B, H, T, K)
    return out_BHTK


class Attention(nn.Module):
    """Projections and attention of one layer."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.head_dim = spec.head_dim
        d_attention, d_kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        self.wq = Linear(d_attention, spec.d_model)
        self.wk = Linear(d_kv, spec.d_model)
        self.wv = Linear(d_kv, spec.d_model)
        self.wo = Linear(spec.d_model, d_attention)

    def forward(
        self,
        x_BTD: Tensor,
        rope: tuple[Tensor, Tensor],
        mask_TS: Tensor,
        cache: list[Tensor] | None = None,
        *,
        is_causal: bool = False,
    ) -> Tensor:
        """Attend from T new positions to all S so far; `cache` holds earlier keys and values and is
        extended. `is_causal` says that the mask is the plain causal one over T = S positions.

        How many heads there are is read off what the projections give: in tensor parallel they give
        this local rank's.
        """
        B, T, _ = x_BTD.shape

        def heads(flat: Tensor) -> Tensor:
            return flat.view(B, T, -1, self.head_dim).transpose(1, 2)

        q_BHTK = apply_rope(heads(self.wq(x_BTD)), *rope)
        k_BGSK = apply_rope(heads(self.wk(x_BTD)), *rope)
        v_BGSK = heads(self.wv(x_BTD))
        if cache is not None:
            if cache:
                k_BGSK = torch.cat((cache[0], k_BGSK), dim=2)
                v_BGSK = torch.cat((cache[1], v_BGSK), dim=2)
            cache[:] = [k_BGSK, v_BGSK]
        if q_BHTK.device.type == "cpu":
            out_BHTK = explicit_attention(q_BHTK, k_BGSK, v_BGSK, mask_TS)
        else:
            out_BHTK = F.scaled_dot_product_attention(
                q_BHTK,
                k_BGSK,
                v_BGSK.to(q_BHTK.dtype),
                attn_mask=None if is_causal else per_head(mask_TS, 1).to(q_BHTK.dtype),
                is_causal=is_causal,
                enable_gqa=q_BHTK.shape[1] != k_BGSK.shape[1],
            )
        out_BTD: Tensor = self.wo(out_BHTK.transpose(1, 2).reshape(B, T, -1))
        return out_BTD
