"""The leases that a peer holds and how far it has used them; plain bookkeeping for session.py.

A lease passes through: granted -> fetched (its chunk lies in the cache) -> sent to the trainer ->
(partly) in a contribution -> spent. Spent leases are still renewed until the coordinator has
acknowledged the certificate that credits them; a lease that is returned, lost or of another
incarnation is forgotten at once.

Pure: no clock, no I/O.
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class GrantedLease:
    """A lease as the coordinator granted it."""

    lease_number: int
    begin_window: int
    end_window: int
    tokens_per_window: int


@dataclass(frozen=True, slots=True, kw_only=True)
class UsedRange:
    """Windows of a lease that went into a contribution."""

    lease_number: int
    begin_window: int
    end_window: int


@dataclass(slots=True, kw_only=True)
class HeldLease:
    """A lease with windows that are in no contribution yet."""

    granted: GrantedLease
    next_window: int
    is_fetched: bool = False
    is_sent: bool = False

    @property
    def left_tokens(self) -> int:
        """Tokens in no contribution yet."""
        return (self.granted.end_window - self.next_window) * self.granted.tokens_per_window


class LeaseHoldings:
    """All leases of one peer in one incarnation."""

    def __init__(self) -> None:
        self._held: dict[int, HeldLease] = {}
        self._contributed: set[int] = set()
        self._spent_step_by_number: dict[int, int] = {}

    @property
    def num_held(self) -> int:
        """Leases with windows left."""
        return len(self._held)

    @property
    def left_tokens(self) -> int:
        """Leased tokens that are in no contribution yet."""
        return sum(lease.left_tokens for lease in self._held.values())

    @property
    def has_unsent(self) -> bool:
        """True while a granted lease has not been sent to the trainer."""
        return any(not lease.is_sent for lease in self._held.values())

    @property
    def renewed_numbers(self) -> tuple[int, ...]:
        """What heartbeats renew: held, under way in a round, or spent and not yet acknowledged."""
        return tuple(sorted({*self._held, *self._contributed, *self._spent_step_by_number}))

    def grant(self, leases: Iterable[GrantedLease]) -> None:
        """Add new leases."""
        for lease in leases:
            self._held[lease.lease_number] = HeldLease(
                granted=lease, next_window=lease.begin_window
            )

    def mark_fetched(self, lease_number: int) -> None:
        """The chunk is in the cache."""
        if lease_number in self._held:
            self._held[lease_number].is_fetched = True

    def take_sendable(self) -> tuple[UsedRange, ...]:
        """Leases to send to the trainer now, in order, as what is left of them; afterwards they
        count as sent.

        The trainer takes leases in rising order, so one whose chunk is still missing holds back
        those after it.
        """
        sendable = []
        for number in sorted(self._held):
            lease = self._held[number]
            if not lease.is_fetched:
                break
            if not lease.is_sent:
                lease.is_sent = True
                sendable.append(
                    UsedRange(
                        lease_number=number,
                        begin_window=lease.next_window,
                        end_window=lease.granted.end_window,
                    )
                )
        return tuple(sendable)

    def contribute(self, ranges: Iterable[UsedRange]) -> None:
        """These windows are in the contribution under way."""
        for used in ranges:
            self._contributed.add(used.lease_number)
            lease = self._held.get(used.lease_number)
            if lease is None:
                continue
            lease.next_window = max(lease.next_window, used.end_window)
            if lease.left_tokens <= 0:
                del self._held[used.lease_number]

    def commit(self, outer_step: int) -> None:
        """The contribution under way was committed; used-up leases wait for the acknowledgement."""
        for number in self._contributed - set(self._held):
            self._spent_step_by_number[number] = outer_step
        self._contributed.clear()

    def discard_contribution(self) -> tuple[int, ...]:
        """The contribution under way came to nothing; returns its leases, which are still to be
        released.
        """
        numbers = tuple(sorted(self._contributed))
        self._contributed.clear()
        return numbers

    def acknowledge(self, outer_step: int) -> None:
        """The coordinator has certificates up to this step; what they credited needs no renewal."""
        for number, step in list(self._spent_step_by_number.items()):
            if step <= outer_step:
                del self._spent_step_by_number[number]

    def forget(self, numbers: Iterable[int]) -> tuple[int, ...]:
        """Leases were returned or lost; returns those of them that were still held."""
        found = []
        for number in numbers:
            self._spent_step_by_number.pop(number, None)
            if self._held.pop(number, None) is not None:
                found.append(number)
        return tuple(found)

    def forget_all(self) -> tuple[int, ...]:
        """Another incarnation or session: nothing counts any more; returns what was held."""
        numbers = tuple(sorted({*self._held, *self._contributed}))
        self._held.clear()
        self._contributed.clear()
        self._spent_step_by_number.clear()
        return numbers

    def take_back(self) -> None:
        """The trainer died of something that its windows had no part in: all leases are to be sent
        again, but those of the contribution under way, whose round decides about them.
        """
        for number in sorted(self._held):
            if number in self._contributed:
                del self._held[number]
            else:
                self._held[number].is_sent = False

    def take_begun(self, progress_tokens: int) -> tuple[int, ...]:
        """The trainer died `progress_tokens` after its last contribution: forget and return the
        leases it may have begun.

        It works in rising order and may be one micro-batch ahead of its last report, so the lease
        after the covered ones counts as begun. The others are to be sent again. Leases of the
        contribution under way are not returned.
        """
        begun = []
        covered_tokens = 0
        for number in sorted(self._held):
            lease = self._held[number]
            if not lease.is_sent:
                continue
            if covered_tokens <= progress_tokens:
                begun.append(number)
                covered_tokens += lease.left_tokens
            lease.is_sent = False
        for number in begun:
            del self._held[number]
        return tuple(number for number in begun if number not in self._contributed)
