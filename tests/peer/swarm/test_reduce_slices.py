"""Slices of the vector: they cover it, follow the links, and are even where nothing is known."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from peer.swarm.reduce_slices import Link, expected_seconds, slice_ends


def _link(rate: float, *, is_reducer: bool = True, has_values: bool = True) -> Link:
    return Link(
        is_reducer=is_reducer,
        has_values=has_values,
        upload_bytes_per_second=rate,
        download_bytes_per_second=rate,
    )


def _seconds(links: list[Link], ends: list[int], num_pieces: int) -> float:
    """When the slowest link is done, counting every byte by hand."""
    num_bringing = sum(link.has_values for link in links)
    begins, worst = [0, *ends[:-1]], 0.0
    for link, begin, end in zip(links, begins, ends, strict=True):
        own, left = end - begin, num_pieces - (end - begin)
        sent = link.has_values * left + (len(links) - 1) * own
        received = left + (num_bringing - link.has_values) * own
        worst = max(
            worst, sent / link.upload_bytes_per_second, received / link.download_bytes_per_second
        )
    return worst


def test_equal_where_nothing_is_measured() -> None:
    assert slice_ends([_link(0.0)] * 4, num_pieces=400) == [100, 200, 300, 400]


def test_who_cannot_be_dialled_reduces_nothing() -> None:
    links = [_link(0.0), _link(0.0, is_reducer=False), _link(0.0), _link(0.0, is_reducer=False)]
    assert slice_ends(links, num_pieces=10) == [5, 5, 10, 10]


def test_everybody_reduces_where_nobody_can_be_dialled() -> None:
    assert slice_ends([_link(0.0, is_reducer=False)] * 2, num_pieces=10) == [5, 10]


def test_a_slow_link_gets_less() -> None:
    links = [_link(100.0), _link(100.0), _link(100.0), _link(30.0)]
    ends = slice_ends(links, num_pieces=400)
    assert ends[3] - ends[2] == 0  # 30 is not even enough for its own part in the others' time
    equal = [100, 200, 300, 400]
    assert _seconds(links, ends, 400) < 0.7 * _seconds(links, equal, 400)


def test_a_boast_counts_for_four_times_the_median_at_most() -> None:
    links = [_link(100.0)] * 4 + [_link(1e12)]
    modest = [_link(100.0)] * 4 + [_link(400.0)]
    assert slice_ends(links, num_pieces=1000) == slice_ends(modest, num_pieces=1000)


@given(
    rates=st.lists(st.floats(min_value=30.0, max_value=100.0), min_size=1, max_size=12),
    num_pieces=st.integers(min_value=1, max_value=3000),
    data=st.data(),
)
@settings(deadline=None)
def test_runs_cover_the_vector_and_beat_equal_slices(
    rates: list[float], num_pieces: int, data: st.DataObject
) -> None:
    bringing = data.draw(st.lists(st.booleans(), min_size=len(rates), max_size=len(rates)))
    assume(len(rates) == 1 or sum(bringing) >= 2)
    links = [_link(r, has_values=b) for r, b in zip(rates, bringing, strict=True)]
    ends = slice_ends(links, num_pieces=num_pieces)
    assert ends == sorted(ends) and ends[0] >= 0 and ends[-1] == num_pieces
    equal = slice_ends([_link(0.0, has_values=b) for b in bringing], num_pieces=num_pieces)
    rounding = len(links) * 2 / 30.0
    assert _seconds(links, ends, num_pieces) <= _seconds(links, equal, num_pieces) + rounding


@pytest.mark.parametrize("num_pieces", [1, 2, 3])
def test_fewer_pieces_than_members(num_pieces: int) -> None:
    ends = slice_ends([_link(50.0)] * 8, num_pieces=num_pieces)
    assert ends == sorted(ends) and ends[-1] == num_pieces


def test_what_averaging_takes_is_what_a_member_in_the_middle_needs() -> None:
    links, ends = [_link(1000.0)] * 3, [10, 20, 30]
    by_hand = _seconds(links, ends, 30)
    assert expected_seconds(links, ends, vector_bytes=30) == pytest.approx(by_hand)
    one_slow = [_link(10.0), *links[:2]]
    assert expected_seconds(one_slow, ends, vector_bytes=30) == pytest.approx(by_hand)
    assert expected_seconds([_link(0.0)] * 3, ends, vector_bytes=30) == 0.0
