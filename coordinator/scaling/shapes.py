"""A decoder's shape for a wanted N, and the memory that training it needs.

N counts the matrices of the layers and the head, not the input embedding (the convention of the
fits; ModelShape.num_matmul_parameters). Loss hardly depends on the shape at a given N (Kaplan 2020,
figure 5), so the shape is chosen for being ordinary: width over depth near 96, heads of 64 (128 in
wide models), grouped keys and values, a SwiGLU of 8/3 the width, and never above a given N if that
can be helped, because smaller is cheaper to synchronise, to hold and to serve.
"""

import math
from dataclasses import dataclass, replace

from protos.contract.model_shape import ModelShape

USABLE_MEMORY_RATIO = 0.9
_WIDTH_PER_LAYER = 96
_WIDEST_RATIO = 3.0
"""Width over depth may be off the ideal by this factor either way."""
_TIED_SHARE = 0.2
"""The look-up table is shared with the head when it would be this share of all parameters."""
_ACTIVATION_BYTES_PER_VALUE = 34
"""Bytes kept per layer, token and unit of width (Korthikanti 2022, 2205.05198, without scores)."""
_NARROWEST = 32
_CAP_PRECISION = 0.005
"""Of ln N, where memory caps it."""
_LOGIT_BYTES = 8
"""Of one logit: fp32 value and gradient."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRule:
    """Training memory of one peer."""

    bytes_per_parameter: float = 16.0
    """AdamW: weights, gradients, two moments, and fp32 copies or averaged vectors beside them."""
    micro_batch_sequences: int = 1

    def needed_bytes(self, shape: ModelShape) -> float:
        """State and activations of one micro-batch."""
        tokens = self.micro_batch_sequences * shape.seq_len
        per_token = _ACTIVATION_BYTES_PER_VALUE * shape.num_layers * shape.d_model
        activations = tokens * (per_token + _LOGIT_BYTES * shape.vocab_size)
        return self.bytes_per_parameter * shape.num_parameters + activations


def choose_shape(
    params_n: float, *, vocab_size: int, seq_len: int, may_exceed: bool = False
) -> ModelShape:
    """The most ordinary shape whose N is close to `params_n` and not above it.

    Where even the smallest shape is above (the head alone is vocab_size x d_model), that one is
    returned. `may_exceed` takes the nearest on either side.
    """
    best: tuple[float, int, int] | None = None
    for d_model in _widths(params_n, vocab_size):
        head = vocab_size * d_model
        one_layer = _shape(d_model, 1, vocab_size=vocab_size, seq_len=seq_len)
        per_layer = one_layer.num_matmul_parameters - head
        for num_layers in _depths(d_model, params_n, vocab_size):
            found = num_layers * per_layer + head
            if found > params_n and not may_exceed:
                continue
            off_size = abs(math.log(found / params_n))
            off_ratio = abs(math.log(d_model / num_layers / _WIDTH_PER_LAYER))
            penalty = 20 * off_size + off_ratio
            if best is None or penalty < best[0]:
                best = (penalty, d_model, num_layers)
    _, d_model, num_layers = best or (0.0, _NARROWEST, 1)
    return _shape(d_model, num_layers, vocab_size=vocab_size, seq_len=seq_len)


def largest_params(memory_bytes: float, rule: MemoryRule, *, vocab_size: int, seq_len: int) -> int:
    """N of the largest shape that trains in `memory_bytes` x 0.9; 0 if none does."""
    usable = USABLE_MEMORY_RATIO * memory_bytes
    smallest = choose_shape(1.0, vocab_size=vocab_size, seq_len=seq_len)
    if rule.needed_bytes(smallest) > usable:
        return 0
    best = smallest.num_matmul_parameters
    low, high = math.log(best), math.log(max(usable / rule.bytes_per_parameter, best))
    while high - low > _CAP_PRECISION:
        middle = (low + high) / 2
        shape = choose_shape(math.exp(middle), vocab_size=vocab_size, seq_len=seq_len)
        if rule.needed_bytes(shape) <= usable:
            low, best = middle, max(best, shape.num_matmul_parameters)
        else:
            high = middle
    return best


def _head_dim(d_model: int) -> int:
    if d_model >= 2048:
        return 128
    if d_model >= 512:
        return 64
    return 32 if d_model % 32 == 0 else 16


def _width_step(d_model: int) -> int:
    """Even numbers of heads from 512 on, multiples of four from 2048, of eight from 8192."""
    for lowest, step in ((8192, 1024), (2048, 512), (512, 128), (64, 32)):
        if d_model >= lowest:
            return step
    return 16


def _widths(params_n: float, vocab_size: int) -> list[int]:
    """Widths whose head leaves room for layers, around the ideal of d = 96 layers."""
    ideal = (_WIDTH_PER_LAYER * params_n / 12) ** (1 / 3)
    widths, width = [], _NARROWEST
    while width <= 2 * ideal + 64:
        if width >= ideal / 2 or width * vocab_size >= params_n / 4:
            widths.append(width)
        width += _width_step(width)
    return widths


def _depths(d_model: int, params_n: float, vocab_size: int) -> list[int]:
    """Depths within the allowed ratio, nearest to the wanted N first of all."""
    lowest = max(1, round(d_model / _WIDTH_PER_LAYER / _WIDEST_RATIO))
    highest = max(lowest, round(d_model / _WIDTH_PER_LAYER * _WIDEST_RATIO), 2)
    wanted = (params_n - vocab_size * d_model) / (11 * d_model**2)  # 10.5 to 12 d^2 per layer
    near = {math.floor(wanted * factor) for factor in (0.91, 1.0, 1.05)} | {math.ceil(wanted)}
    return [depth for depth in sorted(near) if lowest <= depth <= highest]


def _shape(d_model: int, num_layers: int, *, vocab_size: int, seq_len: int) -> ModelShape:
    head_dim = _head_dim(d_model)
    num_heads = d_model // head_dim
    group = 4 if num_heads >= 8 and num_heads % 4 == 0 else 2 if num_heads % 2 == 0 else 1
    step = 64 if d_model >= 256 else 16
    shape = ModelShape(
        vocab_size=vocab_size,
        d_model=d_model,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads // group,
        head_dim=head_dim,
        d_ff=max(step, round(8 * d_model / 3 / step) * step),
        seq_len=seq_len,
        has_tied_embeddings=False,
    )
    table = vocab_size * d_model
    if table < _TIED_SHARE * (shape.num_matmul_parameters + table):
        return shape
    return replace(shape, has_tied_embeddings=True)
