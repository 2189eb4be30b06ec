"""How big a decoder is: parameters, FLOP per token, bytes; the one home of that arithmetic.

Everything is computed from `parameter_table`, the canonical order of parameters: it is also the
layout of the canonical fp32 vector, so planner, budget, digest and export cannot disagree. Weights
are (out, in).

FLOP convention: training costs `6 * N_matmul + 12 * L * d_attention * T` per token. N_matmul counts
every weight that a token is multiplied with (the output head also when it is tied; not the
embedding look-up, positions, norms, biases), 2 FLOP forward and 4 backward each; the second term is
scores and values of full attention over T positions, not halved for the causal mask (Kaplan 2020
and PaLM's appendix B do the same), softmax left out. Recomputed activations are not counted.

Letters: L layers, D d_model, H num_heads, G num_kv_heads, K head_dim, F d_ff, V vocab_size, T
seq_len.
"""

from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from protos.contract.run_spec import ModelSpec

ParameterTable = tuple[tuple[str, tuple[int, ...]], ...]

COUNTING_CONVENTION = "matmul"
"""Name of what `num_matmul_parameters` and `flop_per_token` count; stored with observations."""
FP32_BYTES = 4
STATE_VECTORS_PER_PARAMETER = 3
"""sync: parameters and AdamW's two moments, all fp32."""


class NormKind(StrEnum):
    """RMS has a weight, LAYER a weight and a bias."""

    RMS = "rms"
    LAYER = "layer"


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Shape of a decoder. The defaults of the last four fields are the Llama family, the only one
    that Muster trains; the others serve to count published models.
    """

    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int
    seq_len: int
    has_tied_embeddings: bool
    norm_kind: NormKind = NormKind.RMS
    has_gated_mlp: bool = True
    has_biases: bool = False
    has_learned_positions: bool = False

    @classmethod
    def from_spec(cls, spec: "ModelSpec") -> "ModelShape":
        """Shape of a run's model."""
        return cls(
            vocab_size=spec.vocab_size,
            d_model=spec.d_model,
            num_layers=spec.num_layers,
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            d_ff=spec.d_ff,
            seq_len=spec.seq_len,
            has_tied_embeddings=spec.has_tied_embeddings,
        )

    @property
    def d_attention(self) -> int:
        """Width of all query heads together; not always d_model."""
        return self.num_heads * self.head_dim

    def parameter_table(self) -> ParameterTable:
        """(name, shape) of every parameter in canonical order."""
        return self._table

    @cached_property
    def _table(self) -> ParameterTable:
        d_model, d_kv = self.d_model, self.num_kv_heads * self.head_dim
        table: list[tuple[str, tuple[int, ...]]] = []

        def linear(name: str, num_out: int, num_in: int) -> None:
            table.append((f"{name}.weight", (num_out, num_in)))
            if self.has_biases:
                table.append((f"{name}.bias", (num_out,)))

        def norm(name: str) -> None:
            table.append((f"{name}.weight", (d_model,)))
            if self.norm_kind is NormKind.LAYER:
                table.append((f"{name}.bias", (d_model,)))

        table.append(("tok_embeddings.weight", (self.vocab_size, d_model)))
        if self.has_learned_positions:
            table.append(("pos_embeddings.weight", (self.seq_len, d_model)))
        for layer in range(self.num_layers):
            norm(f"layers.{layer}.attention_norm")
            linear(f"layers.{layer}.attention.wq", self.d_attention, d_model)
            linear(f"layers.{layer}.attention.wk", d_kv, d_model)
            linear(f"layers.{layer}.attention.wv", d_kv, d_model)
            linear(f"layers.{layer}.attention.wo", d_model, self.d_attention)
            norm(f"layers.{layer}.mlp_norm")
            linear(f"layers.{layer}.mlp.w1", self.d_ff, d_model)
            if self.has_gated_mlp:
                linear(f"layers.{layer}.mlp.w3", self.d_ff, d_model)
            linear(f"layers.{layer}.mlp.w2", d_model, self.d_ff)
        norm("norm")
        if not self.has_tied_embeddings:
            table.append(("output.weight", (self.vocab_size, d_model)))
        return tuple(table)

    @cached_property
    def num_parameters(self) -> int:
        """All parameters; tied weights once."""
        return sum(prod(shape) for _, shape in self._table)

    @cached_property
    def num_matmul_parameters(self) -> int:
        """Weights that a token is multiplied with: all matrices but the look-up tables, the head
        always.
        """
        inner = sum(
            prod(shape)
            for name, shape in self._table
            if len(shape) == 2 and name.startswith("layers.")
        )
        return inner + self.vocab_size * self.d_model

    def flop_per_token(self) -> float:
        """Training FLOP per token, forward and backward, by the convention at the top."""
        attention = 12 * self.num_layers * self.d_attention * self.seq_len
        return float(6 * self.num_matmul_parameters + attention)

    @property
    def vector_bytes(self) -> int:
        """Size of the canonical fp32 vector of parameters (or gradients)."""
        return self.num_parameters * FP32_BYTES

    @property
    def state_bytes(self) -> int:
        """Size of a whole replicated state of `sync`."""
        return STATE_VECTORS_PER_PARAMETER * self.vector_bytes


