"""What the training loop asks of a strategy, and what a strategy asks of the swarm; the loop knows
no more than this.

A strategy owns the work that is not committed yet and the parameters that micro-batches are trained
on: it takes in each micro-batch's gradient, says when the own token budget of the round is done,
and offers a contribution. The swarm process, on the other side of the port, repeats attempts with
that frozen contribution until it can name an outcome. Meanwhile the loop goes on: how much may be
trained while a contribution travels is the strategy's to say (`wanted_tokens`; of sync nothing).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from peer.data.feed import TrainedRange
from peer.shared_vectors import SharedVectors, StatePosition
from protos.contract.digest import Float32Vector
from protos.contract.telemetry import RoundOutcome

PlainState = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a round ended for this peer.

    After any of them the state in shared memory is read again.
    """

    kind: RoundOutcome
    """COMMITTED: the contribution is in the state.

    RESYNC: it is lost, and so is its data.
    """
    round_tokens: int
    """Own token budget of the next round; 0 while not in the roster."""
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OfferedContribution:
    """What is announced once the vector lies in shared memory."""

    base: StatePosition
    """State that the contribution is made on."""
    ranges: tuple[TrainedRange, ...]
    num_tokens: int
    loss_nats: float
    """Mean over the tokens."""


class RoundPort(Protocol):
    """The way to the swarm process."""

    def offer(self, offered: OfferedContribution) -> None:
        """Announce a contribution; its vector is left alone until the outcome has come."""
        ...


class Strategy(Protocol):
    """Uncommitted work of one peer."""

    def restart(self, *, round_tokens: int) -> StatePosition:
        """Forget everything uncommitted, a travelling contribution included, take the state in
        shared memory and work towards the outer step after it; returns which state it is.
        """
        ...

    def settle(self, *, round_tokens: int) -> StatePosition:
        """The travelling contribution was committed: take what it brought; returns the state.

        Work done while it travelled is kept if that state is the next one, else forgotten.
        """
        ...

    def drop(self) -> None:
        """Forget the work since the last contribution; a travelling one stays."""
        ...

    def set_budget(self, round_tokens: int) -> None:
        """Go on with the work under way towards another token budget."""
        ...

    def wanted_tokens(self) -> int:
        """Most tokens of the next micro-batch, whole windows; 0 while nothing may be trained."""
        ...

    def after_micro_batch(self, *, num_tokens: int, total_nats: float) -> None:
        """Take in the gradient that lies in the parameters: summed over tokens, as is the loss."""
        ...

    def due(self, *, is_feed_empty: bool) -> bool:
        """True if a contribution should be offered now: the budget is done, or there is work and no
        more data.
        """
        ...

    def run_round(self, port: RoundPort, ranges: tuple[TrainedRange, ...]) -> None:
        """Freeze the work into a contribution over `ranges` and offer it; `restart` or `settle`
        ends the round.
        """
        ...

    def state_dict(self) -> PlainState:
        """Numbers that describe the uncommitted work, as plain data."""
        ...


class TrainedParameters(Protocol):
    """The parameters that micro-batches are trained on, on one device (FlatParameters) or in parts
    on several (peer/train/node_step.py). Gradients reach a sum either micro-batch by micro-batch,
    or all at once when the parts keep them.
    """

    def load(self, fill: Callable[[Float32Vector], StatePosition | None]) -> StatePosition | None:
        """Have `fill` write all values, canonical order; returns what it returns."""
        ...

    def host_values(self) -> Float32Vector:
        """All values, canonical order; may be changed by the next call."""
        ...

    def add_grads_to(self, total: Float32Vector) -> None:
        """A micro-batch was trained: add its gradient, or nothing if the parts keep the sum."""
        ...

    def collect_grads(self, total: Float32Vector) -> None:
        """Complete the sum of the gradients since they were last forgotten."""
        ...

    def forget_grads(self) -> None:
        """Begin a new sum."""
        ...


def load_params(vectors: SharedVectors, parameters: TrainedParameters) -> StatePosition:
    """Copy the state's parameters into a model, whole, and say which state it is."""
    position = parameters.load(vectors.read_params)
    assert position is not None
    return position
