"""Members whose link holds the swarm up, and for how many steps they are left out. Pure.

What counts is what was measured here: how long a reduction waited for somebody while at least as
many others had delivered. Who is late twice in a step is left out for the rest of it; who was, or
who makes the whole swarm slower, twice in a row, than it would be without its work, is left out of
the next steps too: 2, 4, 8 ... 64 of them, and then tried again. It is only about whom this member
asks when it leads: the left out still get the result, and may vote for it.
"""

from collections.abc import Collection, Mapping

MAX_LATE_ATTEMPTS = 2
"""Of one step, after which a member is left out of it; one, if it is tried again."""
LEAST_SILENCE_SECONDS = 0.6
"""Less than that proves nothing, also in a reduction that another has given up: below the least
patience of whoever gave it up (pace.py), so that both remember whom they have waited for, and well
above what a reducer lets pass that only says that it waits itself (part_frames.py).
"""
_MAX_LEVEL = 6
_LEAST_SECONDS = 1.0
_LEAST_GAIN = 1.25


class Latecomers:
    """Whom this member leaves out when it leads, from step to step."""

    def __init__(self) -> None:
        self._level_by_peer: dict[str, int] = {}
        self._steps_left_by_peer: dict[str, int] = {}
        self._times_costly_by_peer: dict[str, int] = {}

    @property
    def left_out(self) -> frozenset[str]:
        """Not asked in the next step."""
        return frozenset(self._steps_left_by_peer)

    @property
    def on_trial(self) -> frozenset[str]:
        """Asked again after a while: late once is enough."""
        return frozenset(self._level_by_peer) - self.left_out

    def step_ended(
        self,
        *,
        late: Collection[str],
        tokens_by_peer: Mapping[str, int],
        late_seconds_by_peer: Mapping[str, float],
        round_seconds: float,
    ) -> list[str]:
        """A step is certified, in whose failed attempts `late` were late, and whose group, if this
        member was in it, brought `tokens_by_peer`. Returns who is left out now and was not before.
        """
        before, on_trial = self.left_out, self.on_trial
        costly = _not_worth_waiting(
            late_seconds_by_peer, tokens_by_peer, round_seconds=round_seconds
        )
        for peer_id in tokens_by_peer:
            times = self._times_costly_by_peer.pop(peer_id, 0) + 1
            if peer_id in costly:
                self._times_costly_by_peer[peer_id] = times
        again = {p for p in costly if p in on_trial or self._times_costly_by_peer.get(p, 0) > 1}
        slow = {*late} | again
        for peer_id in list(self._steps_left_by_peer):
            self._steps_left_by_peer[peer_id] -= 1
            if self._steps_left_by_peer[peer_id] <= 0:
                del self._steps_left_by_peer[peer_id]
        for peer_id in on_trial & set(tokens_by_peer) - slow:
            del self._level_by_peer[peer_id]
        for peer_id in slow - before:
            level = min(_MAX_LEVEL, self._level_by_peer.get(peer_id, 0) + 1)
            self._level_by_peer[peer_id] = level
            self._steps_left_by_peer[peer_id] = 2**level
        return sorted(self.left_out - before)


def late_in_failed(
    late_seconds_by_peer: Mapping[str, float], *, elapsed_seconds: float
) -> frozenset[str]:
    """For whom a reduction was mostly waiting that was given up after so long."""
    least_seconds = max(LEAST_SILENCE_SECONDS, elapsed_seconds / 2)
    return frozenset(p for p, late in late_seconds_by_peer.items() if late >= least_seconds)


def _not_worth_waiting(
    late_seconds_by_peer: Mapping[str, float],
    tokens_by_peer: Mapping[str, int],
    *,
    round_seconds: float,
) -> set[str]:
    """Members without whom the swarm would train clearly more tokens per second.

    `round_seconds` is what the committed round took, training included, of which
    `late_seconds_by_peer` were spent waiting for a member.
    """
    total = sum(tokens_by_peer.values())
    found = set()
    for peer_id, late_seconds in late_seconds_by_peer.items():
        left_seconds = max(round_seconds - late_seconds, 0.1)
        rate = (total - tokens_by_peer.get(peer_id, 0)) / left_seconds
        is_gain = rate > _LEAST_GAIN * total / max(round_seconds, 0.1)
        if late_seconds >= _LEAST_SECONDS and is_gain:
            found.add(peer_id)
    return found
