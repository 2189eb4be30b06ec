"""What a model learns from its own context, without any download.

Two tasks of random tokens, so that nothing but the context can help. *Repeat*: a random sequence
twice; loss and accuracy of the second copy against the first (the test for induction heads of
Olsson et al. 2022, "In-context Learning and Induction Heads"). *Recall*: pairs `key value`, all
different, then each key again in another order; is its value the likeliest token? (associative
recall, Arora et al. 2023, "Zoology"). Tokens are drawn from those that stand for text, by a seed.
A model that only knows frequencies scores 1 in the vocabulary on either.

Letters: B sequences, T positions.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from peer.model.decoder import Decoder
from peer.model.loss import label_scores
from protos.contract.chunk_format import Int64Array
from protos.contract.errors import UsageError

_NUM_SEQUENCES = 16
_MIN_SEQ_LEN = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class InContextResult:
    """Means over all predicted positions."""

    first_loss_nats: float
    """Of the first copy: nothing to go by."""
    repeat_loss_nats: float
    """Of the second copy."""
    repeat_accuracy_ratio: float
    recall_accuracy_ratio: float
    chance_ratio: float
    """What guessing one of the tokens seen would give in `recall`."""
    num_sequences: int


@torch.inference_mode()
def in_context_task(
    model: Decoder, *, byte_lengths: Int64Array, bos_token_id: int, seed: int = 0
) -> InContextResult:
    """Run both tasks. Raises UsageError for a window or vocabulary that is too small."""
    half = (model.spec.seq_len - 1) // 2
    words = np.flatnonzero(byte_lengths[: model.spec.vocab_size] > 0)
    if model.spec.seq_len < _MIN_SEQ_LEN or words.size < 2 * half:
        raise UsageError(
            f"a window of {model.spec.seq_len} tokens and {words.size} text tokens",
            allowed=f"windows of at least {_MIN_SEQ_LEN}, no longer than the vocabulary",
            remedy="the in-context task is not for this model",
        )
    generator = np.random.Generator(np.random.Philox(key=seed))
    drawn_BT = np.stack([generator.permutation(words)[:half] for _ in range(_NUM_SEQUENCES)])
    bos_B1 = np.full((_NUM_SEQUENCES, 1), bos_token_id)
    repeated_BT = np.concatenate([bos_B1, drawn_BT, drawn_BT], axis=1)
    nats_BT, hits_BT = _scores(model, repeated_BT)

    num_pairs = max(1, (model.spec.seq_len - 1) // 4)
    pairs_BT = drawn_BT[:, : 2 * num_pairs]
    num_pairs = pairs_BT.shape[1] // 2
    asked_BT = np.stack(
        [
            row.reshape(num_pairs, 2)[generator.permutation(num_pairs)].reshape(-1)
            for row in pairs_BT
        ]
    )
    _, recall_hits_BT = _scores(model, np.concatenate([bos_B1, pairs_BT, asked_BT], axis=1))
    return InContextResult(
        first_loss_nats=float(nats_BT[:, :half].mean()),
        repeat_loss_nats=float(nats_BT[:, half + 1 :].mean()),  # the very first repeat is unknown
        repeat_accuracy_ratio=float(hits_BT[:, half + 1 :].mean()),
        recall_accuracy_ratio=float(recall_hits_BT[:, 2 * num_pairs + 1 :: 2].mean()),
        chance_ratio=1 / (2 * num_pairs),
        num_sequences=_NUM_SEQUENCES,
    )


def _scores(model: Decoder, tokens_BT: Int64Array) -> tuple[torch.Tensor, torch.Tensor]:
    """(nats_BT, is the label the likeliest token) of positions 1 to the end."""
    tokens = torch.from_numpy(tokens_BT).to(model.norm.weight.device)
    head = partial(label_scores, labels_BT=tokens[:, 1:])
    nats_BT, hits_BT = model(tokens[:, :-1], head=head).cpu()
    return nats_BT, hits_BT
