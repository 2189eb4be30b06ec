"""`sync`: one averaged gradient and one exact update per round; equals training with one large
batch.

Gradients (sums over tokens) are added up in fp32 straight in the shared contribution vector, which
the swarm process reads only between the announcement and the outcome; nothing is trained then, so
no second buffer is needed. At the end the vector is divided by its tokens: it is the mean gradient
per token, and the round weighs it by tokens again.
"""

import numpy as np

from peer.data.feed import TrainedRange
from peer.shared_vectors import StatePosition
from peer.swarm.strategy import OfferedContribution, Outcome, PlainState, RoundPort
from protos.contract.digest import Float32Vector


class SyncStrategy:
    """Strategy of this name; see peer/swarm/strategy.py for what each method promises."""

    def __init__(self, contribution: Float32Vector, *, seq_len: int) -> None:
        """`contribution` is the shared vector; budgets are whole windows of `seq_len` tokens."""
        self._contribution = contribution
        self._seq_len = seq_len
        self._base: StatePosition | None = None
        self._round_tokens = 0
        self.num_tokens = 0
        self._total_nats = 0.0

    def begin(self, base: StatePosition, *, round_tokens: int) -> None:
        """Forget uncommitted work; the next contribution is made on `base`."""
        self._base = base
        self._round_tokens = round_tokens
        self.num_tokens = 0
        self._total_nats = 0.0
        self._contribution[:] = 0.0

    def set_budget(self, round_tokens: int) -> None:
        """Keep the work, change how much is wanted."""
        self._round_tokens = round_tokens

    def left_tokens(self) -> int:
        """Whole windows only: a rest smaller than one is not trained."""
        left = max(0, self._round_tokens - self.num_tokens)
        return left // self._seq_len * self._seq_len

    def after_inner_step(self, grads: Float32Vector, *, num_tokens: int, total_nats: float) -> None:
        """Add a micro-batch's gradient to the sum."""
        np.add(self._contribution, grads, out=self._contribution)
        self.num_tokens += num_tokens
        self._total_nats += total_nats

    def due(self, *, is_feed_empty: bool) -> bool:
        """Also with less than the budget when there is no more data: others may be waiting."""
        return self.num_tokens > 0 and (is_feed_empty or self.left_tokens() == 0)

    def run_round(self, port: RoundPort, ranges: tuple[TrainedRange, ...]) -> Outcome:
        """Announce the mean gradient per token; the caller calls `begin` with what the outcome
        brought.
        """
        assert self._base is not None and self.num_tokens > 0
        windows = sum(part.end_window - part.begin_window for part in ranges)
        assert windows * self._seq_len == self.num_tokens
        np.divide(self._contribution, np.float32(self.num_tokens), out=self._contribution)
        return port.run_round(
            OfferedContribution(
                base=self._base,
                ranges=ranges,
                num_tokens=self.num_tokens,
                loss_nats=self._total_nats / self.num_tokens,
            )
        )

    def state_dict(self) -> PlainState:
        """Progress towards the round; gradients are not kept over a restart, their data is leased
        again.
        """
        return {
            "num_tokens": self.num_tokens,
            "round_tokens": self._round_tokens,
            "loss_nats": self._total_nats / self.num_tokens if self.num_tokens else 0.0,
        }
