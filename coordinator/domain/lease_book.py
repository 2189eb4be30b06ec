"""Lease decisions: which windows a peer may train next so that they count.

Every window that was ever granted lies before the *frontier* and is exactly one of active,
released, expired or credited; every window after it is free. Grants come from, in this order:
1. released windows (given back, or rolled back), oldest in the schedule first;
2. never-leased windows, by moving the frontier;
3. expired windows: last, because a late certificate may still credit them until somebody else gets
   them.

A grant of windows that were leased before raises their fence by one, which is what refuses the late
holder from then on.

The budget: the frontier never moves past budget_tokens, so active + released + expired + credited
<= budget at all times, and a late certificate always has room. Hence a budget may be lowered to the
tokens granted so far, not below.

Leases are whole windows inside one chunk, sized to seconds of the peer's measured work, and shrink
towards the end of the budget in proportion to the peer's share of the swarm's speed, so that the
last tokens are not all with one slow peer.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple, Protocol

from coordinator.domain.spans import Interval, Span, subtract

MIN_LEASE_SECONDS = 5.0
MAX_LEASE_SECONDS = 60.0
"""A lease is one round of the peer's work within these: a dead peer's is back soon, leases are not
the traffic.
"""
MAX_LEASES_PER_ANSWER = 16
HELD_ROUNDS = 2
"""A peer may hold this many of its rounds: the one under way and the next."""
TAIL_DIVISOR = 4
"""... or this fraction of an equal share of what is left, if that is more."""


class Schedule(Protocol):
    """The deterministic order of data (protos/contract/schedule_order.py)."""

    def chunk_at(self, position: int) -> tuple[int, int]:
        """(data_pass, chunk_index) at a position."""

    def num_windows(self, chunk_index: int) -> int:
        """Windows of a chunk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FreeRange:
    """Windows that were leased before and are not now; `fence` is their newest one."""

    span: Span
    fence: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BookState:
    """What a grant depends on. All counts are windows."""

    frontier_position: int
    frontier_window: int
    granted_windows: int
    """Before the frontier."""
    credited_windows: int
    active_windows: int
    expired_windows: int
    budget_windows: int
    released: Sequence[FreeRange]
    """In schedule order; may be cut short, then a later request goes on."""
    expired: Sequence[FreeRange]


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """Who asks, and for how much. Windows, except tokens per second."""

    wanted_windows: int
    held_windows: int
    """Under its active leases and not credited, as the book says."""
    round_windows: int
    """Its own budget per round."""
    share_ratio: float
    """Its share of the swarm's round budget, 0..1."""
    num_peers: int
    """Peers that train."""
    tokens_per_second: float
    """Measured; 0 if unknown."""
    window_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """One lease to write and sign."""

    span: Span
    fence: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GrantPlan:
    """What to change in the book, and why not more."""

    grants: tuple[Grant, ...]
    frontier_position: int
    frontier_window: int
    num_frontier_windows: int
    """Windows granted for the first time."""
    released_taken: tuple[FreeRange, ...]
    """Rows used, whole or in part; what is left of them is in `released_left`."""
    released_left: tuple[FreeRange, ...]
    num_released_windows: int
    expired_taken: tuple[FreeRange, ...]
    expired_left: tuple[FreeRange, ...]
    num_expired_windows: int
    reason: str
    is_budget_exhausted: bool


def lease_size_windows(demand: Demand, *, left_windows: int) -> int:
    """Windows of one lease: a round of this peer, within 5 to 60 s of its work, less near the end,
    at least one.
    """
    size = float(demand.round_windows)
    if demand.tokens_per_second > 0:
        windows_per_second = demand.tokens_per_second / demand.window_tokens
        size = max(size, windows_per_second * MIN_LEASE_SECONDS)
        size = min(size, windows_per_second * MAX_LEASE_SECONDS)
    return max(1, int(min(size, left_windows * demand.share_ratio)))


def allowance_windows(demand: Demand, *, left_windows: int) -> tuple[int, str]:
    """Most windows that this request may get, and the rule that decided."""
    cap = max(
        HELD_ROUNDS * demand.round_windows,
        left_windows // (TAIL_DIVISOR * max(1, demand.num_peers)),
    )
    room = max(0, cap - demand.held_windows)
    share = max(1, ceil(left_windows * demand.share_ratio))
    allowed = min(demand.wanted_windows, room, share)
    if allowed == demand.wanted_windows:
        return allowed, f"all {allowed} windows wanted"
    if room <= share:
        return (
            allowed,
            f"{demand.held_windows} windows held, at most {cap} (two rounds of "
            f"{demand.round_windows})",
        )
    return allowed, f"share {demand.share_ratio:.3f} of the {left_windows} windows left"


class _Planner:
    """Collects grants until the allowance is used up."""

    def __init__(self, *, num_windows: int, lease_windows: int) -> None:
        self.left = num_windows
        self._lease_windows = lease_windows
        self.grants: list[Grant] = []

    @property
    def is_done(self) -> bool:
        """True once the allowance is used up or the answer is full."""
        return self.left <= 0 or len(self.grants) >= MAX_LEASES_PER_ANSWER

    def grant(self, span: Span, *, fence: int, max_windows: int) -> int:
        """Grant a lease at the beginning of the span; returns its windows, 0 if none fits."""
        windows = min(span.num_windows, self._lease_windows, self.left, max_windows)
        if windows <= 0 or self.is_done:
            return 0
        self.grants.append(
            Grant(span=span.part(span.begin_window, span.begin_window + windows), fence=fence)
        )
        self.left -= windows
        return windows

    def take_from(
        self, ranges: Sequence[FreeRange], *, max_windows: int
    ) -> tuple[list[FreeRange], list[FreeRange], int]:
        """Grant out of returned ranges in order; gives (used rows, what is left of them, windows
        granted).
        """
        used: list[FreeRange] = []
        left: list[FreeRange] = []
        total = 0
        for free in ranges:
            span = free.span
            begin = span.begin_window
            while begin < span.end_window:
                granted = self.grant(
                    span.part(begin, span.end_window),
                    fence=free.fence + 1,
                    max_windows=max_windows - total,
                )
                if granted == 0:
                    break
                begin += granted
                total += granted
            if begin > span.begin_window:
                used.append(free)
                if begin < span.end_window:
                    left.append(FreeRange(span=span.part(begin, span.end_window), fence=free.fence))
            if self.is_done or total >= max_windows:
                break
        return used, left, total


