"""Tokenizer: exact round trips, the same bytes every time, nothing special in ordinary text."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from coordinator.corpus.tokenizer import (
    EOS_TOKEN,
    EOS_TOKEN_ID,
    SEGMENT_CHARS,
    encode_documents,
    load_tokenizer,
    split_segments,
    take_sample,
    train_tokenizer,
)
from protos.contract.chunk_format import token_byte_lengths, token_bytes_table
from protos.contract.errors import CorruptDataError, UsageError
from tests.coordinator.corpus.texts import made_up_text

SAMPLE = [made_up_text(seed, num_words=400) for seed in range(8)]


@pytest.fixture(scope="module")
def tokenizer_json() -> bytes:
    """A small trained tokenizer."""
    return train_tokenizer(SAMPLE, vocab_size=400)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_json: bytes) -> Tokenizer:
    """The same, loaded."""
    return load_tokenizer(tokenizer_json)


def encode_one(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of one document without the end."""
    (tokens,) = encode_documents(tokenizer, [text], dtype="<u2")
    assert tokens[-1] == EOS_TOKEN_ID
    return [int(token) for token in tokens[:-1]]


def test_training_is_deterministic(tokenizer_json: bytes) -> None:
    again = train_tokenizer(reversed(SAMPLE), vocab_size=400)
    assert hashlib.sha256(again).digest() == hashlib.sha256(tokenizer_json).digest()


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=200))
def test_any_text_round_trips(tokenizer: Tokenizer, tokenizer_json: bytes, text: str) -> None:
    ids = encode_one(tokenizer, text)
    table = token_bytes_table(tokenizer_json)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert b"".join(table[token] for token in ids) == text.encode()
    assert token_byte_lengths(tokenizer_json)[ids].sum() == len(text.encode())


def test_the_name_of_the_end_is_ordinary_text(tokenizer: Tokenizer) -> None:
    ids = encode_one(tokenizer, f"a {EOS_TOKEN} b")
    assert EOS_TOKEN_ID not in ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == f"a {EOS_TOKEN} b"


def test_the_end_of_a_document_has_no_bytes(tokenizer_json: bytes) -> None:
    lengths = token_byte_lengths(tokenizer_json)
    assert lengths[EOS_TOKEN_ID] == 0
    assert (np.delete(lengths, EOS_TOKEN_ID) > 0).all()
    assert lengths.size == 400


def test_long_documents_are_cut_at_line_ends(tokenizer: Tokenizer) -> None:
    text = made_up_text(99, num_words=SEGMENT_CHARS // 4)
    segments = list(split_segments(text))
    assert len(segments) > 1
    assert "".join(segments) == text
    assert all(segment.endswith("\n") for segment in segments)
    assert tokenizer.decode(encode_one(tokenizer, text)) == text
    one_line = "x" * (2 * SEGMENT_CHARS + 1)
    assert [len(part) for part in split_segments(one_line)] == [SEGMENT_CHARS, SEGMENT_CHARS, 1]


def test_the_sample_is_bounded() -> None:
    texts = ["\u00e4" * 50, "b" * 100, "c" * 100]
    loaded: list[int] = []

    def load_text(index: int) -> str:
        loaded.append(index)
        return texts[index]

    sample = list(take_sample([100, 100, 100], load_text, max_bytes=120))
    assert sum(len(text.encode()) for text in sample) <= 120
    assert sample[0] == "\u00e4" * 20
    assert list(take_sample([100], load_text, max_bytes=1_000)) == ["\u00e4" * 50]
    loaded.clear()
    assert len(list(take_sample([100, 100, 100], load_text, max_bytes=40))) == 3


def test_impossible_vocabularies_are_refused() -> None:
    with pytest.raises(UsageError, match="vocabulary of 256"):
        train_tokenizer(SAMPLE, vocab_size=256)


def test_bytes_that_are_no_tokenizer_are_refused() -> None:
    for data in (b"", b"{}", b"[1]", b"7", b"\xff"):
        with pytest.raises(CorruptDataError):
            load_tokenizer(data)
        with pytest.raises(CorruptDataError):
            token_bytes_table(data)
