"""Who says that others are further than we are, and when to look whether it is so. Pure.

Looking means to ask all members, and the round waits for their answers: a member that only says so,
and then does not answer, would hold up every round. So whose word has led to nothing twice in a row
is heard again after 1, 2, 4 ... 32 s only. Who is right brings a certificate along anyway, which
counts at once, whoever sends it.
"""

_PATIENCE_SECONDS = 0.3
"""The certificate itself is mostly on its way."""
_MAX_LEVEL = 5


class AheadClaims:
    """Of all members; times are of one monotonic clock."""

    def __init__(self) -> None:
        self._since_seconds: float | None = None
        self._claimants: set[str] = set()
        self._times_vain_by_peer: dict[str, int] = {}
        self._not_before_by_peer: dict[str, float] = {}

    def look_soon(self, now_seconds: float) -> None:
        """There is a reason of our own to look."""
        if self._since_seconds is None:
            self._since_seconds = now_seconds

    def heard(self, peer_id: str, now_seconds: float) -> None:
        """A member says that it is further, or that our state is not its own."""
        if now_seconds >= self._not_before_by_peer.get(peer_id, 0.0):
            self._claimants.add(peer_id)
            self.look_soon(now_seconds)

    def is_due(self, now_seconds: float) -> bool:
        """True if it is time to look."""
        since_seconds = self._since_seconds
        return since_seconds is not None and now_seconds - since_seconds >= _PATIENCE_SECONDS

    def looked(self, now_seconds: float, *, is_found: bool) -> None:
        """All members were asked; `is_found` if they had something newer."""
        for peer_id in self._claimants:
            times = 0 if is_found else self._times_vain_by_peer.get(peer_id, 0) + 1
            self._times_vain_by_peer[peer_id] = times
            if times > 1:
                pause_seconds = 2.0 ** min(times - 2, _MAX_LEVEL)
                self._not_before_by_peer[peer_id] = now_seconds + pause_seconds
        self.clear()

    def clear(self) -> None:
        """The next step has been made: what was said before is answered."""
        self._claimants, self._since_seconds = set(), None
