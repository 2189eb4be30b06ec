"""Loss of a text of any length: windows side by side, the last one as short as it is.

Every token but the first is predicted once, so bits per byte are those of the whole text. Letters:
B sequences, T positions.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from peer.eval.evaluate import EvalResult
from peer.model.decoder import Decoder
from peer.model.loss import head_loss
from protos.contract.chunk_format import Int64Array
from protos.contract.errors import UsageError

_SLICE_SEQUENCES = 8


@torch.inference_mode()
def evaluate_tokens(
    model: Decoder, tokens: Sequence[int] | Int64Array, *, byte_lengths: Int64Array
) -> EvalResult:
    """Next-token loss of a causal model over a text's tokens. Raises UsageError for fewer than two
    tokens, or ids outside the model's vocabulary or the tokenizer's.
    """
    ids = np.asarray(tokens, dtype=np.int64)
    limit = min(model.spec.vocab_size, byte_lengths.size)
    if ids.size < 2 or int(ids.max()) >= limit:
        raise UsageError(
            f"{ids.size} tokens, the largest {int(ids.max(initial=0))}",
            allowed=f"at least two, all below {limit}",
            remedy="use a longer text and the model's own tokenizer",
        )
    seq_len, device = model.spec.seq_len, model.norm.weight.device
    num_whole = (ids.size - 1) // seq_len
    end = num_whole * seq_len
    total_nats = 0.0
    for begin in range(0, num_whole, _SLICE_SEQUENCES):
        part = slice(begin * seq_len, min(begin + _SLICE_SEQUENCES, num_whole) * seq_len)
        inputs_BT = torch.from_numpy(ids[part].reshape(-1, seq_len)).to(device)
        labels_BT = torch.from_numpy(ids[part.start + 1 : part.stop + 1].reshape(-1, seq_len))
        head = partial(head_loss, labels_BT=labels_BT.to(device))
        total_nats += float(model(inputs_BT, head=head))
    if end < ids.size - 1:
        inputs_BT = torch.from_numpy(ids[None, end:-1]).to(device)
        labels_BT = torch.from_numpy(ids[None, end + 1 :]).to(device)
        total_nats += float(model(inputs_BT, head=partial(head_loss, labels_BT=labels_BT)))
    return EvalResult(
        total_nats=total_nats,
        num_tokens=ids.size - 1,
        num_bytes=int(byte_lengths[ids[1:]].sum()),
    )
