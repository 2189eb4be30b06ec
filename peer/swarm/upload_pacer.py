"""What the owner lends of the upload, kept by all streams of the process together."""

import threading
import time

_BYTES_PER_SECOND_PER_MBIT = 125_000
_LEAST_WAIT_SECONDS = 0.005
_LEAST_SLICE, _MOST_SLICE = 2**10, 2**16


class UploadPacer:
    """Spreads bytes over time; for any thread."""

    def __init__(self, limit_mbit: float | None) -> None:
        """`limit_mbit`: Mbit/s; None or 0 for no limit."""
        self.bytes_per_second = limit_mbit * _BYTES_PER_SECOND_PER_MBIT if limit_mbit else None
        """What the owner allows; None: no limit."""
        self._next_send_seconds = 0.0
        self._lock = threading.Lock()

    @property
    def slice_bytes(self) -> int | None:
        """Most bytes to send at a time: about a tenth of a second, so that nobody takes the pauses
        for the end; None without a limit.
        """
        limit = self.bytes_per_second
        return None if limit is None else int(min(_MOST_SLICE, max(_LEAST_SLICE, limit / 10)))

    def reserve(self, num_bytes: int) -> float:
        """Seconds to wait before sending so much."""
        if self.bytes_per_second is None:
            return 0.0
        with self._lock:
            now = time.monotonic()
            self._next_send_seconds = max(self._next_send_seconds, now)
            wait_seconds = self._next_send_seconds - now
            self._next_send_seconds += num_bytes / self.bytes_per_second
        return wait_seconds if wait_seconds > _LEAST_WAIT_SECONDS else 0.0
