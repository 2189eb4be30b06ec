"""What the training loop asks of a strategy, and what a strategy asks of the swarm; the loop knows
no more than this.

A strategy owns the work that is not committed yet: it takes in each micro-batch's gradient, says
when the own token budget of the round is done, and carries the contribution through a round. The
swarm process, on the other side of the port, repeats attempts with that frozen contribution until
it can name an outcome.
"""

from dataclasses import dataclass
from typing import Any, Protocol

from peer.data.feed import TrainedRange
from peer.shared_vectors import StatePosition
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

    RESYNC, CANCELLED: it is lost, and so is its data.
    """
    round_tokens: int
    """Own token budget of the next round; 0 while not in the roster."""
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OfferedContribution:
    """What is announced once the vector lies in shared memory."""

    base: StatePosition
    """State that the gradients were computed at."""
    ranges: tuple[TrainedRange, ...]
    num_tokens: int
    loss_nats: float
    """Mean over the tokens."""


class RoundPort(Protocol):
    """The way to the swarm process."""

    def run_round(self, offered: OfferedContribution) -> Outcome:
        """Announce a contribution and wait, however long, until its round has an outcome."""
        ...


class Strategy(Protocol):
    """Uncommitted work of one peer."""

    def begin(self, base: StatePosition, *, round_tokens: int) -> None:
        """Forget everything uncommitted and work towards the outer step after `base`."""
        ...

    def set_budget(self, round_tokens: int) -> None:
        """Go on with the work under way towards another token budget."""
        ...

    def left_tokens(self) -> int:
        """Tokens still to be trained before a round is due; 0 while no round is worked for."""
        ...

    def after_inner_step(self, grads: Float32Vector, *, num_tokens: int, total_nats: float) -> None:
        """Take in one micro-batch: its summed gradient, tokens and summed loss."""
        ...

    def due(self, *, is_feed_empty: bool) -> bool:
        """True if a round should be run: the budget is done, or there is work and no more data."""
        ...

    def run_round(self, port: RoundPort, ranges: tuple[TrainedRange, ...]) -> Outcome:
        """Bring the work in as the contribution of a round, and wait for the outcome."""
        ...

    def state_dict(self) -> PlainState:
        """Numbers that describe the uncommitted work, as plain data."""
        ...
