"""Loss as a *sum* over tokens, so that micro-batches, peers and layouts add up exactly; who needs a
mean divides once.

Letters: B sequences, T positions, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from peer.model.masks import attention_mask
from peer.model.objectives import IGNORED, Examples


def summed_loss(logits_BTV: Tensor, labels_BT: Tensor, weights_B: Tensor | None = None) -> Tensor:
    """Cross-entropy in nats, summed over all positions with a label, in fp32; each window's sum
    times its weight.
    """
    logits = logits_BTV.float().flatten(0, 1)
    reduction = "sum" if weights_B is None else "none"
    nats = F.cross_entropy(logits, labels_BT.flatten(), reduction=reduction, ignore_index=IGNORED)
    if hasattr(nats, "to_local"):  # DTensor of a sharded vocabulary: the same on every rank
        nats = nats.to_local()
    if weights_B is None:
        return nats
    return (nats.view(labels_BT.shape).sum(dim=1) * weights_B).sum()


def examples_on(
    examples: Examples, device: torch.device
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(inputs_BT, labels_BT, weights_B, attention mask) on a device; None stands for the plain
    case: weights of 1, causal attention.
    """

    def tensor(values: object) -> Tensor | None:
        return None if values is None else torch.as_tensor(values).to(device)

    inputs_BT, labels_BT = tensor(examples.inputs_BT), tensor(examples.labels_BT)
    assert inputs_BT is not None and labels_BT is not None
    mask = None
    if examples.prefix_B is not None or examples.documents_BT is not None:
        mask = attention_mask(
            inputs_BT.shape[1],
            prefix_B=tensor(examples.prefix_B),
            documents_BT=tensor(examples.documents_BT),
            device=device,
        )
    return inputs_BT, labels_BT, tensor(examples.weights_B), mask
