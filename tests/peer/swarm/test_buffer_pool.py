"""Buffers are used again when nobody refers to them, and only then."""

import sys
from collections.abc import Callable

import pytest

from peer.swarm.buffer_pool import BufferPool
from protos.contract.errors import MachineError


def test_a_buffer_in_use_is_not_handed_out_again() -> None:
    pool = BufferPool()
    first = pool.take(1000).view("<f4")
    second = pool.take(1000).data[10:20]
    assert pool.num_bytes == 2000
    first[:] = 1.0
    second[:] = bytes(10)
    assert (first == 1.0).all()


def test_a_free_buffer_is_used_again() -> None:
    pool = BufferPool()
    view = pool.take(1000).data
    for _ in range(5):
        view = pool.take(1000).data
    assert pool.num_bytes == 2000  # the new view is made while the old one still counts
    del view
    kept = pool.take(1000)
    assert pool.num_bytes == 2000
    assert kept.size == 1000


def test_a_size_that_is_not_used_any_more_is_given_back() -> None:
    pool = BufferPool()
    pool.take(1000)
    held = pool.take(3000).data
    for _ in range(20):
        pool.begin_round()
        pool.take(500)
    assert pool.num_bytes == 3500
    assert len(held) == 3000


@pytest.mark.parametrize("shown_less", [-1, 0, 1, 2])
def test_an_interpreter_that_counts_otherwise_does_not_hand_out_what_is_in_use(
    monkeypatch: pytest.MonkeyPatch, shown_less: int
) -> None:
    """Python 3.14 borrows references to locals, so it shows fewer."""
    count: Callable[[object], int] = sys.getrefcount
    # One reference more is this function's own argument.
    monkeypatch.setattr(sys, "getrefcount", lambda found: count(found) - 1 - shown_less)
    pool = BufferPool()
    first = pool.take(1000).data
    second = pool.take(1000).data
    assert pool.num_bytes == 2000
    del second
    pool.take(1000)
    assert pool.num_bytes == 2000 and len(first) == 1000


def test_an_interpreter_that_does_not_count_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "getrefcount", lambda found: 2**32 - 1)
    with pytest.raises(MachineError, match="references to a buffer"):
        BufferPool()
