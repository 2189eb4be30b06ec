"""Datasets of prompts and answers: .jsonl sources to windows of whole records.

The records are those of `muster-peer finetune`, in the same tokens: prompt and answer are encoded
apart, and special tokens that the text spells count as such, for prompts are often laid out with
them. All of them are encoded, once, before anything is written, for what is too long is refused
with its line rather than cut; until then the windows are kept, 2 or 4 bytes a token. What is no
record is refused before the first is encoded: reading lines takes a small part of that time.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from coordinator.corpus.sources import Document
from coordinator.corpus.split import Part, Split
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

_ROWS_AT_ONCE = 1_000
"""Encoded together; what the tokenizer says of each token besides its id takes much memory."""


def pack_answers(
    splits: Sequence[Split],
    given: GivenTokenizer | None,
    *,
    seq_len: int,
    chunk_bytes: int,
    on_done_ratio: Callable[[float], None],
) -> dict[Part, TokenArray]:
    """Whole windows of the records of every part. Raises UsageError unless every record can be
    packed into windows of `seq_len` tokens.
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
    tokenizer = load_tokenizer(given.tokenizer_json)
    tokenizer.encode_special_tokens = False
    parts_by_document: dict[Document, list[Part]] = {}
    for split in splits:
        for part in (*split.training, *split.heldout):
            parts_by_document.setdefault(part.document, []).append(part)
    for document in list(parts_by_document)[1:]:  # the first is read next in any case
        parse_rows(document.load_text(), keys=ANSWER_KEYS, where=document.path)
    total_bytes = sum(document.num_text_bytes for document in parts_by_document)
    done_bytes = 0
    windows_by_part = {}
    for document, parts in parts_by_document.items():
        text = document.load_text()
        rows = parse_rows(text, keys=ANSWER_KEYS, where=document.path)
        records: list[TokenRecord] = []
        for begin in range(0, len(rows), _ROWS_AT_ONCE):
            records += _encode(tokenizer, rows[begin : begin + _ROWS_AT_ONCE], dtype=dtype)
            done = document.num_text_bytes * len(records) / len(rows)
            on_done_ratio((done_bytes + done) / total_bytes)
        done_bytes += document.num_text_bytes
        _check_rows(document.path, rows, records, seq_len=seq_len, given=given)
        for part in parts:
            lines = part.line_numbers(text)
            own = [
                record
                for row, record in zip(rows, records, strict=True)
                if row.line_number in lines
            ]
            windows_WT = pack_windows(own, seq_len=seq_len, eos_token_id=given.eos_token_id)
            windows_by_part[part] = windows_WT.ravel().astype(dtype)
    return windows_by_part


def _encode(
    tokenizer: Tokenizer, rows: Sequence[Row], *, dtype: npt.DTypeLike
) -> list[TokenRecord]:
    texts = [text for row in rows for text in (row.first, row.second)]
    found = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    ids = [np.array(encoding.ids, dtype) for encoding in found]
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
        if given.eos_token_id in prompt or given.eos_token_id in answer or not len(answer):
            raise UsageError(
                f"{path}, line {row.line_number}: "
                + (f"token {given.eos_token_id} inside the record" if len(answer) else "no answer"),
                allowed="that token only where a record ends, which the builder adds; an answer of "
                "at least one token",
                remedy="correct that line",
            )
