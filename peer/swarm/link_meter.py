"""What this machine's link carries, measured in the rounds themselves. Pure: time is an argument.

The best two seconds of a round count, up and down apart, its first second left out, because that
only fills buffers. Rounds too short for that say nothing. The best of the last rounds is the rate:
a round goes at the pace of its slowest member, so a single one may show less than the link can do.
"""

from collections import deque

_BIN_SECONDS = 0.5
_SKIPPED_BINS = 2
_WINDOW_BINS = 4
_NUM_ROUNDS = 8


class LinkMeter:
    """Bytes of the round under way by half seconds, and the rates that past rounds have shown."""

    def __init__(self) -> None:
        self._begin_seconds: float | None = None
        self._bins: list[list[int]] = []
        self._rates: deque[tuple[float, float]] = deque(maxlen=_NUM_ROUNDS)

    @property
    def upload_bytes_per_second(self) -> float:
        """Shown so far; 0 if no round was long enough."""
        return max((upload for upload, _ in self._rates), default=0.0)

    @property
    def download_bytes_per_second(self) -> float:
        """Shown so far; 0 if no round was long enough."""
        return max((download for _, download in self._rates), default=0.0)

    def begin(self, now_seconds: float) -> None:
        """A round's bytes begin to move."""
        self._begin_seconds, self._bins = now_seconds, []

    def add(self, now_seconds: float, *, sent_bytes: int, received_bytes: int) -> None:
        """Bytes moved; ignored between rounds."""
        if self._begin_seconds is None:
            return
        index = int((now_seconds - self._begin_seconds) / _BIN_SECONDS)
        while len(self._bins) <= index:
            self._bins.append([0, 0])
        self._bins[index][0] += sent_bytes
        self._bins[index][1] += received_bytes

    def end(self) -> None:
        """The round's bytes are here: learn from it if it was long enough."""
        self._begin_seconds = None
        bins = self._bins[_SKIPPED_BINS:-1]  # the last one is not full
        if len(bins) < _WINDOW_BINS:
            return
        windows = [bins[i : i + _WINDOW_BINS] for i in range(len(bins) - _WINDOW_BINS + 1)]
        seconds = _WINDOW_BINS * _BIN_SECONDS
        sent = max(sum(b[0] for b in window) for window in windows)
        received = max(sum(b[1] for b in window) for window in windows)
        self._rates.append((sent / seconds, received / seconds))
