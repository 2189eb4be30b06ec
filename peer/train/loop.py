"""THE training loop: leased windows in, contributions out, for as long as the daemon wants.

Each turn folds in what the daemon has said, trains one micro-batch, and, when the strategy says
that the own token budget is done, carries the contribution through a round. The loop does not know
which strategy it has. After every outcome the state is read from shared memory again, because the
swarm process alone writes it. Whatever ends early (another's step won, a non-finite gradient, a
stop) drops the uncommitted work whole and hands its leases back, so no window is counted that is
not in a certificate.
"""

import logging
import time
from collections.abc import Callable

from peer.data.feed import Feed, LeaseUnreadableError, MicroBatch, TrainedRange
from peer.shared_vectors import SharedVectors, StatePosition
from peer.swarm.strategy import OfferedContribution, Outcome, Strategy
from peer.train.duty import EvaluationDesk, load_params
from peer.train.link import DaemonLink
from peer.train.reports import Reports
from peer.train.state import TrainerState
from peer.train.step import MicroStep
from protos.contract.errors import RunFailedError
from protos.contract.telemetry import RoundOutcome

_LOGGER = logging.getLogger(__name__)

MAX_BAD_MICRO_BATCHES = 5
"""Micro-batches in a row with a loss or gradient that is not finite, after which the trainer gives
up.
"""
HELD_ROUNDS = 2
"""Rounds of work that the feed should hold."""
_WAIT_SECONDS = 1.0


