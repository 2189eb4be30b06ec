"""Token buckets: a bounded number of callers, each with a sustained rate and a burst. Time is an
argument.
"""

from collections import OrderedDict

from protos.contract.errors import ErrorCode, UnavailableError

MAX_BUCKETS = 16_384
"""Callers remembered; the longest silent is forgotten first, which only refills its bucket."""


class RateLimiter:
    """One bucket per caller."""

    def __init__(self, *, calls_per_second: float, burst_calls: float) -> None:
        self._calls_per_second = calls_per_second
        self._burst_calls = burst_calls
        self._bucket_by_caller: OrderedDict[str, tuple[float, float]] = OrderedDict()
        """Caller -> (calls left, when counted)."""

    def take(self, caller: str, *, now_monotonic_seconds: float) -> None:
        """Count one call. Raises UnavailableError (RATE_LIMITED) when the bucket is empty."""
        left, counted_seconds = self._bucket_by_caller.pop(
            caller, (self._burst_calls, now_monotonic_seconds)
        )
        left = min(
            self._burst_calls,
            left + (now_monotonic_seconds - counted_seconds) * self._calls_per_second,
        )
        is_allowed = left >= 1
        self._bucket_by_caller[caller] = (left - 1 if is_allowed else left, now_monotonic_seconds)
        while len(self._bucket_by_caller) > MAX_BUCKETS:
            self._bucket_by_caller.popitem(last=False)
        if not is_allowed:
            raise UnavailableError(
                f"{caller} calls too often",
                allowed=f"{self._calls_per_second:g} calls per second, "
                f"bursts of {self._burst_calls:g}",
                remedy=f"wait {(1 - left) / self._calls_per_second:.1f} s",
                code=ErrorCode.RATE_LIMITED,
            )
