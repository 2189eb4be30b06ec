"""Held-out loss: nats summed over whole windows, with the text bytes that the predicted tokens
stand for.

Bits per byte = nats / ln 2 / bytes, so tokenizers can be compared and gzip too. A token's bytes
come from the byte-level vocabulary itself; an end-of-document token stands for no bytes and its
nats still count. An evaluation advances slice by slice, so a trainer can fit it into the time in
which it waits for others.

Letters: B sequences, T positions.
"""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from peer.model.decoder import Decoder
from peer.model.loss import examples_on, head_loss
from peer.model.objectives import HELDOUT_PASS, IGNORED, ExampleBuilder
from protos.contract import chunk_format
from protos.contract.chunk_format import (
    Int64Array,
    TokenArray,
    num_windows,
    token_dtype_for,
    windows_from_chunk,
)
from protos.contract.errors import CorruptDataError, UsageError
from protos.contract.run_spec import ObjectiveSpec

_SLICE_SEQUENCES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalResult:
    """Sums over the evaluated windows."""

    total_nats: float
    num_tokens: int
    num_bytes: int

    @property
    def loss_nats(self) -> float:
        """Mean loss per token."""
        return self.total_nats / self.num_tokens

    @property
    def bits_per_byte(self) -> float:
        """Loss in bits per byte of text; infinite for text of no bytes."""
        return self.total_nats / math.log(2) / self.num_bytes if self.num_bytes else math.inf

    @property
    def perplexity(self) -> float:
        """Of the next token; infinite beyond what a float holds."""
        try:
            return math.exp(self.loss_nats)
        except OverflowError:
            return math.inf


def token_byte_lengths(tokenizer_path: Path) -> npt.NDArray[np.int64]:
    """chunk_format.token_byte_lengths of a file: 0 for special tokens. Raises CorruptDataError."""
    try:
        return chunk_format.token_byte_lengths(tokenizer_path.read_bytes())
    except OSError as error:
        raise CorruptDataError(
            f"{tokenizer_path}: {error.strerror or error}",
            allowed="the tokenizer.json of the run's dataset",
            remedy="fetch it or build the corpus again",
        ) from error


def load_chunk_tokens(path: Path, *, vocab_size: int) -> TokenArray:
    """Token ids of a chunk file that was verified when it was fetched.

    Raises CorruptDataError for foreign ids.
    """
    tokens: TokenArray = np.fromfile(path, dtype=token_dtype_for(vocab_size))
    if tokens.size and int(tokens.max()) >= vocab_size:
        raise CorruptDataError(
            f"token {tokens.max()} in {path}",
            allowed=f"tokens below the vocabulary of {vocab_size}",
            remedy="fetch the dataset again",
        )
    return tokens


def choose_windows(total_windows: int, *, eval_tokens: int, seq_len: int) -> Int64Array:
    """Indices of the windows to evaluate: evenly spread, at least one; all if `eval_tokens` is 0 or
    more than there are.
    """
    wanted = total_windows
    if eval_tokens > 0:
        wanted = min(total_windows, max(1, eval_tokens // seq_len))
    return np.arange(wanted, dtype=np.int64) * total_windows // max(wanted, 1)


class Evaluation:
    """An evaluation under way: call `advance` until it returns the result."""

    def __init__(
        self,
        model: Decoder,
        *,
        heldout_paths: Sequence[Path],
        byte_lengths: npt.NDArray[np.int64],
        eval_tokens: int = 0,
        builder: ExampleBuilder | None = None,
        autocast: torch.autocast | None = None,
    ) -> None:
        """Evaluate `model` as it is; its parameters must not change meanwhile.

        `builder` makes the run's objective of the windows; None evaluates the next token. Raises
        UsageError without windows.
        """
        self._model = model
        self._byte_lengths = byte_lengths
        self._builder = builder or ExampleBuilder(
            ObjectiveSpec(), seed=0, num_text_tokens=byte_lengths.size, eos_token_id=-1
        )
        self._autocast = autocast
        spec = model.spec
        chunks = [load_chunk_tokens(path, vocab_size=byte_lengths.size) for path in heldout_paths]
        windows = [
            (chunk, (HELDOUT_PASS, chunk_index, index))
            for chunk_index, chunk in enumerate(chunks)
            for index in range(num_windows(chunk.size, spec.seq_len))
        ]
        if not windows:
            raise UsageError(
                f"{len(chunks)} held-out chunks without one window of {spec.seq_len} tokens",
                allowed="a corpus whose held-out text fills a window",
                remedy="add text or lower model.seq_len",
            )
        chosen = choose_windows(len(windows), eval_tokens=eval_tokens, seq_len=spec.seq_len)
        self._windows = [windows[index] for index in chosen]
        self._num_done = 0
        self._total_nats = 0.0
        self._num_tokens = 0
        self._num_bytes = 0

    @torch.inference_mode()
    def advance(self) -> EvalResult | None:
        """Evaluate some more windows; the result once all are done."""
        part = self._windows[self._num_done : self._num_done + _SLICE_SEQUENCES]
        pairs = [
            windows_from_chunk(chunk, self._model.spec.seq_len, [key[2]]) for chunk, key in part
        ]
        examples = self._builder.build(
            np.concatenate([inputs for inputs, _ in pairs]),
            np.concatenate([labels for _, labels in pairs]),
            [key for _, key in part],
        )
        tokens_BT, targets_BT, _, mask = examples_on(examples, self._model.norm.weight.device)
        with self._autocast or contextlib.nullcontext():
            head = partial(head_loss, labels_BT=targets_BT)
            total_nats = self._model(tokens_BT, mask=mask, head=head)
        self._total_nats += float(total_nats)
        self._num_tokens += examples.num_predicted
        text_labels = examples.labels_BT[examples.labels_BT != IGNORED]
        text_labels = text_labels[text_labels < self._byte_lengths.size]
        self._num_bytes += int(self._byte_lengths[text_labels].sum())
        self._num_done += len(part)
        if self._num_done < len(self._windows):
            return None
        return EvalResult(
            total_nats=self._total_nats, num_tokens=self._num_tokens, num_bytes=self._num_bytes
        )


def evaluate(
    model: Decoder,
    *,
    heldout_paths: Sequence[Path],
    byte_lengths: npt.NDArray[np.int64],
    eval_tokens: int = 0,
    builder: ExampleBuilder | None = None,
    autocast: torch.autocast | None = None,
) -> EvalResult:
    """A whole evaluation at once."""
    evaluation = Evaluation(
        model,
        heldout_paths=heldout_paths,
        byte_lengths=byte_lengths,
        eval_tokens=eval_tokens,
        builder=builder,
        autocast=autocast,
    )
    while (result := evaluation.advance()) is None:
        pass
    return result
