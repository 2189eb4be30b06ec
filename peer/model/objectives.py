"""From windows of text to what is trained: causal, prefix, span corruption, masked, answers, on
one decoder.

Everything random is Philox keyed by (seed, data pass, chunk, window), so any peer and any verifier
builds the same examples from the same lease. Attention is causal with a prefix that sees itself in
both directions: a prefix of 0 positions is causal, of all positions is full.

- causal: predict the next token.
- prefix: the first P tokens, P uniform in 1 to T - 1, are seen in both directions; what follows is
  predicted (Raffel et al. 2020, section 3.2.3, "prefix LM").
- span: spans are replaced by sentinels and predicted behind them (Raffel et al. 2020, section
  3.1.4), laid out for a decoder: `a S0 b S1` seen in both directions, then `S0 x S1 y S2`.
- masked: `corruption_ratio` of the positions are predicted in place, of which 80 % show the mask
  token, 10 % a random token and 10 % themselves (Devlin et al. 2019, section 3.1).
- answers: of records of a prompt and its answer, each of which sees only itself, the answer and its
  end are predicted: supervised fine-tuning, as on one machine (peer/train/finetune.py). Nothing
  is random.

A window weighs its T tokens whatever it predicts: its mean loss over predicted positions counts T
times, so that leases, credits and learning rates mean the same under every objective.

Letters: B windows, T positions.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from protos.contract.answer_records import unpack_windows
from protos.contract.chunk_format import Int64Array
from protos.contract.run_spec import Objective, ObjectiveSpec, RunSpec

IGNORED = -100
"""Label of a position that predicts nothing."""
HELDOUT_PASS = 2**32 - 1
"""Data pass that stands for held-out text in the key of an example."""
_MASK_RATIO, _RANDOM_RATIO = 0.8, 0.1

WindowKey = tuple[int, int, int]
"""(data pass, chunk index, index of the window in the chunk's file)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """What one forward pass reads and is to predict."""

    inputs_BT: Int64Array
    labels_BT: Int64Array
    """Token to predict at each position, or IGNORED."""
    weights_B: npt.NDArray[np.float32] | None = None
    """Factor of each window's summed loss; None = 1, every position predicts."""
    prefix_B: Int64Array | None = None
    """Positions at the beginning that see each other in both directions; None = 0."""
    documents_BT: Int64Array | None = None
    """Number of the document that each input token belongs to; None = attention ignores them."""

    @property
    def num_tokens(self) -> int:
        """Tokens that the windows count for."""
        return int(self.inputs_BT.size)

    @property
    def num_predicted(self) -> int:
        """Positions with a label."""
        return int((self.labels_BT != IGNORED).sum())

    @classmethod
    def concatenate(cls, parts: "Sequence[Examples]") -> "Examples":
        """Windows of several parts of one objective, in order."""
        first = parts[0]
        if len(parts) == 1:
            return first
        joined: dict[str, Any] = {
            name: np.concatenate([getattr(part, name) for part in parts])
            for name in cls.__slots__
            if getattr(first, name) is not None
        }
        return cls(**joined)

    def select(self, windows: slice) -> "Examples":
        """Some of the windows."""
        values: dict[str, Any] = {name: getattr(self, name) for name in self.__slots__}
        for name, value in values.items():
            values[name] = None if value is None else value[windows]
        return Examples(**values)

    def padded_to(self, num_windows: int) -> "Examples":
        """With windows behind that predict nothing, so that there are so many."""
        missing = num_windows - self.inputs_BT.shape[0]
        fill = {"labels_BT": IGNORED}
        padded = {}
        for name in self.__slots__:
            value = getattr(self, name)
            if value is not None:
                widths = [(0, missing)] + [(0, 0)] * (value.ndim - 1)
                value = np.pad(value, widths, constant_values=fill.get(name, 0))
            padded[name] = value
        return Examples(**padded)


class ExampleBuilder:
    """Turns windows of text into examples of one objective."""

    def __init__(
        self, spec: ObjectiveSpec, *, seed: int, num_text_tokens: int, eos_token_id: int
    ) -> None:
        """`num_text_tokens`: ids of the tokenizer; the objective's own tokens follow after them."""
        self.spec = spec
        self._seed = seed
        self._num_text_tokens = num_text_tokens
        self._eos_token_id = eos_token_id

    @classmethod
    def for_run(cls, spec: RunSpec, byte_lengths: Int64Array) -> "ExampleBuilder":
        """Builder of a run, given the bytes of text that each of the tokenizer's ids stands for:
        the first without any is the end of a document.
        """
        special = np.flatnonzero(byte_lengths == 0)
        return cls(
            spec.objective,
            seed=spec.seed,
            num_text_tokens=byte_lengths.size,
            eos_token_id=int(special[0]) if special.size else -1,
        )

    def build(
        self, inputs_BT: Int64Array, labels_BT: Int64Array, keys: Sequence[WindowKey]
    ) -> Examples:
        """Examples of windows given as in causal training: labels are the inputs, one further."""
        documents_BT = self._documents(inputs_BT) if self.spec.has_document_mask else None
        match Objective(self.spec.name):
            case Objective.CAUSAL:
                return Examples(inputs_BT=inputs_BT, labels_BT=labels_BT, documents_BT=documents_BT)
            case Objective.PREFIX:
                return self._prefix(inputs_BT, labels_BT, keys, documents_BT)
            case Objective.SPAN:
                return self._span(inputs_BT, keys, documents_BT)
            case Objective.MASKED:
                return self._masked(inputs_BT, keys, documents_BT)
            case Objective.ANSWERS:
                return _answers(inputs_BT, labels_BT)

    def _prefix(
        self,
        inputs_BT: Int64Array,
        labels_BT: Int64Array,
        keys: Sequence[WindowKey],
        documents_BT: Int64Array | None,
    ) -> Examples:
        T = inputs_BT.shape[1]
        prefix_B = np.array([1 + self._words(key, 1)[0] % (T - 1) for key in keys], np.int64)
        is_seen_BT = np.arange(T) < prefix_B[:, None] - 1
        return _weighted(
            inputs_BT, np.where(is_seen_BT, IGNORED, labels_BT), prefix_B, documents_BT
        )

    def _span(
        self, inputs_BT: Int64Array, keys: Sequence[WindowKey], documents_BT: Int64Array | None
    ) -> Examples:
        T = inputs_BT.shape[1]
        num_raw, num_noise, num_spans = span_sizes(self.spec, T)
        rows, documents = [], []
        for row, key in enumerate(keys):
            order = self._permutation(key, num_raw + num_noise)
            is_noise = _noise_mask(order, num_raw=num_raw, num_noise=num_noise, num_spans=num_spans)
            source_L = _span_layout(is_noise, num_spans)
            tokens_L = inputs_BT[row][np.maximum(source_L, 0)]
            sentinels_L = self._num_text_tokens + (-1 - source_L)
            rows.append(np.where(source_L >= 0, tokens_L, sentinels_L))
            if documents_BT is not None:
                documents.append(_sentinel_documents(source_L, documents_BT[row]))
        tokens_BL = np.stack(rows)
        prefix = num_raw - num_noise + num_spans
        labels_BT = tokens_BL[:, 1:].copy()
        labels_BT[:, : prefix - 1] = IGNORED
        return _weighted(
            tokens_BL[:, :-1],
            labels_BT,
            np.full(len(keys), prefix, np.int64),
            np.stack(documents)[:, :-1] if documents else None,
        )

    def _masked(
        self, inputs_BT: Int64Array, keys: Sequence[WindowKey], documents_BT: Int64Array | None
    ) -> Examples:
        T = inputs_BT.shape[1]
        num_chosen = max(1, round(self.spec.corruption_ratio * T))
        num_masked = round(_MASK_RATIO * num_chosen)
        num_random = round(_RANDOM_RATIO * num_chosen)
        shown_BT = inputs_BT.copy()
        labels_BT = np.full_like(inputs_BT, IGNORED)
        for row, key in enumerate(keys):
            words = self._words(key, T + num_random)
            chosen = np.argsort(words[:T], kind="stable")[:num_chosen]
            labels_BT[row, chosen] = inputs_BT[row, chosen]
            shown_BT[row, chosen[:num_masked]] = self._num_text_tokens
            replaced = chosen[num_masked : num_masked + num_random]
            shown_BT[row, replaced] = (words[T:] % self._num_text_tokens)[: replaced.size]
        return _weighted(shown_BT, labels_BT, np.full(len(keys), T, np.int64), documents_BT)

    def _documents(self, inputs_BT: Int64Array) -> Int64Array:
        """A document ends with its EOS token."""
        ends_BT = inputs_BT == self._eos_token_id
        documents_BT: Int64Array = np.cumsum(ends_BT, axis=1) - ends_BT
        return documents_BT

    def _words(self, key: WindowKey, count: int) -> npt.NDArray[np.uint64]:
        """Raw Philox words, whose stream numpy promises for ever."""
        text = f"muster example 1|{self._seed}|{self.spec.name}|{key[0]}|{key[1]}|{key[2]}"
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")
        return np.random.Philox(key=number).random_raw(count)

    def _permutation(self, key: WindowKey, count: int) -> Int64Array:
        return np.argsort(self._words(key, count), kind="stable").astype(np.int64)


def _answers(inputs_BT: Int64Array, labels_BT: Int64Array) -> Examples:
    """No record is cut by a window's border: the builder of the dataset packs whole ones."""
    found = unpack_windows(np.concatenate([inputs_BT, labels_BT[:, -1:]], axis=1))
    return _weighted(
        found.tokens_BL[:, :-1],
        np.where(found.is_answer_BL, found.tokens_BL, IGNORED)[:, 1:],
        None,
        found.records_BL[:, :-1],
    )


def span_sizes(spec: ObjectiveSpec, seq_len: int) -> tuple[int, int, int]:
    """(raw tokens, corrupted ones, spans) of a window: raw + 2 spans = seq_len positions."""
    num_spans = spec.num_spans(seq_len)
    num_raw = seq_len - 2 * num_spans
    num_noise = min(max(round(num_raw * spec.corruption_ratio), num_spans), num_raw - num_spans)
    return num_raw, num_noise, num_spans


def _noise_mask(
    order: Int64Array, *, num_raw: int, num_noise: int, num_spans: int
) -> npt.NDArray[np.bool_]:
    """True for tokens to corrupt: kept and corrupted runs alternate, a kept one first; run lengths
    are a random partition of either sum (random_spans_noise_mask of T5).
    """
    kept = _partition(order[order < num_raw - num_noise], num_spans)
    noise = _partition(order[order >= num_raw] - num_raw, num_spans)
    lengths = np.stack([kept, noise], axis=1).ravel()
    return np.repeat(np.arange(2 * num_spans) % 2 == 1, lengths)


def _partition(permutation: Int64Array, num_parts: int) -> Int64Array:
    """Lengths of a random partition of permutation.size items into non-empty parts."""
    cuts = np.sort(permutation[permutation > 0][: num_parts - 1])
    return np.diff(np.concatenate([[0], cuts, [permutation.size]])).astype(np.int64)


def _span_layout(is_noise: npt.NDArray[np.bool_], num_spans: int) -> Int64Array:
    """Where each position's token comes from: an index of the window, or -1 - i for sentinel i."""
    begins = np.flatnonzero(is_noise & ~np.concatenate([[False], is_noise[:-1]]))
    ends = np.flatnonzero(is_noise & ~np.concatenate([is_noise[1:], [False]])) + 1
    seen: list[int] = []
    predicted: list[int] = []
    previous_end = 0
    for index, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        seen += [*range(previous_end, begin), -1 - index]
        predicted += [-1 - index, *range(begin, end)]
        previous_end = end
    assert len(begins) == num_spans and previous_end == is_noise.size
    return np.array([*seen, *predicted, -1 - num_spans], np.int64)


def _sentinel_documents(source_L: Int64Array, documents_T: Int64Array) -> Int64Array:
    """Document of each position; a sentinel belongs to that of the span it stands for, the last
    one to that of the last token.
    """
    documents_L: Int64Array = documents_T[np.maximum(source_L, 0)]
    predicted_begin = int(np.flatnonzero(source_L == -1)[1])
    for position in np.flatnonzero(source_L < 0):
        twin = predicted_begin + int(
            np.flatnonzero(source_L[predicted_begin:] == source_L[position])[0]
        )
        neighbour = twin + 1 if twin + 1 < source_L.size else twin - 1
        documents_L[position] = documents_T[source_L[neighbour]]
    return documents_L


def _weighted(
    inputs_BT: Int64Array,
    labels_BT: Int64Array,
    prefix_B: Int64Array | None,
    documents_BT: Int64Array | None,
) -> Examples:
    num_predicted_B = np.maximum((labels_BT != IGNORED).sum(axis=1), 1)
    return Examples(
        inputs_BT=inputs_BT,
        labels_BT=labels_BT,
        weights_B=(inputs_BT.shape[1] / num_predicted_B).astype(np.float32),
        prefix_B=prefix_B,
        documents_BT=documents_BT,
    )
