"""Byte-level BPE: trained on a sample, encoded in batches on all cores, the same bytes for the same
text.

Any text has an encoding and decodes to itself, because the 256 bytes are entries of their own.
Entry 0 is the end of a document; text that happens to spell it is encoded as ordinary bytes. Words
are split so that punctuation joins the letters after it and a line's indentation is one piece: 3.5
bytes per token at 4,096 entries on Python sources, against 3.4 with GPT-2's pattern (measured with
the default corpus, November 2026).
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from protos.contract.chunk_format import token_bytes_table
from protos.contract.errors import CorruptDataError, UsageError

EOS_TOKEN = "<|endoftext|>"
EOS_TOKEN_ID = 0
DEFAULT_VOCAB_SIZE = 4_096
MIN_VOCAB_SIZE = 257
"""The 256 bytes and the end of a document."""
MAX_VOCAB_SIZE = 2**20

MAX_SAMPLE_BYTES = 8 * 2**20
"""Text that the tokenizer is trained on, about 2 s on two cores; more changes little at small
vocabularies.
"""

SEGMENT_CHARS = 2**18
"""Documents are encoded in segments of about this size, cut at line ends, so that one long file
uses all cores.
"""

_BATCH_CHARS = 2**22
_SPLIT_PATTERN = (
    r" ?[^\s\p{L}\p{N}]*\p{L}+"  # a word, with one space and the punctuation before it
    r"|\p{N}{1,3}"  # numbers by three digits
    r"| ?[^\s\p{L}\p{N}]+"  # punctuation that no letter follows
    r"|[\r\n]+[ \t]*(?=[ \t])"  # line ends with the indentation, less the word's own space
    r"|[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def train_tokenizer(sample: Iterable[str], *, vocab_size: int) -> bytes:
    """Train on `sample` and return tokenizer.json.

    The vocabulary is smaller than asked when the sample has too few different words. Raises
    UsageError for sizes that cannot be.
    """
    check_vocab_size(vocab_size)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample, trainer)
    return (tokenizer.to_str(pretty=False) + "\n").encode()


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenTokenizer:
    """A tokenizer that was not trained here, such as an imported model's."""

    tokenizer_json: bytes
    eos_token_id: int


def load_given_tokenizer(
    path: Path | None, *, vocab_size: int | None, eos_token_id: int | None
) -> GivenTokenizer | None:
    """The tokenizer of --tokenizer, None without one. Raises UsageError, CorruptDataError for
    anything but byte-level BPE with that special token.
    """
    if path is None and eos_token_id is None:
        return None
    if path is None or eos_token_id is None or vocab_size is not None:
        raise UsageError(
            f"--tokenizer {path}, --eos-token-id {eos_token_id}, --vocab-size {vocab_size}",
            allowed="--tokenizer and --eos-token-id together, and then no --vocab-size",
            remedy="`muster-peer import` prints both",
        )
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"cannot read {path}: {error.strerror or error}",
            allowed="a tokenizer.json",
            remedy="check the path",
        ) from error
    table = token_bytes_table(data)
    special = [token for token, text in enumerate(table) if not text]
    if eos_token_id not in special:
        raise UsageError(
            f"--eos-token-id {eos_token_id}",
            allowed=f"a special token of {path}: {', '.join(map(str, special[:8])) or 'none'}",
            remedy="name the one that ends a document",
        )
    return GivenTokenizer(tokenizer_json=data, eos_token_id=eos_token_id)


def check_vocab_size(vocab_size: int) -> None:
    """Raise UsageError for a vocabulary that cannot hold all bytes or is absurdly large."""
    if not MIN_VOCAB_SIZE <= vocab_size <= MAX_VOCAB_SIZE:
        raise UsageError(
            f"vocabulary of {vocab_size} entries",
            allowed=f"{MIN_VOCAB_SIZE} to {MAX_VOCAB_SIZE}",
            remedy=f"use {DEFAULT_VOCAB_SIZE} for small corpora",
        )


def load_tokenizer(tokenizer_json: bytes) -> Tokenizer:
    """Tokenizer that takes text literally, the name of the end of a document included.

    The caller has checked the digest. Raises CorruptDataError for bytes that are no tokenizer at
    all.
    """
    try:
        is_tokenizer = "model" in json.loads(tokenizer_json)
    except (ValueError, TypeError):
        is_tokenizer = False
    if not is_tokenizer:
        raise CorruptDataError(
            f"{len(tokenizer_json)} bytes that are not a tokenizer.json",
            allowed="what train_tokenizer wrote",
            remedy="build the corpus again",
        )
    tokenizer = Tokenizer.from_str(tokenizer_json.decode())
    tokenizer.encode_special_tokens = True
    return tokenizer


def encode_documents(
    tokenizer: Tokenizer,
    texts: Iterable[str],
    *,
    dtype: npt.DTypeLike,
    eos_token_id: int = EOS_TOKEN_ID,
) -> Iterator[npt.NDArray[np.unsignedinteger]]:
    """Token ids of each text in order, each ended by the end-of-document token."""
    for batch in _batches(texts):
        segments = [list(split_segments(text)) for text in batch]
        flat = [segment for parts in segments for segment in parts]
        encodings = iter(tokenizer.encode_batch_fast(flat, add_special_tokens=False))
        for parts in segments:
            ids = [next(encodings).ids for _ in parts]
            joined = [np.asarray(part, dtype=dtype) for part in [*ids, [eos_token_id]]]
            yield np.concatenate(joined)


def split_segments(text: str) -> Iterator[str]:
    """Cut a long text after line ends, each piece about SEGMENT_CHARS long; a line is never cut
    unless it is longer.
    """
    begin = 0
    while len(text) - begin > SEGMENT_CHARS:
        end = text.rfind("\n", begin, begin + SEGMENT_CHARS) + 1
        if end <= begin:
            end = begin + SEGMENT_CHARS
        yield text[begin:end]
        begin = end
    yield text[begin:]


def take_sample(
    num_bytes: Sequence[int], load_text: Callable[[int], str], *, max_bytes: int = MAX_SAMPLE_BYTES
) -> Iterator[str]:
    """Texts in order until `max_bytes` are reached; long texts give only their beginning."""
    left_bytes = max_bytes
    per_text_bytes = max(max_bytes // 4, max_bytes // max(1, len(num_bytes)))
    for index, size_bytes in enumerate(num_bytes):
        if left_bytes <= 0:
            return
        limit_bytes = min(left_bytes, per_text_bytes)
        text = load_text(index)
        if size_bytes > limit_bytes:
            text = text.encode()[:limit_bytes].decode(errors="ignore")
        yield from split_segments(text)
        left_bytes -= min(size_bytes, limit_bytes)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    num_chars = 0
    for text in texts:
        batch.append(text)
        num_chars += len(text)
        if num_chars >= _BATCH_CHARS:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch
