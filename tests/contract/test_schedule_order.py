"""Order of data: golden start, exactly once per pass, mixture within a chunk."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protos.contract.chunk_format import ChunkEntry, Manifest, Source
from protos.contract.errors import UsageError
from protos.contract.schedule_order import ScheduleOrder, philox_permutation


def build_manifest(weights: list[float], chunks: list[tuple[int, int]]) -> Manifest:
    """Manifest with sources of these weights and training chunks (source_index, num_tokens)."""
    return Manifest(
        vocab_size=300,
        eos_token_id=0,
        token_dtype="<u2",
        tokenizer_digest="0" * 64,
        chunk_bytes=4096,
        seed=0,
        sources=tuple(
            Source(
                name=f"s{index}",
                origin="",
                licence="",
                weight=weight,
                num_documents=1,
                num_bytes=1,
                num_tokens=1,
            )
            for index, weight in enumerate(weights)
        ),
        training_chunks=tuple(
            ChunkEntry(source_index=source, num_tokens=tokens, digest="0" * 64, num_bytes=1)
            for source, tokens in chunks
        ),
        heldout_chunks=(),
    )


def test_order_is_golden() -> None:
    """If this fails, peers of two versions would train different data: raise PROTOCOL_VERSION."""
    assert philox_permutation("golden", 8).tolist() == [7, 6, 0, 4, 1, 2, 3, 5]
    order = ScheduleOrder(7, build_manifest([3, 1], [(0, 100)] * 3 + [(1, 100)] * 2), 16)
    assert [order.chunk_at(position) for position in range(9)] == [
        (0, 1),
        (0, 0),
        (0, 2),
        (0, 3),
        (1, 2),
        (1, 1),
        (1, 0),
        (0, 4),
        (2, 0),
    ]
    assert order.window_order(1, 2).tolist() == [2, 1, 3, 4, 0, 5]


@given(
    seed=st.integers(0, 2**63 - 1),
    chunk_tokens=st.lists(st.integers(1, 120), min_size=1, max_size=12),
    seq_len=st.integers(2, 40),
)
@settings(max_examples=60)
def test_every_window_once_per_pass(seed: int, chunk_tokens: list[int], seq_len: int) -> None:
    manifest = build_manifest([1.0], [(0, tokens) for tokens in chunk_tokens])
    if all(tokens <= seq_len for tokens in chunk_tokens):
        with pytest.raises(UsageError, match="without a single window"):
            ScheduleOrder(seed, manifest, seq_len)
        return
    order = ScheduleOrder(seed, manifest, seq_len)
    expected = {
        (chunk, window)
        for chunk, tokens in enumerate(chunk_tokens)
        for window in range((tokens - 1) // seq_len)
    }
    num_chunks = len({chunk for chunk, _ in expected})
    for data_pass in range(3):
        seen: Counter[tuple[int, int]] = Counter()
        for position in range(data_pass * num_chunks, (data_pass + 1) * num_chunks):
            at_pass, chunk = order.chunk_at(position)
            assert at_pass == data_pass
            seen.update((chunk, int(window)) for window in order.window_order(data_pass, chunk))
        assert seen == Counter(expected)
    assert order.tokens_within_passes(2) == 2 * len(expected) * seq_len


@given(
    weights=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=9),
    num_chunks=st.integers(1, 4),
)
@settings(max_examples=60)
def test_mixture_is_within_one_chunk_at_every_prefix(weights: list[float], num_chunks: int) -> None:
    sources = range(len(weights))
    manifest = build_manifest(weights, [(s, 100) for s in sources for _ in range(num_chunks)])
    order = ScheduleOrder(1, manifest, 16)
    counts = [0] * len(weights)
    for position in range(300):
        chunk = order.chunk_at(position)[1]
        counts[manifest.training_chunks[chunk].source_index] += 1
        for source, weight in enumerate(weights):
            share = weight / sum(weights) * (position + 1)
            assert abs(counts[source] - share) < 1 + 1e-5  # shares are rounded to 2^-32


def test_positions_do_not_depend_on_who_asked_before() -> None:
    manifest = build_manifest([1, 2, 0.5], [(index % 3, 50) for index in range(11)])
    eager, lazy = ScheduleOrder(5, manifest, 8), ScheduleOrder(5, manifest, 8)
    far = lazy.chunk_at(200)
    assert [eager.chunk_at(position) for position in range(201)][-1] == far


def test_passes_and_seeds_differ() -> None:
    manifest = build_manifest([1.0], [(0, 2000)])
    orders = [
        ScheduleOrder(seed, manifest, 8).window_order(p, 0) for seed in (0, 1) for p in (0, 1)
    ]
    assert len({tuple(order.tolist()) for order in orders}) == 4
    assert all(np.array_equal(np.sort(order), np.arange(249)) for order in orders)
