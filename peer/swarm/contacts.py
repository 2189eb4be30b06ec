"""Whether members are there, learnt from calls to them and from what they send. Pure.

A member that answers nothing is gone after two calls in a row; one that is slow, but there, is
heard in between and gets longer. Nothing here affects what is agreed.
"""

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field

from peer.swarm.pace import FIRST_CALL_SECONDS, MARGIN_SECONDS, Pace

_NUM_LAST_CALLS = 8
_LEAST_CALLS = 3
_MOST_FAILURES = 2
_AGAIN_RATIO = 0.7
"""Patience with a member that has been silent since the last call, against the usual."""
_NEVER = float("-inf")


@dataclass
class _Contact:
    last_calls: deque[float] = field(default_factory=lambda: deque(maxlen=_NUM_LAST_CALLS))
    """Seconds that the last answers took, or that were waited for none."""
    num_failures: int = 0
    """Calls in a row without success."""
    first_failure_seconds: float = _NEVER
    last_failure_seconds: float = _NEVER
    heard_seconds: float = _NEVER


class Contacts:
    """Members by their last calls; times are of one monotonic clock."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._by_peer: dict[str, _Contact] = {}

    def keep_only(self, peer_ids: Collection[str]) -> None:
        """Forget everybody else."""
        self._by_peer = {p: c for p, c in self._by_peer.items() if p in peer_ids}

    def patience_seconds(self, peer_id: str) -> float:
        """How long to wait for a member's answer: longer than for others if even the quickest of
        its last ones was slow, shorter if it has not spoken since the last call.

        Whoever has not been heard since its first failure may as well be gone: its silence makes
        nobody patient.
        """
        contact = self._of(peer_id)
        seconds = self._pace.call_seconds
        is_there = contact.heard_seconds >= contact.first_failure_seconds
        if len(contact.last_calls) >= _LEAST_CALLS and is_there:
            seconds = max(seconds, 4.0 * min(contact.last_calls) + MARGIN_SECONDS)
        is_silent = contact.heard_seconds < contact.last_failure_seconds
        ratio = _AGAIN_RATIO if contact.num_failures and is_silent else 1.0
        return ratio * min(FIRST_CALL_SECONDS, seconds)

    def heard(self, peer_id: str, now_seconds: float) -> None:
        """A message of the member's own has come; an answer counts as one, too."""
        self._of(peer_id).heard_seconds = now_seconds

    def is_heard_since(self, peer_id: str, begin_seconds: float) -> bool:
        """True if the member has spoken since."""
        return self._of(peer_id).heard_seconds > begin_seconds

    def answered(
        self, peer_id: str, *, begin_seconds: float, now_seconds: float, has_dialled: bool
    ) -> None:
        """A call was answered; if it had to dial first, its time says nothing of the member."""
        contact = self._of(peer_id)
        contact.heard_seconds = now_seconds
        contact.num_failures, contact.first_failure_seconds = 0, _NEVER
        if not has_dialled:
            contact.last_calls.append(now_seconds - begin_seconds)
            self._pace.add_call(now_seconds - begin_seconds)

    def failed(
        self,
        peer_id: str,
        *,
        begin_seconds: float,
        now_seconds: float,
        timeout_seconds: float,
        has_dialled: bool,
    ) -> bool:
        """A call was refused, or not answered in time; returns whether the member counts as gone.

        Calls that were under way together count once, and none does if the member was heard in the
        meantime. One that took as long as two, to dial, counts as two; without a dial only we can
        have been stopped for so long.
        """
        contact, spent_seconds = self._of(peer_id), now_seconds - begin_seconds
        if spent_seconds >= timeout_seconds:
            contact.last_calls.append(timeout_seconds)
        if self.is_heard_since(peer_id, begin_seconds):
            return False
        if begin_seconds >= contact.last_failure_seconds:
            if not contact.num_failures:
                contact.first_failure_seconds = now_seconds
            is_long = has_dialled and spent_seconds >= (1.0 + _AGAIN_RATIO) * timeout_seconds
            contact.num_failures += 2 if is_long else 1
            contact.last_failure_seconds = now_seconds
        return contact.num_failures >= _MOST_FAILURES

    def _of(self, peer_id: str) -> _Contact:
        return self._by_peer.setdefault(peer_id, _Contact())
