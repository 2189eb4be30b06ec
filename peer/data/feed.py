"""The trainer's feed: micro-batches from leases, in order, with a position that is plain data.

Pure but for the `read_windows` it is given. Leases come with rising numbers and their windows are
yielded once each, in order; so the position is the pair (lease number, next window), the same pair
that the replicated lease cursor holds.

A window goes through: held -> trained (since the last cut) -> in a contribution (`cut`) -> gone
(`settle`, when the round was committed). `abandon` is for a resync or a cancelled round: all leases
that were begun are let go, because their gradient is lost and what is left of a lease is not worth
a second grant.
"""

import bisect
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from peer.data.reader import LeasedRange
from peer.model.objectives import Examples
from protos.contract.errors import CorruptDataError

ReadWindows = Callable[[LeasedRange, int, int], Examples]
"""(lease, begin window, end window) -> their examples; ChunkReader.read_windows."""

FeedPosition = tuple[int, int]
"""(lease number, next window): everything before is trained or given up. Plain data; resumes a
feed.
"""

START: FeedPosition = (0, 0)


class LeaseUnreadableError(CorruptDataError):
    """The chunk of a lease cannot be read; drop the lease, fetch the chunk again."""

    def __init__(self, lease_number: int, error: CorruptDataError) -> None:
        self.lease_number = lease_number
        super().__init__(
            f"lease {lease_number}: {error.found}", allowed=error.allowed, remedy=error.remedy
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Windows to train in one forward pass, and where the feed stands after them."""

    examples: Examples
    position: FeedPosition


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedRange:
    """Windows of one lease that a contribution holds."""

    lease: bytes
    lease_number: int
    begin_window: int
    end_window: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropped:
    """What `drop` found."""

    lease_numbers: tuple[int, ...]
    """Leases that were held or begun."""
    begun_lease_numbers: tuple[int, ...]
    """Those of them with windows trained since the last commit; only the caller can undo that."""


class Feed:
    """Leases in, micro-batches out."""

    def __init__(
        self, *, seq_len: int, read_windows: ReadWindows, position: FeedPosition = START
    ) -> None:
        """`position` resumes: windows before it are skipped when their lease is added again."""
        self._seq_len = seq_len
        self._read_windows = read_windows
        self._position = position
        self._held: list[LeasedRange] = []
        self._trained: list[TrainedRange] = []
        self._in_contribution: list[TrainedRange] = []

    @property
    def position(self) -> FeedPosition:
        """Where the feed stands."""
        return self._position

    @property
    def held_tokens(self) -> int:
        """Leased tokens that are not trained yet."""
        return (
            sum(lease.end_window - self._next_window(lease) for lease in self._held) * self._seq_len
        )

    @property
    def trained_tokens(self) -> int:
        """Tokens trained since the last cut."""
        windows = sum(part.end_window - part.begin_window for part in self._trained)
        return windows * self._seq_len

    @property
    def begun_lease_numbers(self) -> tuple[int, ...]:
        """Leases with windows that are trained and not committed, in order."""
        return _lease_numbers(self._in_contribution, self._trained)

    def add(self, leases: Iterable[LeasedRange]) -> tuple[int, ...]:
        """Take leases, in order of their numbers; one that is already held is not taken twice.

        Returns the numbers of those that lie wholly before the position: they can no longer be
        trained in order.
        """
        refused = []
        held = {lease.lease_number for lease in self._held}
        for lease in leases:
            if self._next_window(lease) >= lease.end_window:
                refused.append(lease.lease_number)
            elif lease.lease_number not in held:
                held.add(lease.lease_number)
                bisect.insort(self._held, lease, key=lambda other: other.lease_number)
        return tuple(refused)

    def next_micro_batch(self, *, max_windows: int) -> MicroBatch | None:
        """Windows of the oldest leases, at most `max_windows`; None when nothing is held.

        Raises LeaseUnreadableError for the first lease whose chunk is damaged; nothing has moved
        then.
        """
        if max_windows < 1:
            raise ValueError(f"max_windows is {max_windows}; a micro-batch has at least one window")
        taken: list[tuple[LeasedRange, int, int]] = []
        left_windows = max_windows
        for lease in self._held:
            if not left_windows:
                break
            begin = self._next_window(lease)
            end = min(lease.end_window, begin + left_windows)
            taken.append((lease, begin, end))
            left_windows -= end - begin
        if not taken:
            return None
        parts = [self._read(lease, begin, end) for lease, begin, end in taken]
        for lease, begin, end in taken:
            self._note_trained(lease, begin, end)
            self._position = (lease.lease_number, end)
        self._held = [lease for lease in self._held if self._next_window(lease) < lease.end_window]
        return MicroBatch(
            examples=Examples.concatenate(parts),
            position=self._position,
        )

    def cut(self) -> tuple[TrainedRange, ...]:
        """Close the contribution: returns the ranges trained since the last cut, in order."""
        ranges = tuple(self._trained)
        self._in_contribution += self._trained
        self._trained = []
        return ranges

    def settle(self) -> None:
        """The round with the last contribution was committed: its ranges are done with."""
        self._in_contribution = []

    def abandon(self, *, is_contribution_kept: bool = False) -> tuple[int, ...]:
        """Forget uncommitted work and let its leases go; returns their numbers for release.

        With `is_contribution_kept` only what was trained since the last cut.
        """
        kept = self._in_contribution if is_contribution_kept else []
        begun = _lease_numbers(self._trained) if is_contribution_kept else self.begun_lease_numbers
        self._held = [lease for lease in self._held if lease.lease_number not in begun]
        self._trained, self._in_contribution = [], kept
        return begun

    def drop(self, lease_numbers: Iterable[int]) -> Dropped:
        """Stop yielding windows of these leases (lost, expired or unreadable).

        Ranges already trained stay listed.
        """
        numbers = set(lease_numbers)
        held = {lease.lease_number for lease in self._held}
        begun = set(self.begun_lease_numbers)
        self._held = [lease for lease in self._held if lease.lease_number not in numbers]
        return Dropped(
            lease_numbers=tuple(sorted(numbers & (held | begun))),
            begun_lease_numbers=tuple(sorted(numbers & begun)),
        )

    def reset(self) -> tuple[int, ...]:
        """Begin anew, as a new incarnation does: nothing held, position at the start; returns what
        was held or begun.
        """
        held = {lease.lease_number for lease in self._held}
        numbers = tuple(sorted(held | set(self.begun_lease_numbers)))
        self._held, self._trained, self._in_contribution = [], [], []
        self._position = START
        return numbers

    def _next_window(self, lease: LeasedRange) -> int:
        lease_number, next_window = self._position
        if lease.lease_number < lease_number:
            return lease.end_window
        if lease.lease_number > lease_number:
            return lease.begin_window
        return min(max(lease.begin_window, next_window), lease.end_window)

    def _read(self, lease: LeasedRange, begin: int, end: int) -> Examples:
        try:
            return self._read_windows(lease, begin, end)
        except CorruptDataError as error:
            raise LeaseUnreadableError(lease.lease_number, error) from error

    def _note_trained(self, lease: LeasedRange, begin: int, end: int) -> None:
        last = self._trained[-1] if self._trained else None
        if last is not None and last.lease_number == lease.lease_number:
            self._trained.pop()
            begin = last.begin_window
        self._trained.append(
            TrainedRange(
                lease=lease.lease,
                lease_number=lease.lease_number,
                begin_window=begin,
                end_window=end,
            )
        )


def _lease_numbers(*lists: list[TrainedRange]) -> tuple[int, ...]:
    return tuple(sorted({part.lease_number for parts in lists for part in parts}))
