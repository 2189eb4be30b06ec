"""Held-out loss: nats summed over whole windows, with the text bytes that the predicted tokens
stand for.

Bits per byte = nats / ln 2 / bytes, so tokenizers can be compared and gzip too. A token's bytes
come from the byte-level vocabulary itself; an end-of-document token stands for no bytes and its
nats still count. An evaluation advances slice by slice, so a trainer can fit it into the time in
which it waits for others.

Letters: B sequences, T positions.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from peer.model.decoder import Decoder
from peer.model.loss import summed_loss
from protos.contract.chunk_format import (
    Int64Array,
    TokenArray,
    num_windows,
    token_dtype_for,
    windows_from_chunk,
)
from protos.contract.errors import CorruptDataError, UsageError

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
        """Of the next token."""
        return math.exp(self.loss_nats)


def token_byte_lengths(tokenizer_path: Path) -> npt.NDArray[np.int64]:
    """Bytes of text that each token id stands for, from a byte-level BPE `tokenizer.json`; 0 for
    special tokens.

    In the byte-level alphabet each character stands for one byte. Raises CorruptDataError for
    another format.
    """
    try:
        plain = json.loads(tokenizer_path.read_bytes())
        id_by_token = {str(token): int(index) for token, index in plain["model"]["vocab"].items()}
        special_ids = [int(token["id"]) for token in plain.get("added_tokens", [])]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptDataError(
            f"tokenizer {tokenizer_path}: {error!r}",
            allowed="a Hugging Face tokenizer.json with a byte-level BPE model",
            remedy="fetch it or build the corpus again",
        ) from error
    lengths = np.zeros(max([*id_by_token.values(), *special_ids], default=-1) + 1, dtype=np.int64)
    for token, index in id_by_token.items():
        lengths[index] = len(token)
    lengths[special_ids] = 0
    return lengths


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
        autocast: torch.autocast | None = None,
    ) -> None:
        """Evaluate `model` as it is; its parameters must not change meanwhile.

        Raises UsageError without windows.
        """
        self._model = model
        self._byte_lengths = byte_lengths
        self._autocast = autocast
        spec = model.spec
        chunks = [load_chunk_tokens(path, vocab_size=spec.vocab_size) for path in heldout_paths]
        windows = [
            (chunk, index)
            for chunk in chunks
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
            windows_from_chunk(chunk, self._model.spec.seq_len, [index]) for chunk, index in part
        ]
        inputs_BT = np.concatenate([inputs for inputs, _ in pairs])
        labels_BT = np.concatenate([labels for _, labels in pairs])
        device = self._model.norm.weight.device
        tokens_BT = torch.from_numpy(inputs_BT).to(device)
        targets_BT = torch.from_numpy(labels_BT).to(device)
        if self._autocast is None:
            total_nats = summed_loss(self._model(tokens_BT), targets_BT)
        else:
            with self._autocast:
                total_nats = summed_loss(self._model(tokens_BT), targets_BT)
        self._total_nats += float(total_nats)
        self._num_tokens += int(labels_BT.size)
        self._num_bytes += int(self._byte_lengths[labels_BT].sum())
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
    autocast: torch.autocast | None = None,
) -> EvalResult:
    """A whole evaluation at once."""
    evaluation = Evaluation(
        model,
        heldout_paths=heldout_paths,
        byte_lengths=byte_lengths,
        eval_tokens=eval_tokens,
        autocast=autocast,
    )
    while (result := evaluation.advance()) is None:
        pass
    return result
