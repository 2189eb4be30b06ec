"""`sync`: one averaged gradient and one exact update per round; equals training with one large
batch.

Gradients (sums over tokens) are added up in fp32 straight in the shared contribution vector, which
the swarm process reads only between the announcement and the outcome; nothing is trained then, so
no second buffer is needed. At the end the vector is divided by its tokens: it is the mean gradient
per token, and the round weighs it by tokens again.
"""

import numpy as np

from peer.data.feed import TrainedRange
from peer.shared_vectors import SharedVectors, StatePosition
from peer.swarm.strategy import (
    OfferedContribution,
    PlainState,
    RoundPort,
    TrainedParameters,
    load_params,
)


class SyncStrategy:
    """Strategy of this name; see peer/swarm/strategy.py for what each method promises."""

    def __init__(
        self, vectors: SharedVectors, parameters: TrainedParameters, *, seq_len: int
    ) -> None:
        """Budgets are whole windows of `seq_len` tokens."""
        self._vectors, self._parameters = vectors, parameters
        self._contribution = vectors.contribution
        self._seq_len = seq_len
        self._base: StatePosition | None = None
        self._round_tokens = 0
        self._is_travelling = False
        self.num_tokens = 0
        self._total_nats = 0.0

    def restart(self, *, round_tokens: int) -> StatePosition:
        """Forget uncommitted work; the next contribution is made on the state read."""
        self._base = load_params(self._vectors, self._parameters)
        self._round_tokens = round_tokens
        self._is_travelling = False
        self.drop()
        return self._base

    def settle(self, *, round_tokens: int) -> StatePosition:
        """Nothing was trained meanwhile."""
        return self.restart(round_tokens=round_tokens)

    def drop(self) -> None:
        """Nothing is trained while a contribution travels, so there is nothing to forget then."""
        if not self._is_travelling:
            self.num_tokens = 0
            self._total_nats = 0.0
            self._contribution[:] = 0.0
            self._parameters.forget_grads()

    def set_budget(self, round_tokens: int) -> None:
        """Keep the work, change how much is wanted."""
        self._round_tokens = round_tokens

    def wanted_tokens(self) -> int:
        """A rest smaller than a window is not trained."""
        if self._is_travelling:
            return 0
        left = max(0, self._round_tokens - self.num_tokens)
        return left // self._seq_len * self._seq_len

    def after_micro_batch(self, *, num_tokens: int, total_nats: float) -> None:
        """Add a micro-batch's gradient to the sum."""
        self._parameters.add_grads_to(self._contribution)
        self.num_tokens += num_tokens
        self._total_nats += total_nats

    def due(self, *, is_feed_empty: bool) -> bool:
        """Also with less than the budget when there is no more data: others may be waiting."""
        has_work = self.num_tokens > 0 and not self._is_travelling
        return has_work and (is_feed_empty or self.wanted_tokens() == 0)

    def run_round(self, port: RoundPort, ranges: tuple[TrainedRange, ...]) -> None:
        """Offer the mean gradient per token."""
        assert self._base is not None and self.num_tokens > 0
        windows = sum(part.end_window - part.begin_window for part in ranges)
        assert windows * self._seq_len == self.num_tokens
        self._parameters.collect_grads(self._contribution)
        np.divide(self._contribution, np.float32(self.num_tokens), out=self._contribution)
        self._is_travelling = True
        port.offer(
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
