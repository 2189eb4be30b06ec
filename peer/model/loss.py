"""Loss as a *sum* over tokens, so that micro-batches, peers and layouts add up exactly; who needs a
mean divides once.

Letters: B sequences, T positions, N = B T of them in a row, D model width, V vocabulary.
"""

from typing import Any, Protocol

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
    if weights_B is None:
        return nats
    return (nats.view(labels_BT.shape).sum(dim=1) * weights_B).sum()


MAX_WHOLE_LOGITS = 2**25
"""Values; more are never in memory at once where `head_loss` or `label_scores` is used."""
PIECE_LOGITS = 2**24


def head_loss(
    hidden_BTD: Tensor, weight_VD: Tensor, labels_BT: Tensor, weights_B: Tensor | None = None
) -> Tensor:
    """`summed_loss` of the logits hidden_BTD weight_VD^T, in pieces if they are many."""
    if labels_BT.numel() * weight_VD.shape[0] <= MAX_WHOLE_LOGITS:
        return summed_loss(F.linear(hidden_BTD, weight_VD), labels_BT, weights_B)
    if torch.is_grad_enabled():
        return pieced_loss(hidden_BTD, weight_VD, labels_BT, weights_B)
    nats_B = label_scores(hidden_BTD, weight_VD, labels_BT)[0].sum(dim=1)
    return (nats_B if weights_B is None else nats_B * weights_B).sum()


@torch.no_grad()
def label_scores(hidden_BTD: Tensor, weight_VD: Tensor, labels_BT: Tensor) -> Tensor:
    """(nats, 1 where it is the likeliest token) of each label as one scores_2BT, zeros where there
    is none. In fp32, without gradients, of the logits hidden_BTD weight_VD^T, piece by piece.
    """
    hidden_ND, labels_N = hidden_BTD.flatten(0, 1), labels_BT.flatten()
    scores_2N = torch.zeros((2, labels_N.numel()), device=hidden_ND.device)
    size = max(1, PIECE_LOGITS // weight_VD.shape[0])
    for begin in range(0, labels_N.numel(), size):
        rows = slice(begin, begin + size)
        logits, labels = F.linear(hidden_ND[rows], weight_VD).float(), labels_N[rows]
        scores_2N[0, rows] = F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED)
        scores_2N[1, rows] = (logits.argmax(dim=1) == labels).float()
    return scores_2N.view(2, *labels_BT.shape)


class VocabularyShare(Protocol):
    """A rank's words of a vocabulary that is dealt over several (peer/parallel/tensor.py)."""

    @property
    def begin(self) -> int:
        """The first of them."""
        ...

    def combined(self, total_N: Tensor, picked_N: Tensor) -> tuple[Tensor, Tensor]:
        """(log of the summed exponentials, logit of the label) over all words from those of one's
        own; every rank calls this and gets the same.
        """
        ...


def pieced_loss(
    hidden_BTD: Tensor,
    weight_VD: Tensor,
    labels_BT: Tensor,
    weights_B: Tensor | None = None,
    share: VocabularyShare | None = None,
) -> Tensor:
    """`summed_loss` of the logits hidden_BTD weight_VD^T, piece by piece: each piece's gradients
    are made at once, so neither logits nor their gradients are kept. Under autocast products are
    in its precision, sums over pieces in fp32. With a `share`, `weight_VD` has its words only:
    the loss is that of all words, the gradient of `hidden_BTD` a partial sum.
    """
    weights_N = torch.ones_like(labels_BT, dtype=torch.float32)
    if weights_B is not None:
        weights_N = weights_N * weights_B[:, None]
    labels_N = labels_BT.flatten()
    weights_N = torch.where(labels_N == IGNORED, 0.0, weights_N.flatten())
    nats: Tensor = _PiecedHead.apply(  # type: ignore[no-untyped-call]
        hidden_BTD.flatten(0, 1), weight_VD, labels_N.clamp_min(0), weights_N, share
    )
    return nats


class _PiecedHead(torch.autograd.Function):
    """Head and cross-entropy; gradients are made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        weights_N: Tensor,
        share: VocabularyShare | None,
    ) -> Tensor:
        """Nats, summed; gradients of both inputs are kept."""
        kind = hidden_ND.device.type
        is_low = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if is_low else hidden_ND.dtype
        with torch.autocast(kind, enabled=False):
            product_VD = weight_VD.to(dtype)
            grad_ND = torch.empty_like(hidden_ND)
            grad_VD = torch.zeros_like(weight_VD) if ctx.needs_input_grad[1] else None
            nats = torch.zeros((), device=hidden_ND.device)
            num_words = weight_VD.shape[0]
            size = max(1, PIECE_LOGITS // num_words)
            own_N = labels_N - (share.begin if share else 0)
            is_own_N = (own_N >= 0) & (own_N < num_words)
            own_N = own_N.clamp(0, num_words - 1)
            for begin in range(0, hidden_ND.shape[0], size):
                rows = slice(begin, begin + size)
                hidden, own, is_own = hidden_ND[rows].to(dtype), own_N[rows], is_own_N[rows]
                logits = (hidden @ product_VD.t()).float()
                total = logits.logsumexp(dim=1)
                picked = torch.where(is_own, logits.gather(1, own[:, None])[:, 0], 0.0)
                if share is not None:
                    total, picked = share.combined(total, picked)
                nats += ((total - picked) * weights_N[rows]).sum()
                grad = logits.sub_(total[:, None]).exp_()
                grad[torch.arange(own.numel(), device=grad.device), own] -= is_own.float()
                grad = grad.mul_(weights_N[rows][:, None]).to(dtype)
                grad_ND[rows] = grad @ product_VD
                if grad_VD is None:
                    continue
                if dtype == grad_VD.dtype:
                    grad_VD.addmm_(grad.t(), hidden)
                else:
                    grad_VD += grad.t() @ hidden
        ctx.save_for_backward(grad_ND, grad_VD)
        return nats

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        """The gradients that were kept, times `grad`, which has one value."""
        grad_ND, grad_VD = ctx.saved_tensors
        return grad_ND * grad, None if grad_VD is None else grad_VD * grad, None, None, None


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
