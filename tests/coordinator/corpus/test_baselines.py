"""Baselines against figures that can be worked out by hand, and on the default corpus."""

import gzip
import math
from pathlib import Path

import numpy as np
import pytest

from coordinator.corpus.baselines import (
    bigram_bits_per_byte,
    compute_baselines,
    gzip_bits_per_byte,
    spread_chunks,
)
from coordinator.corpus.build import build_corpus
from tests.coordinator.corpus.texts import write_folder


def test_gzip_is_the_size_of_the_whole_text() -> None:
    text = b"abcabcabd" * 100
    assert gzip_bits_per_byte(text) == len(gzip.compress(text, 9)) * 8 / len(text)
    with pytest.raises(ValueError, match="no held-out text"):
        gzip_bits_per_byte(b"")


def test_a_predictable_chain_costs_next_to_nothing() -> None:
    chain = np.tile(np.arange(8, dtype=np.uint16), 2_000)
    bits = bigram_bits_per_byte([chain], [chain[:4_000]], vocab_size=8, num_heldout_bytes=4_000)
    assert bits < 0.01


def test_random_tokens_cost_their_entropy() -> None:
    generator = np.random.Generator(np.random.Philox(key=1))
    tokens = generator.integers(0, 16, size=60_000).astype(np.uint16)
    bits = bigram_bits_per_byte(
        [tokens[:30_000], tokens[30_000:50_000]],
        [tokens[50_000:]],
        vocab_size=16,
        num_heldout_bytes=10_000,
    )
    assert bits == pytest.approx(math.log2(16), abs=0.03)


def test_unseen_tokens_are_possible() -> None:
    training = np.zeros(1_000, dtype=np.uint16)
    heldout = np.array([0, 5, 0, 5], dtype=np.uint16)
    bits = bigram_bits_per_byte([training], [heldout], vocab_size=8, num_heldout_bytes=4)
    assert 5 < bits < 15


def test_large_corpora_are_sampled_evenly() -> None:
    chunks = [np.full(10, index, dtype=np.uint16) for index in range(10)]
    assert len(spread_chunks(chunks, max_tokens=1_000)) == 10
    assert [int(chunk[0]) for chunk in spread_chunks(chunks, max_tokens=30)] == [0, 4, 8]


def test_baselines_of_a_built_corpus(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "texts", num_files=40, num_words=150)
    manifest = build_corpus([str(folder)], tmp_path / "out", vocab_size=300, chunk_bytes=4_096)
    baselines = compute_baselines(tmp_path / "out")
    assert baselines.num_heldout_bytes == sum(c.num_bytes for c in manifest.heldout_chunks)
    assert baselines.num_heldout_tokens == sum(c.num_tokens for c in manifest.heldout_chunks)
    assert 0.5 < baselines.bigram_bits_per_byte < 5
    assert 0.5 < baselines.gzip_bits_per_byte < 5


@pytest.mark.slow
def test_the_default_corpus(tmp_path: Path) -> None:
    manifest = build_corpus(["stdlib:"], tmp_path / "out")
    assert manifest.vocab_size == 4_096
    assert manifest.sources[0].num_tokens > 1_500_000
    baselines = compute_baselines(tmp_path / "out")
    assert baselines.gzip_bits_per_byte == pytest.approx(1.9, abs=0.2)
    assert baselines.bigram_bits_per_byte == pytest.approx(1.8, abs=0.15)
    assert baselines.bigram_bits_per_byte < baselines.gzip_bits_per_byte