def _gpt(
    d_model: int, num_layers: int, num_heads: int, *, seq_len: int, head_dim: int = 64
) -> ModelShape:
    return ModelShape(
        vocab_size=50_257,
        d_model=d_model,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=head_dim,
        d_ff=4 * d_model,
        seq_len=seq_len,
        has_tied_embeddings=True,
        norm_kind=NormKind.LAYER,
        has_gated_mlp=False,
        has_biases=True,
        has_learned_positions=True,
    )


def _llama(d_model: int, num_layers: int, num_heads: int, d_ff: int) -> ModelShape:
    return ModelShape(
        vocab_size=32_000,
        d_model=d_model,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=128,
        d_ff=d_ff,
        seq_len=2048,
        has_tied_embeddings=False,
    )


def _llama3(d_model: int, num_layers: int, num_heads: int, d_ff: int) -> ModelShape:
    shape = _llama(d_model, num_layers, num_heads, d_ff)
    return replace(shape, vocab_size=128_256, num_kv_heads=8, seq_len=8192)


SHAPE_PRESETS: dict[str, ModelShape] = {
    "gpt2": _gpt(768, 12, 12, seq_len=1024),
    "gpt2-medium": _gpt(1024, 24, 16, seq_len=1024),
    "gpt2-large": _gpt(1280, 36, 20, seq_len=1024),
    "gpt2-xl": _gpt(1600, 48, 25, seq_len=1024),
    "gpt3-125m": _gpt(768, 12, 12, seq_len=2048),
    "gpt3-760m": _gpt(1536, 24, 16, seq_len=2048, head_dim=96),
    "gpt3-6.7b": _gpt(4096, 32, 32, seq_len=2048, head_dim=128),
    "gpt3-13b": _gpt(5140, 40, 40, seq_len=2048, head_dim=128),
    "gpt3-175b": _gpt(12_288, 96, 96, seq_len=2048, head_dim=128),
    "llama1-7b": _llama(4096, 32, 32, 11_008),
    "llama1-13b": _llama(5120, 40, 40, 13_824),
    "llama1-33b": _llama(6656, 60, 52, 17_920),
    "llama1-65b": _llama(8192, 80, 64, 22_016),
    "llama2-7b": replace(_llama(4096, 32, 32, 11_008), seq_len=4096),
    "llama2-13b": replace(_llama(5120, 40, 40, 13_824), seq_len=4096),
    "llama2-70b": replace(_llama(8192, 80, 64, 28_672), seq_len=4096, num_kv_heads=8),
    "llama3-8b": _llama3(4096, 32, 32, 14_336),
    "llama3-70b": _llama3(8192, 80, 64, 28_672),
    "llama3-405b": _llama3(16_384, 126, 128, 53_248),
    "llama3.2-1b": replace(_llama3(2048, 16, 32, 8192), head_dim=64, has_tied_embeddings=True),
    "llama3.2-3b": replace(_llama3(3072, 28, 24, 8192), has_tied_embeddings=True),
}
"""Published models, for planning and for checking the arithmetic."""
