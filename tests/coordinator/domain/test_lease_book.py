"""Grants: order, budget, sizes, fences; and the interval arithmetic under them."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.domain.lease_book import (
    MAX_LEASES_PER_ANSWER,
    BookState,
    Demand,
    FreeRange,
    lease_size_windows,
    merged,
    plan_grants,
)
from coordinator.domain.spans import Span, intersect, num_windows, subtract


class EqualChunks:
    """Chunks of ten windows, in order, for ever."""

    def chunk_at(self, position: int) -> tuple[int, int]:
        return position // 100, position % 100

    def num_windows(self, chunk_index: int) -> int:
        return 10


BOOK = BookState(
    frontier_position=0,
    frontier_window=0,
    granted_windows=0,
    credited_windows=0,
    active_windows=0,
    expired_windows=0,
    budget_windows=1000,
    released=(),
    expired=(),
)
DEMAND = Demand(
    wanted_windows=20,
    held_windows=0,
    round_windows=20,
    share_ratio=0.25,
    num_peers=4,
    tokens_per_second=0.0,
    window_tokens=256,
)


def plan(book: BookState, demand: Demand, *, may_grant_again: bool = True):
    return plan_grants(
        book,
        demand,
        schedule=EqualChunks(),
        max_data_passes=2,
        may_grant_again=may_grant_again,
    )


def free(position: int, begin: int, end: int, *, fence: int = 1) -> FreeRange:
    span = Span(
        schedule_position=position,
        data_pass=0,
        chunk_index=position,
        begin_window=begin,
        end_window=end,
    )
    return FreeRange(span=span, fence=fence)


def test_leases_stop_at_the_ends_of_chunks() -> None:
    result = plan(replace(BOOK, frontier_window=7, granted_windows=7, active_windows=7), DEMAND)
    spans = [
        (grant.span.schedule_position, grant.span.begin_window, grant.span.end_window)
        for grant in result.grants
    ]
    assert spans == [(0, 7, 10), (1, 0, 10), (2, 0, 7)]
    assert (result.frontier_position, result.frontier_window) == (2, 7)
    assert result.num_frontier_windows == 20
    assert result.reason == "all 20 windows wanted"


def test_released_then_fresh_then_expired() -> None:
    book = replace(
        BOOK,
        frontier_position=3,
        granted_windows=30,
        credited_windows=20,
        expired_windows=5,
        budget_windows=32,
        released=(free(1, 0, 5, fence=3),),
        expired=(free(0, 0, 5, fence=2),),
    )
    result = plan(book, replace(DEMAND, share_ratio=1.0))
    assert [(g.span.schedule_position, g.fence) for g in result.grants] == [(1, 4), (3, 1), (0, 3)]
    assert result.is_budget_exhausted
    recovering = plan(book, replace(DEMAND, share_ratio=1.0), may_grant_again=False)
    assert [g.span.schedule_position for g in recovering.grants] == [3]
    assert not recovering.is_budget_exhausted and "recovering" in recovering.reason


def test_a_returned_range_is_split_and_its_rest_keeps_its_fence() -> None:
    book = replace(
        BOOK, frontier_position=1, granted_windows=10, released=(free(0, 2, 9, fence=5),)
    )
    result = plan(book, replace(DEMAND, wanted_windows=3))
    assert [(g.span.begin_window, g.span.end_window, g.fence) for g in result.grants] == [(2, 5, 6)]
    assert result.released_left == (free(0, 5, 9, fence=5),)


def test_at_most_two_rounds_or_a_share_of_a_long_run() -> None:
    held = replace(DEMAND, held_windows=39, wanted_windows=100)
    book = replace(BOOK, active_windows=39, granted_windows=39, budget_windows=600)
    assert sum(g.span.num_windows for g in plan(book, held).grants) == 1
    long_run = replace(book, budget_windows=16_039)
    assert sum(g.span.num_windows for g in plan(long_run, held).grants) == 100


def test_the_tail_is_shared_out() -> None:
    book = replace(
        BOOK,
        frontier_position=99,
        granted_windows=990,
        credited_windows=980,
        active_windows=10,
    )
    result = plan(book, DEMAND)
    assert sum(g.span.num_windows for g in result.grants) == 3
    assert "share 0.250 of the 10 windows left" in result.reason


def test_leases_are_5_to_60_seconds_of_work() -> None:
    fast = replace(DEMAND, tokens_per_second=25_600.0)
    slow = replace(DEMAND, tokens_per_second=25.6)
    usual = replace(DEMAND, tokens_per_second=512.0)
    sizes = [lease_size_windows(one, left_windows=100_000) for one in (fast, slow, usual)]
    assert sizes == [500, 6, 20]
    assert lease_size_windows(fast, left_windows=40) == 10
    assert lease_size_windows(fast, left_windows=0) == 1


def test_answers_are_bounded() -> None:
    tiny = replace(DEMAND, tokens_per_second=2.56, wanted_windows=40)
    result = plan(replace(BOOK, budget_windows=100_000), tiny)
    assert len(result.grants) == MAX_LEASES_PER_ANSWER
    assert "ask again" in result.reason


def test_passes_end() -> None:
    book = replace(BOOK, frontier_position=200, budget_windows=5000, granted_windows=2000)
    result = plan(book, DEMAND)
    assert result.grants == () and "pass 2 is beyond the 2 passes" in result.reason


@settings(max_examples=300, deadline=None)
@given(
    budget=st.integers(1, 60),
    granted=st.integers(0, 60),
    split=st.lists(st.integers(0, 60), min_size=3, max_size=3),
    wanted=st.integers(1, 100),
    share_percent=st.integers(1, 100),
    may_grant_again=st.booleans(),
)
def test_the_budget_is_never_exceeded(
    budget: int,
    granted: int,
    split: list[int],
    wanted: int,
    share_percent: int,
    may_grant_again: bool,
) -> None:
    granted = min(granted, budget)
    cuts = sorted(min(cut, granted) for cut in split)
    credited, active = cuts[0], cuts[1] - cuts[0]
    expired, released = cuts[2] - cuts[1], granted - cuts[2]
    book = replace(
        BOOK,
        frontier_position=granted // 10,
        frontier_window=granted % 10,
        granted_windows=granted,
        credited_windows=credited,
        active_windows=active,
        expired_windows=expired,
        budget_windows=budget,
        released=(free(0, 0, released),) if released else (),
        expired=(free(50, 0, expired),) if expired else (),
    )
    demand = replace(DEMAND, wanted_windows=wanted, share_ratio=share_percent / 100)
    result = plan(book, demand, may_grant_again=may_grant_again)
    total = sum(grant.span.num_windows for grant in result.grants)
    parts = result.num_frontier_windows, result.num_released_windows, result.num_expired_windows
    assert total == sum(parts)
    assert granted + parts[0] <= budget
    assert credited + active + total + (expired - parts[2]) <= budget
    if total == 0 and wanted and may_grant_again and budget > credited + active:
        pytest.fail(f"nothing granted of {budget - credited - active} windows: {result.reason}")
    if not may_grant_again:
        assert all(grant.fence == 1 for grant in result.grants)


INTERVALS = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=6)


@given(whole=st.tuples(st.integers(0, 20), st.integers(0, 20)), holes=INTERVALS)
def test_subtract_is_set_difference(whole: tuple[int, int], holes: list[tuple[int, int]]) -> None:
    left = subtract(whole, holes)
    found = [window for part in left for window in range(*part)]
    expected = set(range(*whole)) - {window for hole in holes for window in range(*hole)}
    assert found == sorted(expected)
    assert num_windows(left) == len(expected)


def test_intersect_and_merge() -> None:
    assert intersect((2, 8), [(6, 10), (0, 3)]) == [(2, 3), (6, 8)]
    joined = merged([free(0, 5, 7, fence=1), free(1, 0, 2), free(0, 2, 5, fence=4)])
    assert joined == [free(0, 2, 7, fence=4), free(1, 0, 2)]
