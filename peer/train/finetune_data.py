"""Examples to fine-tune on: running text, prompts with answers, labelled texts.

Text is cut into windows. JSON lines are {"prompt": ..., "answer": ...}, of which only the answer
and the end after it are predicted, or {"text": ..., "label": ...}. What is too long for the model's
window is left out and counted; the last tenth of the examples, at least one, is held out.

Letters: B sequences, T positions.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from peer.model.objectives import IGNORED
from protos.contract.answer_records import ANSWER_KEYS, LABEL_KEYS, parse_rows
from protos.contract.chunk_format import Int64Array
from protos.contract.errors import UsageError
from protos.contract.text import counted

Encode = Callable[[str], list[int]]
"""Text -> token ids, without special tokens."""
_HELDOUT_SHARE = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One sequence."""

    tokens: tuple[int, ...]
    num_unpredicted: int = 1
    """Tokens at the beginning that are given; the rest is predicted."""
    label: int = -1
    """Class, for classification."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningSet:
    """Examples of one kind."""

    training: tuple[Example, ...]
    heldout: tuple[Example, ...]
    num_too_long: int
    class_names: tuple[str, ...] = ()
    """Empty unless the examples are labelled."""
    data_digest: str = ""
    """SHA-256 of the bytes that were read, in hexadecimal."""


def load_tuning_set(
    path: Path,
    *,
    encode: Encode,
    eos_token_id: int,
    seq_len: int,
    is_labelled: bool = False,
    seed: int = 0,
) -> TuningSet:
    """Examples of a text file, or of a .jsonl file. Labelled ones are shuffled with `seed` before
    some are held out, for files are often sorted by label. Raises UsageError with the line that is
    wrong.
    """
    try:
        data = path.read_bytes()
        text = data.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"cannot read {path}: {error}",
            allowed="a UTF-8 text file, or JSON lines in a .jsonl file",
            remedy="check the path",
        ) from error
    if not text.strip():
        raise UsageError(
            f"{path} holds no text",
            allowed="text of more than one window, or two lines of JSON in a .jsonl file",
            remedy="write what to train on into it",
        )
    if path.suffix == ".jsonl":
        rows = parse_rows(text, keys=LABEL_KEYS if is_labelled else ANSWER_KEYS, where=path)
    elif is_labelled:
        raise UsageError(
            f"{path} is not a .jsonl file",
            allowed='lines of {"text": ..., "label": ...} to classify',
            remedy="write it so",
        )
    else:
        found_set = _from_text(path, [eos_token_id, *encode(text), eos_token_id], seq_len)
        return replace(found_set, data_digest=hashlib.sha256(data).hexdigest())
    names = tuple(sorted({row.second for row in rows})) if is_labelled else ()
    found = []
    for _, first, second in rows:
        given = [eos_token_id, *encode(first)]
        if is_labelled:
            found.append(Example(tokens=tuple(given), label=names.index(second)))
        else:
            tokens = (*given, *encode(second), eos_token_id)
            found.append(Example(tokens=tokens, num_unpredicted=len(given)))
    room = seq_len if is_labelled else seq_len + 1
    fitting = [example for example in found if len(example.tokens) <= room]
    if is_labelled and len(names) < 2:
        raise UsageError(
            f"{path} has {len(names)} different labels",
            allowed="at least two",
            remedy="add examples of other classes",
        )
    if is_labelled:
        order = np.random.Generator(np.random.Philox(key=seed)).permutation(len(fitting))
        fitting = [fitting[index] for index in order]
    found_set = _split(path, fitting, num_too_long=len(found) - len(fitting), class_names=names)
    return replace(found_set, data_digest=hashlib.sha256(data).hexdigest())


def batch_of(examples: Sequence[Example], *, pad_token_id: int) -> tuple[Int64Array, Int64Array]:
    """(inputs_BT, labels_BT), padded on the right, where nothing is predicted."""
    longest = max(len(example.tokens) for example in examples) - 1
    inputs_BT = np.full((len(examples), longest), pad_token_id, np.int64)
    labels_BT = np.full((len(examples), longest), IGNORED, np.int64)
    for row, example in enumerate(examples):
        tokens = np.asarray(example.tokens)
        inputs_BT[row, : tokens.size - 1] = tokens[:-1]
        begin = example.num_unpredicted
        labels_BT[row, begin - 1 : tokens.size - 1] = tokens[begin:]
    return inputs_BT, labels_BT


def labelled_batch_of(
    examples: Sequence[Example], *, pad_token_id: int
) -> tuple[Int64Array, Int64Array, Int64Array]:
    """(inputs_BT, index of each row's last token, class of each row), padded on the right."""
    sizes_B = np.array([len(example.tokens) for example in examples])
    inputs_BT = np.full((len(examples), int(sizes_B.max())), pad_token_id, np.int64)
    for row, example in enumerate(examples):
        inputs_BT[row, : sizes_B[row]] = example.tokens
    return inputs_BT, sizes_B - 1, np.array([example.label for example in examples])


def _from_text(path: Path, ids: list[int], seq_len: int) -> TuningSet:
    pieces = [ids[begin : begin + seq_len + 1] for begin in range(0, len(ids) - 1, seq_len)]
    return _split(path, [Example(tokens=tuple(piece)) for piece in pieces], num_too_long=0)


def _split(
    path: Path,
    examples: Sequence[Example],
    *,
    num_too_long: int,
    class_names: tuple[str, ...] = (),
) -> TuningSet:
    num_heldout = max(1, len(examples) // _HELDOUT_SHARE)
    if len(examples) < 2:
        too_long = f"; {num_too_long} of its lines too long for the window" if num_too_long else ""
        raise UsageError(
            f"{path} gives {counted(len(examples), 'example')}{too_long}",
            allowed="at least two: one to train on, one held out",
            remedy="add text, or shorten prompts and answers",
        )
    return TuningSet(
        training=tuple(examples[:-num_heldout]),
        heldout=tuple(examples[-num_heldout:]),
        num_too_long=num_too_long,
        class_names=class_names,
    )
