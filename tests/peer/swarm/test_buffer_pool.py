"""Buffers are used again when nobody refers to them, and only then."""

from peer.swarm.buffer_pool import BufferPool


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
