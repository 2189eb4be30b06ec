"""Losses, tasks, generation and fine-tuning never hold the logits of all positions at once, and
give the numbers of those who do.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peer.eval.evaluate import evaluate
from peer.eval.generate import Sampling, generate_tokens
from peer.eval.in_context import in_context_task
from peer.eval.memorization import memorization
from peer.eval.text import evaluate_tokens
from peer.model import loss as loss_module
from peer.model.decoder import Decoder
from peer.train.finetune import (
    ClassificationHead,
    TuningSettings,
    classifier,
    finetune,
    language_model,
    score_set,
)
from peer.train.finetune_data import Example, TuningSet
from protos.contract.chunk_format import chunk_from_tokens
from tests.peer.model.tiny import BASE, build

SPEC = replace(BASE, vocab_size=8192, seq_len=32, d_model=8, d_ff=16, has_tied_embeddings=False)
MOST_VALUES = 8192 * 10
"""Room for the head's matrix, attention, or the logits of ten positions; two windows have 64."""
LENGTHS = np.ones(SPEC.vocab_size, dtype=np.int64)
TOKENS = np.random.default_rng(5).integers(1, SPEC.vocab_size, 33 * 9)


class Largest(TorchDispatchMode):
    """Most values of any tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.num_values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor)]
        self.num_values = max([self.num_values, *sizes])
        return made


def held_out(model: Decoder, folder: Path) -> list[float]:
    path = folder / "chunk"
    path.write_bytes(chunk_from_tokens(TOKENS, vocab_size=SPEC.vocab_size))
    return [evaluate(model, heldout_paths=[path], byte_lengths=LENGTHS).total_nats]


def text(model: Decoder, folder: Path) -> list[float]:
    return [evaluate_tokens(model, TOKENS[:200], byte_lengths=LENGTHS).total_nats]


def in_context(model: Decoder, folder: Path) -> list[float]:
    found = in_context_task(model, byte_lengths=LENGTHS, bos_token_id=0)
    return [found.first_loss_nats, found.repeat_loss_nats, found.recall_accuracy_ratio]


def memory(model: Decoder, folder: Path) -> list[float]:
    windows = list(TOKENS.reshape(9, 33))
    found = memorization(
        model, trained_windows=windows[:4], heldout_windows=windows[4:], trained_bytes=100,
        byte_lengths=LENGTHS,
    )  # fmt: skip
    return [found.trained_bits_per_byte, found.heldout_bits_per_byte]


def generation(model: Decoder, folder: Path) -> list[float]:
    greedy = Sampling(temperature=0)
    return list(generate_tokens(model, TOKENS[:30].tolist(), max_new_tokens=8, sampling=greedy))


def tuning(model: Decoder, folder: Path) -> list[float]:
    examples = tuple(Example(tokens=tuple(row.tolist())) for row in TOKENS.reshape(9, 33))
    data = TuningSet(training=examples[:8], heldout=examples[8:], num_too_long=0)
    tunable = language_model(model, list(model.parameters()), pad_token_id=0)
    settings = TuningSettings(peak_lr=1e-2, num_passes=1, batch_sequences=4)
    losses = list(finetune(tunable, data, settings))
    return [*losses, score_set(tunable, data.heldout, batch_sequences=1).total_nats]


def classes(model: Decoder, folder: Path) -> list[float]:
    rows = TOKENS.reshape(9, 33)[:, :32]
    examples = [Example(tokens=tuple(row.tolist()), label=n % 2) for n, row in enumerate(rows)]
    tunable = classifier(model, ClassificationHead(SPEC.d_model, 2), pad_token_id=0)
    return [score_set(tunable, examples, batch_sequences=9).total_nats]


@pytest.mark.parametrize("work", [held_out, text, in_context, memory, generation, tuning, classes])
def test_logits_of_all_positions_are_never_held(
    work: Callable[[Decoder, Path], list[float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = build(SPEC)
    expected = work(model, tmp_path)
    monkeypatch.setattr(loss_module, "MAX_WHOLE_LOGITS", MOST_VALUES)
    monkeypatch.setattr(loss_module, "PIECE_LOGITS", 8192 * 7)  # divides nothing
    model, _ = build(SPEC)
    with Largest() as largest:
        found = work(model, tmp_path)
    assert found == pytest.approx(expected, rel=2e-5)
    assert largest.num_values <= MOST_VALUES


def test_the_spy_sees_what_is_held(tmp_path: Path) -> None:
    model, _ = build(SPEC)
    with Largest() as largest:
        text(model, tmp_path)
    assert largest.num_values >= 6 * 32 * SPEC.vocab_size


def test_weights_and_labels_that_are_left_out_count_alike_in_pieces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(3, 5, 8, generator=generator)
    weight = torch.randn(11, 8, generator=generator)
    labels = torch.randint(0, 11, (3, 5), generator=generator)
    labels[0, :4] = loss_module.IGNORED
    weights = torch.tensor([0.5, 2.0, 1.0])
    loss = partial(loss_module.head_loss, hidden, weight, labels)
    expected = float(loss()), float(loss(weights))
    monkeypatch.setattr(loss_module, "MAX_WHOLE_LOGITS", 0)
    monkeypatch.setattr(loss_module, "PIECE_LOGITS", 22)
    with torch.inference_mode():
        assert (float(loss()), float(loss(weights))) == pytest.approx(expected)
