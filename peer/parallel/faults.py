"""What can go wrong with local ranks, as their leader tells it."""

from collections.abc import Sequence

GROUP_TIMEOUT_SECONDS = 20.0
"""Longest wait of a rank for another."""


class LocalRankError(RuntimeError):
    """A local rank ended, failed or does not answer."""

    def __init__(
        self, reason: str, *, lost_devices: Sequence[int] = (), has_no_memory: bool = False
    ) -> None:
        super().__init__(reason)
        self.lost_devices = tuple(lost_devices)
        """Positions of devices not to be counted on; empty if all ranks answer."""
        self.has_no_memory = has_no_memory
