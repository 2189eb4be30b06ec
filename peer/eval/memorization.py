"""How many bits per parameter a model has memorised of its training text: an estimate.

Morris et al. 2025 ("How much do language models memorize?", arXiv 2505.24832) split what a model
knows of a text into generalisation and *unintended memorisation*: the bits by which the model
compresses that very text better than a reference model that knows only the distribution. They
measure a capacity of about 3.6 bits per parameter for models of the GPT family.

Here the reference is the model itself on held-out text of the same corpus: bits memorised = (bits
per byte on held-out text - bits per byte on trained text) x bytes of trained text, both over
windows spread evenly, the trained ones drawn from what the run's schedule has dealt so far. It is
an average over the corpus, with its standard error. It is *not* a bound on any single document, not
an extraction attack, and no statement about privacy: one leaked line is far below its noise; and if
held-out and training text differ in kind, that difference is counted too (it can be negative).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from peer.model.decoder import Decoder
from peer.model.loss import label_scores
from protos.contract.chunk_format import Int64Array
from protos.contract.errors import UsageError
from protos.contract.model_shape import ModelShape

CAPACITY_BITS_PER_PARAMETER = 3.6
"""Morris et al. 2025, abstract."""
_SLICE_WINDOWS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class MemorizationResult:
    """Estimate with its uncertainty."""

    trained_bits_per_byte: float
    heldout_bits_per_byte: float
    trained_bytes: int
    """Different bytes of text that the model was trained on, once however often repeated."""
    memorized_bits: float
    bits_per_parameter: float
    bits_per_parameter_error: float
    """One standard error, from the spread between windows."""
    capacity_ratio: float
    """bits_per_parameter / CAPACITY_BITS_PER_PARAMETER."""
    num_windows: int
    """Evaluated on either side."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Side:
    bits_per_byte: float
    error: float
    num_bytes: int


def memorization(
    model: Decoder,
    *,
    trained_windows: Sequence[Int64Array],
    heldout_windows: Sequence[Int64Array],
    trained_bytes: int,
    byte_lengths: Int64Array,
) -> MemorizationResult:
    """Estimate from sampled windows of seq_len + 1 tokens; `trained_bytes` of all that was trained.

    Raises UsageError for fewer than two windows on a side.
    """
    if len(trained_windows) < 2 or len(heldout_windows) < 2:
        raise UsageError(
            f"{len(trained_windows)} trained and {len(heldout_windows)} held-out windows",
            allowed="at least two of each",
            remedy="train longer, or use a corpus with more text",
        )
    trained = _side(model, trained_windows, byte_lengths)
    heldout = _side(model, heldout_windows, byte_lengths)
    num_parameters = ModelShape.from_spec(model.spec).num_parameters
    bits = (heldout.bits_per_byte - trained.bits_per_byte) * trained_bytes
    error_bits = math.hypot(heldout.error, trained.error) * trained_bytes
    return MemorizationResult(
        trained_bits_per_byte=trained.bits_per_byte,
        heldout_bits_per_byte=heldout.bits_per_byte,
        trained_bytes=trained_bytes,
        memorized_bits=bits,
        bits_per_parameter=bits / num_parameters,
        bits_per_parameter_error=error_bits / num_parameters,
        capacity_ratio=bits / num_parameters / CAPACITY_BITS_PER_PARAMETER,
        num_windows=min(len(trained_windows), len(heldout_windows)),
    )


@torch.inference_mode()
def _side(model: Decoder, windows: Sequence[Int64Array], byte_lengths: Int64Array) -> _Side:
    """Bits per byte as a ratio of sums; its error by the delta method over windows."""
    bits: list[float] = []
    sizes: list[int] = []
    device = model.norm.weight.device
    for begin in range(0, len(windows), _SLICE_WINDOWS):
        tokens_BT = torch.from_numpy(np.stack(windows[begin : begin + _SLICE_WINDOWS])).to(device)
        labels_BT = tokens_BT[:, 1:]
        nats_BT, _ = model(tokens_BT[:, :-1], head=partial(label_scores, labels_BT=labels_BT))
        bits += (nats_BT.sum(dim=1) / math.log(2)).tolist()
        sizes += byte_lengths[labels_BT.cpu().numpy()].sum(axis=1).tolist()
    num_bytes, total = sum(sizes), sum(bits)
    ratio = total / num_bytes
    spread = sum((b - ratio * n) ** 2 for b, n in zip(bits, sizes, strict=True))
    count = len(bits)
    error = math.sqrt(spread * count / (count - 1)) / num_bytes
    return _Side(bits_per_byte=ratio, error=error, num_bytes=num_bytes)