class TrainLoop:
    """The loop and what it works with; `run` is the whole of a trainer's life after set-up."""

    def __init__(
        self,
        *,
        step: MicroStep,
        strategy: Strategy,
        feed: Feed,
        vectors: SharedVectors,
        link: DaemonLink,
        desk: EvaluationDesk,
        micro_batch_sequences: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.step = step
        self.strategy = strategy
        self.feed = feed
        self.vectors = vectors
        self.link = link
        self.desk = desk
        self.micro_batch_sequences = micro_batch_sequences
        self.state = TrainerState()
        self.base: StatePosition | None = None
        self._clock = clock
        self.reports = Reports(link, clock=clock)
        self._num_bad = 0
        self._is_in_round = False
        self._seq_len = step.model.spec.seq_len

    def run(self) -> str:
        """Train until told to stop; returns why it ended.

        Raises RunFailedError for gradients that stay non-finite.
        """
        offered: tuple[TrainedRange, ...] = ()
        while not self.state.is_stopping:
            is_evaluating = self.desk.advance(self.state.evaluations)
            batch = self._next_batch()
            if batch is not None:
                self._train(batch)
            self._report_feed()
            if self.strategy.due(is_feed_empty=self._is_out_of_work) and not self.state.is_paused:
                offered = self.feed.cut()
                self._is_in_round = True
                outcome = self.strategy.run_round(self, offered)
                self._is_in_round = False
                offered = self._after_round(outcome, offered)
            is_waiting = batch is None and not is_evaluating
            self._listen(wait_seconds=_WAIT_SECONDS if is_waiting else 0.0)
        kept = {part.lease_number for part in offered}
        numbers = [number for number in self.feed.reset() if number not in kept]
        self.reports.released(numbers, self.state.stop_reason)
        return self.state.stop_reason

    # RoundPort: how a strategy reaches the swarm.

    def run_round(self, offered: OfferedContribution) -> Outcome:
        """Announce the contribution; serve messages and evaluations until its outcome comes, or a
        stop.
        """
        self.state.take_outcome()
        self.link.send(
            "contribution_ready",
            incarnation=offered.base.incarnation,
            outer_step=offered.base.outer_step,
            ranges=[
                {"lease": p.lease, "begin_window": p.begin_window, "end_window": p.end_window}
                for p in offered.ranges
            ],
            num_tokens=offered.num_tokens,
            loss_nats=offered.loss_nats,
        )
        while (outcome := self.state.take_outcome()) is None:
            if self.state.is_stopping:
                reason = "stopped before the round had an outcome"
                return Outcome(kind=RoundOutcome.CANCELLED, round_tokens=0, reason=reason)
            is_evaluating = self.desk.advance(self.state.evaluations)
            self._listen(wait_seconds=0.0 if is_evaluating else _WAIT_SECONDS)
        return outcome

    # One turn's parts.

    @property
    def _is_out_of_work(self) -> bool:
        """True if a state and a budget are there but no window is, and none is on its way."""
        has_budget = self.base is not None and self.state.round_tokens > 0
        return has_budget and self.feed.held_tokens == 0 and self.state.has_no_more_leases

    def _next_batch(self) -> MicroBatch | None:
        max_windows = min(self.micro_batch_sequences, self.strategy.left_tokens() // self._seq_len)
        if max_windows < 1 or self.state.is_paused or self.state.is_stopping:
            return None
        while True:
            try:
                return self.feed.next_micro_batch(max_windows=max_windows)
            except LeaseUnreadableError as error:
                _LOGGER.warning("%s", error)
                self.feed.drop([error.lease_number])
                self.reports.released([error.lease_number], error.found)

    def _train(self, batch: MicroBatch) -> None:
        begin_seconds = self._clock()
        result = self.step.run(batch.examples)
        if not result.is_finite:
            self._drop_bad(result.total_nats)
            return
        self._num_bad = 0
        self.strategy.after_inner_step(
            self.step.host_grads(), num_tokens=result.num_tokens, total_nats=result.total_nats
        )
        assert self.base is not None
        self.reports.progress(
            result,
            outer_step=self.base.outer_step,
            contribution_tokens=self.feed.trained_tokens,
            seconds=self._clock() - begin_seconds,
        )

    def _drop_bad(self, total_nats: float) -> None:
        """The gradient is lost with its data; RunFailedError when that happens again and again."""
        self._num_bad += 1
        reason = f"loss or gradient not finite, {self._num_bad} in a row"
        _LOGGER.warning("micro-batch dropped: %s (loss sum %s)", reason, total_nats)
        self._drop_work(reason)
        if self._num_bad >= MAX_BAD_MICRO_BATCHES:
            raise RunFailedError(
                reason,
                allowed=f"fewer than {MAX_BAD_MICRO_BATCHES}",
                remedy="lower optimizer.peak_lr in a new run, or check this machine's memory",
            )

    def _after_round(
        self, outcome: Outcome, offered: tuple[TrainedRange, ...]
    ) -> tuple[TrainedRange, ...]:
        """Settle or drop the contribution; returns what is still out, which is so only after a
        stop.
        """
        if self.state.is_stopping and outcome.kind is RoundOutcome.CANCELLED:
            return offered
        _LOGGER.info("round on state %s: %s %s", self.base, outcome.kind, outcome.reason)
        if outcome.kind is RoundOutcome.COMMITTED:
            self.feed.settle()
        else:
            self._drop_work(outcome.reason)
        self._load_state()
        return ()

    def _report_feed(self) -> None:
        if self.base is not None:
            wanted_tokens = HELD_ROUNDS * self.state.round_tokens
            self.reports.need_leases(held_tokens=self.feed.held_tokens, wanted_tokens=wanted_tokens)
        self.reports.idle(self._is_out_of_work and self.feed.trained_tokens == 0)

    # State and messages.

    def _listen(self, *, wait_seconds: float = 0.0) -> None:
        """Fold in what has come and act on what cannot wait."""
        self.reports.turn()
        for message in self.link.receive(wait_seconds=wait_seconds):
            self.state.fold(message)
        self.feed.drop(self.state.take_lost())
        if self.state.has_news and not self.state.is_stopping and not self._is_in_round:
            self._follow_state()
        if self.base is not None:
            self.feed.add(self.state.take_leases(self.base.incarnation))

    def _follow_state(self) -> None:
        """News outside a round: keep the work if it was made on this very state, else drop it."""
        self.state.outcome = None
        position = self.vectors.position()
        if self.base is not None and (position.incarnation, position.outer_step) == (
            self.base.incarnation,
            self.base.outer_step,
        ):
            self.state.has_news = False
            self.strategy.set_budget(self.state.round_tokens)
            return
        self._drop_work("the state was replaced")
        self._load_state()

    def _load_state(self) -> None:
        """Copy the state and begin the next contribution on it; a new incarnation begins its leases
        anew.
        """
        position = load_params(self.vectors, self.step.parameters)
        if self.base is None or position.incarnation != self.base.incarnation:
            self.feed.reset()
        self.base = position
        self.state.has_news = False
        self.strategy.begin(position, round_tokens=self.state.round_tokens)

    def _drop_work(self, reason: str) -> None:
        """Forget uncommitted gradients and give back their leases."""
        self.reports.released(self.feed.abandon(), reason)
        if self.base is not None:
            self.strategy.begin(self.base, round_tokens=self.state.round_tokens)
