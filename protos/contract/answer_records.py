"""Records of a prompt and its answer: as JSON lines, and as they lie in the windows of a dataset.

A window holds whole records: `EOS prompt EOS answer EOS prompt EOS answer EOS ...`, and EOS where
the next record does not fit. So a window's first token names the one that separates, an odd one of
them stands before an answer and an even one ends it, and which tokens are answers follows from the
window alone, whatever tokenizer it is. The EOS before an answer only marks it: a model reads `EOS
prompt answer EOS`, the same as in fine-tuning on one machine (peer/train/finetune_data.py).

A chunk is whole windows and an EOS, the last window's last label; the manifest says how long they
are. Letters: B windows, T positions, L = T + 1 tokens (the last is a label only), W windows.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from protos.contract.chunk_format import Int64Array, Manifest, TokenArray
from protos.contract.errors import UsageError
from protos.contract.run_spec import Objective

ANSWER_KEYS = ("prompt", "answer")
LABEL_KEYS = ("text", "label")

TokenRecord = tuple[Sequence[int] | TokenArray, Sequence[int] | TokenArray]
"""Ids of a prompt and of its answer, without special tokens of their own."""


class Row(NamedTuple):
    """Two texts of one line."""

    line_number: int
    """From 1."""
    first: str
    """Prompt, or text."""
    second: str
    """Answer, or label."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnpackedWindows:
    """What a model reads of windows: the marks before answers are moved behind the records."""

    tokens_BL: Int64Array
    is_answer_BL: npt.NDArray[np.bool_]
    """True for tokens of an answer and the EOS that ends it."""
    records_BL: Int64Array
    """Number of the record in the window; the EOS between two begins the later one."""


def parse_rows(text: str, *, keys: tuple[str, str], where: object) -> list[Row]:
    """Rows of JSON lines; empty lines are passed over. Raises UsageError that names the line of
    `where` that is wrong.
    """
    rows = []
    for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), start=1):
        if not line.strip():
            continue
        found, first, second = _read_row(line, keys)
        if found:
            raise UsageError(
                f"{where}, line {number}: {found}",
                allowed=f'{{"{keys[0]}": TEXT, "{keys[1]}": TEXT}} on each line',
                remedy="correct that line; `muster-peer finetune --classify` wants text and label, "
                "all else prompt and answer",
            )
        rows.append(Row(number, first, second))
    return rows


def _read_row(line: str, keys: tuple[str, str]) -> tuple[str, str, str]:
    """What is wrong with a line ("": nothing), and its two texts."""
    try:
        plain: Any = json.loads(line)
    except (ValueError, RecursionError):
        return "not JSON", "", ""
    if not isinstance(plain, dict):
        return _kind_of(plain), "", ""
    for key in keys:
        if key not in plain:
            return f"no key {key}", "", ""
    first, second = (plain[key] for key in keys)
    if not isinstance(first, str):
        return f"{keys[0]} is {_kind_of(first)}", "", ""
    if type(second) not in (str, int):  # a bool would become Python's word for it
        return f"{keys[1]} is {_kind_of(second)}", "", ""
    second = str(second)
    if keys == ANSWER_KEYS and not second.strip():
        return "an empty answer", "", ""
    try:
        f"{first}{second}".encode()
    except UnicodeEncodeError:
        return "half of a surrogate pair, which is no text", "", ""
    return "", first, second


def _kind_of(plain: Any) -> str:
    if plain is None or isinstance(plain, bool):
        return json.dumps(plain)
    names = ((dict, "an object"), (list, "a list"), (str, "a text"))
    return next((name for kind, name in names if isinstance(plain, kind)), "a number")


def num_window_tokens(record: TokenRecord) -> int:
    """Positions of a window that a record takes; a window of T has room for T."""
    return len(record[0]) + len(record[1]) + 2


def pack_windows(records: Sequence[TokenRecord], *, seq_len: int, eos_token_id: int) -> Int64Array:
    """windows_WT: records in their order, each in the first window that has room after the one
    before. Raises ValueError for a record that no window has room for, or without an answer.
    """
    places: list[tuple[int, int]] = []
    num_windows, end = 0, seq_len + 1
    for record in records:
        prompt, answer = record
        size = num_window_tokens(record)
        if size > seq_len or not len(answer):
            raise ValueError(f"{len(prompt)} and {len(answer)} tokens in a window of {seq_len}")
        if end + size > seq_len + 1:
            num_windows, end = num_windows + 1, 1
        places.append((num_windows - 1, end))
        end += size
    windows_WT = np.full((num_windows, seq_len), eos_token_id, np.int64)
    for (window, begin), (prompt, answer) in zip(places, records, strict=True):
        windows_WT[window, begin : begin + len(prompt)] = prompt
        begin += len(prompt) + 1
        windows_WT[window, begin : begin + len(answer)] = answer
    return windows_WT


def unpack_windows(tokens_BL: Int64Array) -> UnpackedWindows:
    """What `pack_windows` has packed, with the token that follows each window."""
    is_eos_BL = tokens_BL == tokens_BL[:, :1]
    number_BL = np.cumsum(is_eos_BL, axis=1) - 1
    is_marked_BL = number_BL % 2 == 1
    is_end_BL = is_eos_BL & ~is_marked_BL
    is_end_BL[:, 1:] &= ~is_eos_BL[:, :-1]  # nothing is answered where nothing fitted any more
    is_end_BL[:, 0] = False
    is_answer_BL = (is_marked_BL & ~is_eos_BL) | is_end_BL
    order_BL = np.argsort(is_marked_BL & is_eos_BL, axis=1, kind="stable")

    def ordered(values_BL: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.take_along_axis(values_BL, order_BL, axis=1)

    return UnpackedWindows(
        tokens_BL=ordered(tokens_BL),
        is_answer_BL=ordered(is_answer_BL),
        records_BL=ordered(number_BL // 2),
    )


def check_objective(manifest: Manifest, *, objective: str, seq_len: int) -> None:
    """Raise UsageError unless dataset and objective both are about answers, in windows of one
    length, or both about running text. The remedies are right for whoever chooses one of the two.
    """
    has_answers = objective == Objective.ANSWERS
    if has_answers and not manifest.answer_seq_len:
        raise UsageError(
            f"objective.name = {objective} over a dataset of running text",
            allowed="datasets of prompts and answers",
            remedy=f"build one with `corpus build FILE.jsonl --answers {seq_len} --tokenizer FILE "
            "--eos-token-id N`",
        )
    if manifest.answer_seq_len and not has_answers:
        raise UsageError(
            f"objective.name = {objective} over a dataset of prompts and answers",
            allowed=f"the objective {Objective.ANSWERS}",
            remedy=f"a run over it takes objective.name={Objective.ANSWERS}; for {objective} build "
            "a dataset of text",
        )
    if has_answers and seq_len != manifest.answer_seq_len:
        raise UsageError(
            f"model.seq_len = {seq_len}",
            allowed=f"{manifest.answer_seq_len}: the dataset's answers were packed into windows of "
            "that length",
            remedy=f"`corpus build FILE.jsonl --answers {seq_len}` makes one for this model; a run "
            f"over this one takes model.seq_len={manifest.answer_seq_len}",
        )
