"""Notices a child that makes no progress: stopped, swapped out or wedged, but alive.

The trainer's loop and the swarm process's event loop say about once a second that they have come
round (`turn`), with the longest that a turn took lately; what a turn takes on this machine with
this model is thus measured, not guessed. Silence of ten such turns is a failure: the daemon kills
the process, and everything that a death means follows (begun leases go back, it is started again).
Until the first turn, imports, devices and the model's memory are waited for: as long as that may
take by the model's size, and twice as long after each start in which it was not enough. Only time
in which the daemon itself ran counts, so a laptop that slept or a whole peer that was stopped kills
nothing.
"""

SILENT_TURNS = 10.0
"""Turns without a word that are taken for a failure."""
MIN_TURN_SECONDS = 1.0
"""The loop says so no more often than this, however short its turns are."""
_MAX_TICK_SECONDS = 1.0
"""Most that one tick of the daemon counts; ticks come several times a second."""
_START_SECONDS = 300.0
"""For imports, devices and local ranks; seconds on an idle machine, two minutes on a full one."""
_LOADED_BYTES_PER_SECOND = 20e6
"""A tenth of what a slow disk gives to a machine that swaps."""


def start_seconds(vector_bytes: int) -> float:
    """How long a child may take from its configuration to its first turn, for a model whose
    parameters are so many bytes.
    """
    return _START_SECONDS + vector_bytes / _LOADED_BYTES_PER_SECOND


class ChildWatch:
    """Pure: turns and time in, a verdict out. Before it is told to begin nothing is expected."""

    def __init__(self) -> None:
        self._longest_turn_seconds: float | None = None
        self._start_seconds: float | None = None
        self._num_silent_starts = 0
        self._silent_seconds = 0.0
        self._last_tick_seconds: float | None = None

    def forget(self) -> None:
        """The child has ended, or is about to."""
        self._longest_turn_seconds = self._start_seconds = None

    def begin(self, seconds: float) -> None:
        """The child was told what to work on; its first turn should come within `seconds`."""
        self._start_seconds = seconds * 2.0**self._num_silent_starts
        self._longest_turn_seconds, self._silent_seconds = None, 0.0

    def turn(self, longest_turn_seconds: float) -> None:
        """The loop came round."""
        self._longest_turn_seconds, self._start_seconds = longest_turn_seconds, None
        self._silent_seconds, self._num_silent_starts = 0.0, 0

    @property
    def allowed_seconds(self) -> float:
        """Silence that is still no failure."""
        if self._start_seconds is not None:
            return self._start_seconds
        return SILENT_TURNS * max(self._longest_turn_seconds or 0.0, MIN_TURN_SECONDS)

    def tick(self, now_seconds: float) -> str:
        """Time has passed; returns why the trainer has to be killed, "" if it has not."""
        last, self._last_tick_seconds = self._last_tick_seconds, now_seconds
        is_starting = self._start_seconds is not None
        if last is None or (self._longest_turn_seconds is None and not is_starting):
            return ""
        self._silent_seconds += min(now_seconds - last, _MAX_TICK_SECONDS)
        if self._silent_seconds <= self.allowed_seconds:
            return ""
        if is_starting:
            self._num_silent_starts += 1
            return (
                f"not ready {self._silent_seconds:.0f} s after it was told what to do "
                f"({self.allowed_seconds:.0f} s are allowed for a model of this size, twice as "
                "much next time)"
            )
        return (
            f"no progress for {self._silent_seconds:.0f} s, though its longest turn lately took "
            f"{self._longest_turn_seconds:.1f} s ({self.allowed_seconds:.0f} s are allowed)"
        )
