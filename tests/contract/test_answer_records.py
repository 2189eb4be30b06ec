"""Prompts and answers: lines as they are read, windows by hand, any records there and back."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos.contract.answer_records import (
    ANSWER_KEYS,
    LABEL_KEYS,
    check_objective,
    num_window_tokens,
    pack_windows,
    parse_rows,
    unpack_windows,
)
from protos.contract.chunk_format import Int64Array, Manifest, windows_from_chunk
from protos.contract.errors import CorruptDataError, UsageError
from tests.contract.test_chunk_format import ENTRY, GOLDEN_DATASET_ID, MANIFEST

EOS = 9
RECORDS = [([1, 2], [3]), ([], [4, 5]), ([6], [7, 8]), ([1, 1, 1], [2, 2, 2])]
"""Of 5, 4, 5 and 8 tokens in a window."""


def chunk_of(windows_WT: Int64Array) -> Int64Array:
    return np.append(windows_WT.ravel(), EOS)


def test_windows_by_hand() -> None:
    """Two records need ten tokens of nine, so the second begins a window; the last record fills its
    own, and the chunk's last token is its end.
    """
    windows_WT = pack_windows([*RECORDS[:1], *RECORDS[2:]], seq_len=8, eos_token_id=EOS)
    assert windows_WT.tolist() == [
        [EOS, 1, 2, EOS, 3, EOS, EOS, EOS],
        [EOS, 6, EOS, 7, 8, EOS, EOS, EOS],
        [EOS, 1, 1, 1, EOS, 2, 2, 2],
    ]
    chunk = chunk_of(windows_WT)
    inputs_BT, labels_BT = windows_from_chunk(chunk.astype(np.uint16), 8, [0, 1, 2])
    found = unpack_windows(np.concatenate([inputs_BT, labels_BT[:, -1:]], axis=1))
    assert found.tokens_BL.tolist() == [
        [EOS, 1, 2, 3, EOS, EOS, EOS, EOS, EOS],
        [EOS, 6, 7, 8, EOS, EOS, EOS, EOS, EOS],
        [EOS, 1, 1, 1, 2, 2, 2, EOS, EOS],
    ]
    assert found.is_answer_BL.astype(int).tolist() == [
        [0, 0, 0, 1, 1, 0, 0, 0, 0],
        [0, 0, 1, 1, 1, 0, 0, 0, 0],
        [0, 0, 0, 0, 1, 1, 1, 1, 0],
    ]
    assert found.records_BL[2].tolist() == [0, 0, 0, 0, 0, 0, 0, 1, 0]


def test_the_end_between_two_records_is_predicted_and_begins_the_later_one() -> None:
    windows_WT = pack_windows(RECORDS[:2], seq_len=9, eos_token_id=EOS)
    assert windows_WT.tolist() == [[EOS, 1, 2, EOS, 3, EOS, EOS, 4, 5]]
    found = unpack_windows(np.append(windows_WT, [[EOS]], axis=1))
    assert found.tokens_BL.tolist() == [[EOS, 1, 2, 3, EOS, 4, 5, EOS, EOS, EOS]]
    assert found.is_answer_BL.astype(int).tolist() == [[0, 0, 0, 1, 1, 1, 1, 1, 0, 0]]
    assert found.records_BL[0, :8].tolist() == [0, 0, 0, 0, 1, 1, 1, 2]


texts = st.lists(st.integers(0, 8), max_size=5)


@given(
    records=st.lists(st.tuples(texts, texts.filter(bool)), min_size=1, max_size=12),
    seq_len=st.integers(12, 30),
)
def test_any_records_come_back_whole(
    records: list[tuple[list[int], list[int]]], seq_len: int
) -> None:
    """In their order, `EOS prompt answer EOS` each, with nothing but answers and ends predicted."""
    windows_WT = pack_windows(records, seq_len=seq_len, eos_token_id=EOS)
    following = np.append(windows_WT[1:, 0], EOS)
    found = unpack_windows(np.append(windows_WT, following[:, None], axis=1))
    is_eos_BL = found.tokens_BL == EOS
    back = []
    for row in range(len(windows_WT)):
        for number in np.unique(found.records_BL[row][found.is_answer_BL[row] & ~is_eos_BL[row]]):
            is_own = (found.records_BL[row] == number) & ~is_eos_BL[row]
            prompt, answer = (
                found.tokens_BL[row][is_own & (found.is_answer_BL[row] == is_answered)].tolist()
                for is_answered in (False, True)
            )
            back.append((prompt, answer))
    assert back == records
    assert (found.is_answer_BL & is_eos_BL).sum() == len(records), "one end each"
    assert (found.tokens_BL[:, 0] == EOS).all() and not found.is_answer_BL[:, 0].any()


@pytest.mark.parametrize("record", [([1] * 7, [2]), ([1], [])])
def test_what_cannot_be_packed(record: tuple[list[int], list[int]]) -> None:
    assert num_window_tokens(([1] * 6, [2])) == 9
    with pytest.raises(ValueError, match="in a window of 9"):
        pack_windows([record], seq_len=9, eos_token_id=EOS)


def test_lines() -> None:
    text = '\ufeff{"prompt": "a", "answer": "b"}\r\n\n{"prompt": "", "answer": 3, "x": []}\n'
    rows = parse_rows(text, keys=ANSWER_KEYS, where="d")
    assert rows == [(1, "a", "b"), (3, "", "3")]
    assert parse_rows('{"text": "a", "label": " "}', keys=LABEL_KEYS, where="d") == [(1, "a", " ")]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ('{"prompt": "a"}', "no key answer"),
        ('{"prompt": "a", "answer": ""}', "an empty answer"),
        ('{"prompt": "a", "answer": "  "}', "an empty answer"),
        ('{"prompt": "a", "answer": true}', "answer is true"),
        ('{"prompt": "a", "answer": 0.5}', "answer is a number"),
        ('{"prompt": null, "answer": "b"}', "prompt is null"),
        ('{"prompt": "\\ud800", "answer": "b"}', "half of a surrogate pair, which is no text"),
        ("[1]", "a list"),
        ('"a"', "a text"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_lines_that_are_refused(line: str, found: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse_rows(f"\n{line}\n", keys=ANSWER_KEYS, where="d")
    assert refused.value.found == f"d, line 2: {found}"
    assert "prompt" in refused.value.allowed and refused.value.remedy


def test_the_manifest_says_how_long_windows_are_and_others_keep_their_digest() -> None:
    answers = replace(MANIFEST, answer_seq_len=4, training_chunks=(replace(ENTRY, num_tokens=9),))
    assert answers.dataset_id != GOLDEN_DATASET_ID == MANIFEST.dataset_id
    assert Manifest.from_bytes(answers.to_bytes()) == answers
    assert b"answer_seq_len" not in MANIFEST.to_bytes()
    for changes in ({"training_chunks": (ENTRY,)}, {"answer_seq_len": 3}, {"answer_seq_len": -1}):
        with pytest.raises(CorruptDataError, match="manifest"):
            replace(answers, **changes)
    check_objective(answers, objective="answers", seq_len=4)
    check_objective(MANIFEST, objective="masked", seq_len=4)
    for manifest, name, seq_len, said in (
        (MANIFEST, "answers", 4, "--answers 4"),
        (answers, "causal", 4, "objective.name=answers"),
        (answers, "answers", 8, "model.seq_len=4"),
    ):
        with pytest.raises(UsageError) as refused:
            check_objective(manifest, objective=name, seq_len=seq_len)
        assert said in refused.value.remedy