def plan_grants(
    book: BookState,
    demand: Demand,
    *,
    schedule: Schedule,
    max_data_passes: int,
    may_grant_again: bool,
) -> GrantPlan:
    """Decide the leases for one request; `may_grant_again` is False while the coordinator is
    RECOVERING.
    """
    unleased = max(0, book.budget_windows - book.credited_windows - book.active_windows)
    allowed, reason = allowance_windows(demand, left_windows=unleased)
    planner = _Planner(
        num_windows=allowed, lease_windows=lease_size_windows(demand, left_windows=unleased)
    )
    nothing: tuple[list[FreeRange], list[FreeRange], int] = ([], [], 0)
    released = expired = nothing
    if may_grant_again:
        released = planner.take_from(book.released, max_windows=unleased - book.expired_windows)
    frontier = _Frontier(book.frontier_position, book.frontier_window, 0)
    num_released = _num_windows(book.released)
    if not may_grant_again or released[2] == num_released:
        frontier, pass_reason = _move_frontier(book, planner, schedule, max_data_passes)
        reason = pass_reason or reason
    if may_grant_again and unleased >= book.expired_windows:
        expired = planner.take_from(book.expired, max_windows=unleased)
    num_left = num_released - released[2] + _num_windows(book.expired) - expired[2]
    is_exhausted = (
        num_left == 0 and book.granted_windows + frontier.num_windows >= book.budget_windows
    )
    return GrantPlan(
        grants=tuple(planner.grants),
        frontier_position=frontier.position,
        frontier_window=frontier.window,
        num_frontier_windows=frontier.num_windows,
        released_taken=tuple(released[0]),
        released_left=tuple(released[1]),
        num_released_windows=released[2],
        expired_taken=tuple(expired[0]),
        expired_left=tuple(expired[1]),
        num_expired_windows=expired[2],
        reason=_grant_reason(
            book, planner, reason, is_exhausted=is_exhausted, may_grant_again=may_grant_again
        ),
        is_budget_exhausted=is_exhausted,
    )


class _Frontier(NamedTuple):
    position: int
    window: int
    num_windows: int
    """Granted by moving it."""


def _move_frontier(
    book: BookState, planner: _Planner, schedule: Schedule, max_data_passes: int
) -> tuple[_Frontier, str]:
    """Grant never-leased windows; returns where the frontier is then, and why it stopped if the
    passes are used up.
    """
    position, window, fresh = book.frontier_position, book.frontier_window, 0
    while not planner.is_done and book.granted_windows + fresh < book.budget_windows:
        data_pass, chunk_index = schedule.chunk_at(position)
        if data_pass >= max_data_passes:
            reason = (
                f"pass {data_pass} is beyond the {max_data_passes} passes that the run spec allows"
            )
            return _Frontier(position, window, fresh), reason
        num_windows = schedule.num_windows(chunk_index)
        span = Span(
            schedule_position=position,
            data_pass=data_pass,
            chunk_index=chunk_index,
            begin_window=window,
            end_window=num_windows,
        )
        granted = planner.grant(
            span, fence=1, max_windows=book.budget_windows - book.granted_windows - fresh
        )
        fresh += granted
        window += granted
        if window >= num_windows:
            position, window = position + 1, 0
    return _Frontier(position, window, fresh), ""


def _num_windows(ranges: Sequence[FreeRange]) -> int:
    return sum(free.span.num_windows for free in ranges)


def _grant_reason(
    book: BookState, planner: _Planner, reason: str, *, is_exhausted: bool, may_grant_again: bool
) -> str:
    if planner.left > 0 and is_exhausted:
        return (
            f"all {book.budget_windows} windows of the budget are credited or leased: "
            f"{book.credited_windows} credited before this request"
        )
    if planner.left > 0 and not may_grant_again:
        return "the coordinator is recovering: nothing that was leased before is granted again yet"
    if planner.left > 0 and len(planner.grants) >= MAX_LEASES_PER_ANSWER:
        return f"{MAX_LEASES_PER_ANSWER} leases per answer; ask again"
    return reason


def open_intervals(lease: Interval, credited: Iterable[Interval]) -> list[Interval]:
    """Windows of a lease that are not credited: what its release or expiry gives back."""
    return subtract(lease, credited)


def merged(ranges: Iterable[FreeRange]) -> list[FreeRange]:
    """Neighbouring returned ranges of one chunk joined; the joined range keeps the higher fence,
    which stays newest.
    """
    joined: list[FreeRange] = []
    for free in sorted(ranges, key=lambda r: (r.span.schedule_position, r.span.begin_window)):
        last = joined[-1] if joined else None
        if (
            last is not None
            and last.span.schedule_position == free.span.schedule_position
            and last.span.end_window == free.span.begin_window
        ):
            span = last.span.part(last.span.begin_window, free.span.end_window)
            joined[-1] = FreeRange(span=span, fence=max(last.fence, free.fence))
        else:
            joined.append(free)
    return joined
