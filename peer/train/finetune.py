"""Fine-tuning on one machine: the whole model, low-rank adapters (peft), or a classification head.

One loop for all: batches of examples in a seeded order, AdamW without decay on gains, warm-up and
1 - sqrt cooldown of peer/model/schedule.py, losses summed over predicted tokens (or examples) and
divided once. What is predicted is the data's business (finetune_data), what is trained is the
`Tunable`'s. To train on in a swarm, use `muster-coordinator run create --init` instead.

Letters: B sequences, T positions, D model width, C classes, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peer.model.decoder import Decoder, HeadUse
from peer.model.loss import head_loss
from peer.model.schedule import lr_ratio
from peer.train.finetune_data import Example, TuningSet, batch_of, labelled_batch_of
from protos.contract.errors import RunFailedError, UsageError

_MAX_LR, _MAX_DECAY = 1e30, 1e6
"""Their product, and Adam's first step, must be fp32 numbers."""
_WARMUP_RATIO, _COOLDOWN_RATIO = 0.05, 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningSettings:
    """How to train."""

    peak_lr: float = 1e-4
    num_passes: int = 3
    """Times through the examples."""
    batch_sequences: int = 8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        is_allowed = (
            0 < self.peak_lr < math.inf and self.num_passes >= 1 and self.batch_sequences >= 1
        )
        is_allowed &= 0 <= self.weight_decay < math.inf and self.clip_norm > 0
        if not (is_allowed and 0 <= self.seed < 2**63):
            raise UsageError(
                f"lr {self.peak_lr}, passes {self.num_passes}, batch {self.batch_sequences}, "
                f"weight decay {self.weight_decay}, clip {self.clip_norm}, seed {self.seed}",
                allowed=f"lr above 0 to {_MAX_LR:g}, passes and batch at least 1, weight decay 0 "
                f"to {_MAX_DECAY:g}, clip above 0, seeds of 0 to 2^63 - 1",
                remedy="correct the options",
            )

    def num_steps(self, num_examples: int) -> int:
        """Steps of all passes over so many training examples."""
        return -(-num_examples // self.batch_sequences) * self.num_passes


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Sums over a set of examples."""

    total_nats: float
    num_predicted: int
    """Tokens, or examples to classify."""
    num_right: int = 0
    """Examples classified rightly."""

    @property
    def loss_nats(self) -> float:
        """Per prediction."""
        return self.total_nats / self.num_predicted


class Tunable:
    """What is trained: parameters, and the summed loss of a batch."""

    def __init__(
        self, parameters: Sequence[nn.Parameter], score: Callable[[Sequence[Example]], "Losses"]
    ) -> None:
        self.parameters = list(parameters)
        self.score = score


@dataclass(frozen=True, slots=True, kw_only=True)
class Losses:
    """Of one batch; `total` carries the gradient."""

    total: Tensor
    num_predicted: int
    num_right: int = 0


class ClassificationHead(nn.Module):
    """Linear classes of the last token's final hidden state."""

    def __init__(self, d_model: int, num_classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_classes, d_model))

    def forward(self, hidden_BD: Tensor) -> Tensor:
        """logits_BC."""
        return F.linear(hidden_BD, self.weight)


class HeadedModel(Protocol):
    """Gives what a head makes of its last hidden state, as a Decoder does."""

    def __call__(self, tokens_BT: Tensor, *, head: HeadUse) -> Tensor:
        """`head` of the normed hidden_BTD and the output matrix weight_VD."""
        ...


def language_model(
    model: HeadedModel, parameters: Sequence[nn.Parameter], *, pad_token_id: int
) -> Tunable:
    """Predict the next token where the examples have labels."""

    def score(examples: Sequence[Example]) -> Losses:
        inputs_BT, labels_BT = map(torch.from_numpy, batch_of(examples, pad_token_id=pad_token_id))
        total = model(inputs_BT, head=partial(head_loss, labels_BT=labels_BT))
        return Losses(total=total, num_predicted=int((labels_BT >= 0).sum()))

    return Tunable(parameters, score)


def classifier(model: Decoder, head: ClassificationHead, *, pad_token_id: int) -> Tunable:
    """Classify by the last token; causal attention makes padding behind it harmless."""

    def score(examples: Sequence[Example]) -> Losses:
        inputs_BT, last_B, classes_B = map(
            torch.from_numpy, labelled_batch_of(examples, pad_token_id=pad_token_id)
        )
        hidden_BTD = final_hidden(model, inputs_BT)
        logits_BC = head(hidden_BTD[torch.arange(len(examples)), last_B])
        return Losses(
            total=F.cross_entropy(logits_BC, classes_B, reduction="sum"),
            num_predicted=len(examples),
            num_right=int((logits_BC.argmax(-1) == classes_B).sum()),
        )

    body = [p for name, p in model.named_parameters() if name != "output.weight"]
    return Tunable([*body, *head.parameters()], score)


def final_hidden(model: Decoder, inputs_BT: Tensor) -> Tensor:
    """hidden_BTD behind the last norm, which the output head reads."""
    hidden_BTD: Tensor = model(inputs_BT, head=lambda hidden_BTD, _: hidden_BTD)
    return hidden_BTD


@torch.no_grad()
def score_set(tunable: Tunable, examples: Sequence[Example], *, batch_sequences: int) -> Score:
    """Loss over all examples, in order."""
    nats, predicted, right = 0.0, 0, 0
    for begin in range(0, len(examples), batch_sequences):
        losses = tunable.score(examples[begin : begin + batch_sequences])
        nats += float(losses.total)
        predicted += losses.num_predicted
        right += losses.num_right
    return Score(total_nats=nats, num_predicted=predicted, num_right=right)


def finetune(tunable: Tunable, data: TuningSet, settings: TuningSettings) -> Iterator[float]:
    """Train; yields the mean loss of each step's batch. Raises RunFailedError if it is not
    finite.
    """
    matrices = [p for p in tunable.parameters if p.dim() >= 2]
    others = [p for p in tunable.parameters if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=settings.peak_lr,
        betas=(0.9, 0.95),
    )
    per_pass = -(-len(data.training) // settings.batch_sequences)
    num_steps = settings.num_steps(len(data.training))
    generator = np.random.Generator(np.random.Philox(key=settings.seed))
    for step in range(num_steps):
        if step % per_pass == 0:
            order = generator.permutation(len(data.training))
        begin = (step % per_pass) * settings.batch_sequences
        chosen = order[begin : begin + settings.batch_sequences]
        ratio = lr_ratio(
            position_tokens=step + 0.5,
            lr_warmup_tokens=math.ceil(_WARMUP_RATIO * num_steps),
            cooldown_start_tokens=round((1 - _COOLDOWN_RATIO) * num_steps),
            budget_tokens=num_steps,
        )
        for group in optimizer.param_groups:
            group["lr"] = settings.peak_lr * ratio
        optimizer.zero_grad(set_to_none=False)
        losses = tunable.score([data.training[index] for index in chosen])
        mean = losses.total / losses.num_predicted
        if not torch.isfinite(mean):
            raise RunFailedError(
                f"loss {float(mean.detach())} in step {step + 1} of {num_steps}",
                allowed="finite values",
                remedy="lower --lr",
            )
        mean.backward()
        torch.nn.utils.clip_grad_norm_(tunable.parameters, settings.clip_norm)
        optimizer.step()
        yield float(mean.detach())
