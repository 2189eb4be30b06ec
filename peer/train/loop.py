"""THE training loop: leased windows in, contributions out, for as long as the daemon wants.

Each turn folds in what the daemon has said, trains one micro-batch if the strategy wants one, and,
when the strategy says that the own token budget is done, offers the contribution; its outcome comes
with the messages of a later turn. The loop does not know which strategy it has, nor whether it
trains on while a contribution travels. After every outcome the strategy reads the state from shared
memory again, because the swarm process alone writes it. Whatever ends early (another's step won, a
non-finite gradient, a stop) drops the uncommitted work and hands its leases back, so no window is
counted that is not in a certificate.
"""

import logging
import time
from collections.abc import Callable, Sequence

from peer.data.feed import Feed, LeaseUnreadableError, MicroBatch, TrainedRange
from peer.shared_vectors import SharedVectors, StatePosition
from peer.swarm.strategy import OfferedContribution, Outcome, Strategy
from peer.train.bad_batches import BadBatches
from peer.train.duty import EvaluationDesk
from peer.train.link import DaemonLink
from peer.train.node_step import NodeStep
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
        step: MicroStep | NodeStep,
        strategy: Strategy,
        feed: Feed,
        vectors: SharedVectors,
        link: DaemonLink,
        desk: EvaluationDesk,
        micro_batch_sequences: int,
        bad_batches: BadBatches,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.step = step
        self.strategy = strategy
        self.feed = feed
        self.vectors = vectors
        self.link = link
        self.desk = desk
        self.micro_batch_sequences = micro_batch_sequences
        self.bad_batches = bad_batches
        self.state = TrainerState()
        self.base: StatePosition | None = None
        self._clock = clock
        self.reports = Reports(link, clock=clock)
        self._num_bad = 0
        self._num_offers = 0
        self._offered: tuple[TrainedRange, ...] = ()
        """Ranges of the contribution that travels; empty if none does."""
        self._seq_len = step.spec.seq_len

    def run(self) -> str:
        """Train until told to stop; returns why it ended.

        Raises RunFailedError for gradients that stay non-finite.
        """
        while not self.state.is_stopping:
            is_evaluating = self.desk.advance(self.state.evaluations)
            batch = self._next_batch()
            if batch is not None:
                self._train(batch)
            self._report_feed()
            if self.strategy.due(is_feed_empty=self._is_out_of_work) and not self.state.is_paused:
                self._offered = self.feed.cut()
                self.strategy.run_round(self, self._offered)
            is_waiting = batch is None and not is_evaluating
            self._listen(wait_seconds=_WAIT_SECONDS if is_waiting else 0.0)
        numbers = self._not_offered(self.feed.reset())
        self.reports.released(numbers, self.state.stop_reason)
        return self.state.stop_reason

    # RoundPort: how a strategy reaches the swarm.

    def offer(self, offered: OfferedContribution) -> None:
        """Announce the contribution; its outcome is seen by `_listen`."""
        self._num_offers += 1
        self.state.offer_number = self._num_offers
        self.link.send(
            "contribution_ready",
            offer_number=self._num_offers,
            incarnation=offered.base.incarnation,
            outer_step=offered.base.outer_step,
            state_digest=offered.base.state_digest,
            ranges=[
                {"lease": p.lease, "begin_window": p.begin_window, "end_window": p.end_window}
                for p in offered.ranges
            ],
            num_tokens=offered.num_tokens,
            loss_nats=offered.loss_nats,
        )

    # One turn's parts.

    @property
    def _is_out_of_work(self) -> bool:
        """True if a state and a budget are there but no window is, and none is on its way."""
        has_budget = self.base is not None and self.state.round_tokens > 0
        return has_budget and self.feed.held_tokens == 0 and self.state.has_no_more_leases

    def _next_batch(self) -> MicroBatch | None:
        max_windows = min(
            self.micro_batch_sequences, self.strategy.wanted_tokens() // self._seq_len
        )
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
            self._drop_bad(batch, result.total_nats)
            return
        self._num_bad = 0
        self.strategy.after_micro_batch(num_tokens=result.num_tokens, total_nats=result.total_nats)
        assert self.base is not None
        self.reports.progress(
            result,
            outer_step=self.base.outer_step,
            contribution_tokens=self.feed.trained_tokens,
            seconds=self._clock() - begin_seconds,
        )

    def _drop_bad(self, batch: MicroBatch, total_nats: float) -> None:
        """The gradient is lost with its data, which is kept in a file; RunFailedError when that
        happens again and again.
        """
        assert self.base is not None
        self._num_bad += 1
        reason = f"loss or gradient not finite, {self._num_bad} in a row"
        kept = self.bad_batches.keep(
            batch.examples, total_nats=total_nats, base=self.base, how=self.step.how
        )
        _LOGGER.warning("micro-batch skipped: %s (loss sum %s); kept %s", reason, total_nats, kept)
        self.link.send("bad_batch", kept=kept, reason=reason)
        self._drop_work(reason)
        if self._num_bad >= MAX_BAD_MICRO_BATCHES:
            raise RunFailedError(
                reason,
                allowed=f"fewer than {MAX_BAD_MICRO_BATCHES}",
                remedy=f"look at what was kept ({kept}); lower optimizer.peak_lr in a new run, or "
                "check this machine's memory",
            )

    def _after_round(self, outcome: Outcome) -> None:
        """Settle or drop the contribution, and take the state that the round has brought."""
        _LOGGER.info("round on state %s: %s %s", self.base, outcome.kind, outcome.reason)
        self._offered = ()
        self.state.has_news = False
        if outcome.kind is not RoundOutcome.COMMITTED:
            self._restart(outcome.reason)
            return
        self.feed.settle()
        before = self.base
        self.base = self.strategy.settle(round_tokens=self.state.round_tokens)
        if before is not None and not self.base.follows(before):
            self.reports.released(self.feed.abandon(), "the swarm has gone on without this work")
            self._begin_incarnation(before)

    def _report_feed(self) -> None:
        if self.base is not None:
            wanted_tokens = HELD_ROUNDS * self.state.round_tokens
            self.reports.need_leases(held_tokens=self.feed.held_tokens, wanted_tokens=wanted_tokens)
        has_nothing = self._is_out_of_work and self.feed.trained_tokens == 0
        self.reports.idle(has_nothing and not self._offered)

    # State and messages.

    def _listen(self, *, wait_seconds: float = 0.0) -> None:
        """Fold in what has come and act on what cannot wait."""
        self.reports.turn()
        for message in self.link.receive(wait_seconds=wait_seconds):
            self.state.fold(message)
        self.feed.drop(self.state.take_lost())
        if not self.state.is_stopping and (outcome := self.state.take_outcome()) is not None:
            self._after_round(outcome)
        elif not self.state.is_stopping and not self._offered and self.state.has_news:
            self._follow_state()
        if self.base is not None:
            self.feed.add(self.state.take_leases(self.base.incarnation))

    def _follow_state(self) -> None:
        """News outside a round: keep the work if it was made on this very state, else drop it."""
        if self.base is not None and self.base.is_same_state(self.vectors.position()):
            self.state.has_news = False
            self.strategy.set_budget(self.state.round_tokens)
            return
        self._restart("the state was replaced")

    def _restart(self, reason: str) -> None:
        """Give back everything uncommitted and begin on the state in shared memory."""
        self.reports.released(self.feed.abandon(), reason)
        before, self.state.has_news = self.base, False
        self.base = self.strategy.restart(round_tokens=self.state.round_tokens)
        self._begin_incarnation(before)

    def _begin_incarnation(self, before: StatePosition | None) -> None:
        """A new incarnation begins its leases anew."""
        assert self.base is not None
        if before is None or self.base.incarnation != before.incarnation:
            self.feed.reset()

    def _drop_work(self, reason: str) -> None:
        """Forget the work since the last contribution and give back its leases."""
        self.strategy.drop()
        numbers = self.feed.abandon(is_contribution_kept=bool(self._offered))
        self.reports.released(self._not_offered(numbers), reason)

    def _not_offered(self, lease_numbers: Sequence[int]) -> list[int]:
        """Without leases of the contribution that travels, whose round decides about them."""
        offered = {part.lease_number for part in self._offered}
        return [number for number in lease_numbers if number not in offered]
