"""Datasets of prompts and answers: .jsonl sources to windows of whole records.

The records are those of `muster-peer finetune`, in the same tokens: prompt and answer are encoded
apart, and special tokens that the text spells count as such, for prompts are often laid out with
them. All of them are checked before anything is built, for what is too long is refused with its
line rather than cut.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from coordinator.corpus.sources import Source
from coordinator.corpus.tokenizer import GivenTokenizer, load_tokenizer
from protos.contract.answer_records import (
    ANSWER_KEYS,
    Row,
    TokenRecord,
    num_window_tokens,
    pack_windows,
    parse_rows,
)
from protos.contract.chunk_format import (
    MIN_ANSWER_SEQ_LEN,
    TokenArray,
    token_byte_lengths,
    token_dtype_for,
)
from protos.contract.errors import UsageError


def check_answers(
    sources: Sequence[Source], given: GivenTokenizer | None, *, seq_len: int, chunk_bytes: int
) -> None:
    """Raise UsageError unless every record of the sources can be packed into windows of `seq_len`
    tokens.
    """
    if given is None:
        raise UsageError(
            "--answers without --tokenizer",
            allowed="the tokenizer of the model that is to be trained on",
            remedy="name the tokenizer.json that `muster-peer import` wrote, and --eos-token-id",
        )
    dtype = np.dtype(token_dtype_for(token_byte_lengths(given.tokenizer_json).size))
    largest = chunk_bytes // dtype.itemsize - 1
    if not MIN_ANSWER_SEQ_LEN <= seq_len <= largest:
        raise UsageError(
            f"--answers {seq_len}",
            allowed=f"windows of {MIN_ANSWER_SEQ_LEN} to {largest} tokens, so that a chunk of "
            f"{chunk_bytes} bytes holds one",
            remedy="give the model's seq_len",
        )
    tokenizer = _load(given.tokenizer_json)
    for source in sources:
        for document in source.documents:
            rows = parse_rows(document.load_text(), keys=ANSWER_KEYS, where=document.path)
            _check_rows(document.path, rows, _encode(tokenizer, rows), seq_len=seq_len, given=given)


def encode_answers(
    tokenizer_json: bytes,
    texts: Iterable[str],
    *,
    dtype: npt.DTypeLike,
    eos_token_id: int,
    seq_len: int,
) -> Iterator[TokenArray]:
    """Whole windows of the records of each text, which `check_answers` has passed."""
    tokenizer = _load(tokenizer_json)
    for text in texts:
        rows = parse_rows(text, keys=ANSWER_KEYS, where="source")
        windows_WT = pack_windows(
            _encode(tokenizer, rows), seq_len=seq_len, eos_token_id=eos_token_id
        )
        yield windows_WT.ravel().astype(dtype)


def _load(tokenizer_json: bytes) -> Tokenizer:
    tokenizer = load_tokenizer(tokenizer_json)
    tokenizer.encode_special_tokens = False
    return tokenizer


def _encode(tokenizer: Tokenizer, rows: Sequence[Row]) -> list[TokenRecord]:
    texts = [text for row in rows for text in (row.first, row.second)]
    ids = [found.ids for found in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    return list(zip(ids[::2], ids[1::2], strict=True))


def _check_rows(
    path: Path,
    rows: Sequence[Row],
    records: Sequence[TokenRecord],
    *,
    seq_len: int,
    given: GivenTokenizer,
) -> None:
    pairs = list(zip(rows, records, strict=True))
    too_long = [pair for pair in pairs if num_window_tokens(pair[1]) > seq_len]
    if too_long:
        row, record = too_long[0]
        raise UsageError(
            f"{path}, line {row.line_number}: a prompt of {len(record[0])} tokens and an answer of "
            f"{len(record[1])}; {len(too_long)} of {len(rows)} records are too long",
            allowed=f"{seq_len - 2} tokens in both, for windows of {seq_len}",
            remedy="shorten them, take them out, or build for a larger --answers",
        )
    for row, (prompt, answer) in pairs:
        if given.eos_token_id in prompt or given.eos_token_id in answer or not answer:
            raise UsageError(
                f"{path}, line {row.line_number}: "
                + (f"token {given.eos_token_id} inside the record" if answer else "no answer"),
                allowed="that token only where a record ends, which the builder adds; an answer of "
                "at least one token",
                remedy="correct that line",
            )
