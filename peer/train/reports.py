"""What the loop tells the daemon between rounds, said when it changes and not too often."""

import time
from collections import deque
from collections.abc import Callable, Sequence

from peer.train.link import DaemonLink
from peer.train.step import StepResult

REQUEST_INTERVAL_SECONDS = 1.0
TURN_INTERVAL_SECONDS = 1.0
_KEPT_TURNS = 64
"""Last turns whose longest is reported; a machine that slept is forgotten after as many."""
_SPEED_SMOOTHING = 0.2


class Reports:
    """Progress, wishes for leases, idleness, returned leases."""

    def __init__(self, link: DaemonLink, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._link = link
        self._clock = clock
        self.least_turn_seconds = 0.0
        """What a turn may take in any case; the daemon waits for ten of them."""
        self._trained_tokens = 0
        self._tokens_per_second = 0.0
        self._next_request_seconds = 0.0
        self._is_idle = False
        self._turn_seconds: deque[float] = deque(maxlen=_KEPT_TURNS)
        self._batch_seconds: deque[float] = deque(maxlen=_KEPT_TURNS)
        self._last_turn_seconds = clock()
        self._next_turn_seconds = 0.0

    def turn(self) -> None:
        """The loop has come round; the daemon hears about once a second, with the longest of the
        last turns and micro-batches.
        """
        now_seconds = self._clock()
        self._turn_seconds.append(now_seconds - self._last_turn_seconds)
        self._last_turn_seconds = now_seconds
        if now_seconds >= self._next_turn_seconds:
            self._next_turn_seconds = now_seconds + TURN_INTERVAL_SECONDS
            longest_seconds = max(
                *self._turn_seconds, *self._batch_seconds, self.least_turn_seconds
            )
            self._link.send("turn", longest_turn_seconds=longest_seconds)

    def expect_batches_of(self, seconds: float) -> None:
        """What a micro-batch will take, before one was trained."""
        self._batch_seconds.append(seconds)

    def progress(
        self, result: StepResult, *, outer_step: int, contribution_tokens: int, seconds: float
    ) -> None:
        """A micro-batch was trained in `seconds`; speed is smoothed over the last few."""
        self._trained_tokens += result.num_tokens
        self._batch_seconds.append(seconds)
        speed = result.num_tokens / max(seconds, 1e-9)
        share = _SPEED_SMOOTHING if self._tokens_per_second else 1.0
        self._tokens_per_second += share * (speed - self._tokens_per_second)
        self._link.send_progress(
            outer_step=outer_step,
            num_tokens=contribution_tokens,
            loss_nats=result.total_nats / result.num_tokens,
            tokens_per_second=self._tokens_per_second,
            trained_tokens=self._trained_tokens,
        )

    def need_leases(self, *, held_tokens: int, wanted_tokens: int) -> None:
        """The feed holds less than it should; asked for again every second until it does not."""
        now_seconds = self._clock()
        if held_tokens < wanted_tokens and now_seconds >= self._next_request_seconds:
            self._next_request_seconds = now_seconds + REQUEST_INTERVAL_SECONDS
            missing_tokens = wanted_tokens - held_tokens
            self._link.send("need_leases", held_tokens=held_tokens, wanted_tokens=missing_tokens)

    def idle(self, is_idle: bool) -> None:
        """There is nothing to train, or there is again."""
        if is_idle != self._is_idle:
            self._is_idle = is_idle
            self._link.send("idle", is_idle=is_idle)

    def released(self, lease_numbers: Sequence[int], reason: str) -> None:
        """These leases are given back, begun or not."""
        if lease_numbers:
            self._link.send("released", lease_numbers=list(lease_numbers), reason=reason)
