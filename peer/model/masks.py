"""Who may attend to whom: causal, with a prefix seen in both directions, inside one document.

Letters: B sequences, T query positions, S key positions.
"""

import math

import torch
from torch import Tensor


def attention_mask(
    seq_len: int,
    *,
    prefix_B: Tensor | None = None,
    documents_BT: Tensor | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Additive mask_TS, or mask_BTS with a prefix or documents: 0 where allowed, -inf elsewhere.

    Position t sees s if s <= t, or if both lie in the prefix; with documents only in its own.
    A prefix of seq_len positions gives full attention.
    """
    positions = torch.arange(seq_len, device=device)
    is_allowed = positions[:, None] >= positions[None, :]
    if prefix_B is not None:
        in_prefix_BT = positions[None, :] < prefix_B[:, None]
        is_allowed = is_allowed | (in_prefix_BT[:, :, None] & in_prefix_BT[:, None, :])
    if documents_BT is not None:
        is_allowed = is_allowed & (documents_BT[:, :, None] == documents_BT[:, None, :])
    zeros = torch.zeros(is_allowed.shape, device=device)
    return zeros.masked_fill(~is_allowed, -math.inf)
