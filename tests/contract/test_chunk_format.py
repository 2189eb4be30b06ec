"""Datasets: golden manifest, windows by hand, corruption."""

import dataclasses
import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos.contract.chunk_format import (
    ChunkEntry,
    Manifest,
    Source,
    chunk_from_tokens,
    heldout_chunk_path,
    num_windows,
    token_dtype_for,
    tokens_from_chunk,
    training_chunk_path,
    windows_from_chunk,
)
from protos.contract.errors import CorruptDataError

CHUNK = chunk_from_tokens([1, 2, 3, 258], vocab_size=300)
ENTRY = ChunkEntry(
    source_index=0, num_tokens=4, digest=hashlib.sha256(CHUNK).hexdigest(), num_bytes=11
)
MANIFEST = Manifest(
    vocab_size=300,
    eos_token_id=0,
    token_dtype="<u2",
    tokenizer_digest="12" * 32,
    chunk_bytes=64,
    seed=3,
    sources=(
        Source(
            name="docs",
            origin="stdlib:docs",
            licence="PSF-2.0",
            weight=1.0,
            num_documents=2,
            num_bytes=11,
            num_tokens=4,
        ),
    ),
    training_chunks=(ENTRY,),
    heldout_chunks=(),
)
GOLDEN_DATASET_ID = "04b1cb71bcd822aacdd5ee75917ec4d9a16c10cb4bb9983cad1e0be6b3998665"


def test_golden_bytes() -> None:
    assert CHUNK.hex() == "0100020003000201"
    assert chunk_from_tokens([1, 70_000], vocab_size=100_000).hex() == "0100000070110100"
    assert MANIFEST.dataset_id == GOLDEN_DATASET_ID
    assert MANIFEST.dataset_id == hashlib.sha256(MANIFEST.to_bytes()).hexdigest()
    assert training_chunk_path(7) == "chunks/train-000007.bin"
    assert heldout_chunk_path(0) == "chunks/heldout-000000.bin"
    assert (token_dtype_for(65_536), token_dtype_for(65_537)) == ("<u2", "<u4")


def test_manifest_survives_its_bytes() -> None:
    assert Manifest.from_bytes(MANIFEST.to_bytes()) == MANIFEST


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"weight":1.0', b'"weight":1'),
        (b'"weight":1.0', b'"weight":0.0'),
        (b'"vocab_size":300', b'"vocab_size":70000'),
        (b'"source_index":0', b'"source_index":1'),
        (b'"num_tokens":4,"source', b'"num_tokens":400,"source'),
        (b'"eos_token_id":0', b'"eos_token_id":300'),
        (b'"format_version":1', b'"format_version":2'),
        (b'"seed":3', b'"seed": 3'),
        (b'"seed":3', b'"sead":3'),
        (b'"sources":[', b'"sources":[3,'),
        (b"1212", b"121g"),
        (b"{", b""),
    ],
)
def test_changed_manifest_is_refused(old: bytes, new: bytes) -> None:
    data = MANIFEST.to_bytes()
    assert old in data
    with pytest.raises(CorruptDataError, match="manifest"):
        Manifest.from_bytes(data.replace(old, new, 1))


def test_chunk_is_read_back_and_corruption_is_named() -> None:
    tokens = tokens_from_chunk(CHUNK, manifest=MANIFEST, chunk=ENTRY)
    assert tokens.tolist() == [1, 2, 3, 258]
    with pytest.raises(CorruptDataError, match="7 bytes; 8 bytes"):
        tokens_from_chunk(CHUNK[:-1], manifest=MANIFEST, chunk=ENTRY)
    with pytest.raises(CorruptDataError, match="digest"):
        tokens_from_chunk(b"\0" + CHUNK[1:], manifest=MANIFEST, chunk=ENTRY)
    small = dataclasses.replace(MANIFEST, vocab_size=258)
    with pytest.raises(CorruptDataError, match="token 258"):
        tokens_from_chunk(CHUNK, manifest=small, chunk=ENTRY)


@pytest.mark.parametrize("token_ids", [[-1], [300]])
def test_tokens_outside_the_vocabulary_are_not_written(token_ids: list[int]) -> None:
    with pytest.raises(ValueError, match="outside the vocabulary of 300"):
        chunk_from_tokens(token_ids, vocab_size=300)


def test_windows_by_hand() -> None:
    tokens = np.arange(10, 20, dtype="<u2")
    inputs_BT, labels_BT = windows_from_chunk(tokens, 3, [2, 0])
    assert inputs_BT.tolist() == [[16, 17, 18], [10, 11, 12]]
    assert labels_BT.tolist() == [[17, 18, 19], [11, 12, 13]]
    assert inputs_BT.dtype == labels_BT.dtype == np.int64
    with pytest.raises(IndexError):
        windows_from_chunk(tokens, 3, [3])
    with pytest.raises(IndexError):
        windows_from_chunk(tokens, 3, [-1])
    assert windows_from_chunk(tokens, 3, [])[0].shape == (0, 3)


@given(num_tokens=st.integers(0, 200), seq_len=st.integers(1, 50))
def test_all_windows_lie_inside_and_predict_each_token_at_most_once(
    num_tokens: int, seq_len: int
) -> None:
    count = num_windows(num_tokens, seq_len)
    tokens = np.arange(num_tokens, dtype="<u2")
    inputs_BT, labels_BT = windows_from_chunk(tokens, seq_len, range(count))
    assert inputs_BT.reshape(-1).tolist() == list(range(count * seq_len))
    assert labels_BT.reshape(-1).tolist() == list(range(1, count * seq_len + 1))
    assert num_tokens - 1 - count * seq_len < seq_len or num_tokens == 0
