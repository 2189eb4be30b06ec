"""Loss as a *sum* over tokens, so that micro-batches, peers and layouts add up exactly; who needs a
mean divides once.

Letters: B sequences, T positions, V vocabulary.
"""

import torch.nn.functional as F
from torch import Tensor


def summed_loss(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Cross-entropy in nats, summed over all B * T tokens, in fp32."""
    return F.cross_entropy(logits_BTV.float().flatten(0, 1), labels_BT.flatten(), reduction="sum")
