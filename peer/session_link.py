"""When to ask the coordinator for what: heartbeats, leases, and what its absence means. Pure, a
part of session.py.

Hold about two rounds of work, ask for more below one and a half. When nothing is granted, back off
(1 s doubling to 8 s; 2 s while the budget is all leased, since somebody's lease may come back) and
let the trainer make do with what it has. Heartbeats are jittered by a quarter and come faster while
something is being waited for. Without the coordinator a peer trains on for half an hour on the
leases that it holds.
"""

from dataclasses import dataclass

from peer.lease_holdings import LeaseHoldings
from peer.session_events import AcquireLeases, SendHeartbeat

GRACE_SECONDS = 1800.0
"""How long a peer trains on without its coordinator."""
HELD_ROUNDS = 2.0
"""Work to hold, in rounds."""
REFILL_BELOW_ROUNDS = 1.5
FIRST_BACKOFF_SECONDS = 1.0
MAX_BACKOFF_SECONDS = 8.0
EXHAUSTED_RETRY_SECONDS = 2.0
HASTE_SECONDS = 2.0
"""Longest heartbeat interval while something is being waited for."""


@dataclass(slots=True)
class CoordinatorLink:
    """What is known of the coordinator, and the times of the next calls (on the clock of the
    machine's events).
    """

    is_reachable: bool = True
    lost_reason: str = ""
    lost_at_seconds: float = 0.0
    is_rejoining: bool = False
    heartbeat_interval_seconds: float = 10.0
    next_heartbeat_seconds: float = 0.0
    is_heartbeat_under_way: bool = False
    is_acquiring: bool = False
    next_acquire_seconds: float = 0.0
    backoff_seconds: float = 0.0
    is_exhausted: bool = False
    """True when every token of the budget is leased or credited."""
    no_lease_reason: str = ""

    def join(self, *, heartbeat_interval_seconds: float, now_seconds: float) -> None:
        """A membership began: everything is due."""
        self.is_rejoining = False
        self.heartbeat_interval_seconds = heartbeat_interval_seconds
        self.next_heartbeat_seconds = self.next_acquire_seconds = now_seconds

    def set_reachable(self, is_reachable: bool, reason: str, *, now_seconds: float) -> bool:
        """Returns True if that is news. On the coordinator's return everything is due at once."""
        if is_reachable == self.is_reachable:
            return False
        self.is_reachable, self.lost_reason, self.lost_at_seconds = (
            is_reachable,
            reason,
            now_seconds,
        )
        if is_reachable:
            self.next_acquire_seconds = now_seconds
            self.hasten_heartbeat(now_seconds)
        return True

    def is_grace_over(self, now_seconds: float) -> bool:
        """True when the coordinator has been away for too long to train on."""
        return not self.is_reachable and now_seconds - self.lost_at_seconds >= GRACE_SECONDS

    def hasten_heartbeat(self, now_seconds: float) -> None:
        """Send the next heartbeat now."""
        self.next_heartbeat_seconds = min(self.next_heartbeat_seconds, now_seconds)

    def hasten_leases(self, now_seconds: float) -> None:
        """The feed runs low; backing off still holds."""
        if self.backoff_seconds == 0:
            self.next_acquire_seconds = min(self.next_acquire_seconds, now_seconds)

    def take_grant(self, now_seconds: float) -> None:
        """Something was granted, or there is a new reason to ask: no backing off."""
        self.backoff_seconds, self.next_acquire_seconds, self.no_lease_reason = 0.0, now_seconds, ""

    def back_off(self, reason: str, *, now_seconds: float) -> None:
        """Nothing was granted: ask again later."""
        self.no_lease_reason = reason
        doubled_seconds = max(2 * self.backoff_seconds, FIRST_BACKOFF_SECONDS)
        self.backoff_seconds = min(doubled_seconds, MAX_BACKOFF_SECONDS)
        wait_seconds = EXHAUSTED_RETRY_SECONDS if self.is_exhausted else self.backoff_seconds
        self.next_acquire_seconds = now_seconds + wait_seconds

    def start_over(self, now_seconds: float) -> None:
        """All leases are gone (another incarnation or session)."""
        self.is_exhausted = False
        self.take_grant(now_seconds)

    def plan_leases(
        self, leases: LeaseHoldings, *, incarnation: int, round_tokens: int, now_seconds: float
    ) -> AcquireLeases | None:
        """What to ask for now, if anything. `round_tokens` is above 0 and the coordinator is
        reachable.
        """
        held_tokens = leases.left_tokens
        is_low = held_tokens < REFILL_BELOW_ROUNDS * round_tokens
        if not is_low or self.is_acquiring or now_seconds < self.next_acquire_seconds:
            return None
        self.is_acquiring = True
        wanted_tokens = int(HELD_ROUNDS * round_tokens) - held_tokens
        return AcquireLeases(
            incarnation=incarnation, wanted_tokens=wanted_tokens, held_tokens=held_tokens
        )

    def plan_heartbeat(
        self, leases: LeaseHoldings, *, is_in_haste: bool, jitter_ratio: float, now_seconds: float
    ) -> SendHeartbeat | None:
        """A heartbeat if it is time. `jitter_ratio` is uniform in 0..1."""
        is_due = now_seconds >= self.next_heartbeat_seconds
        if not is_due or self.is_heartbeat_under_way or self.is_rejoining:
            return None
        interval_seconds = self.heartbeat_interval_seconds
        if is_in_haste or not self.is_reachable:
            interval_seconds = min(interval_seconds, HASTE_SECONDS)
        self.next_heartbeat_seconds = now_seconds + interval_seconds * (0.75 + 0.5 * jitter_ratio)
        self.is_heartbeat_under_way = True
        return SendHeartbeat(lease_numbers=leases.renewed_numbers)
