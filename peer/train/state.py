"""What the daemon has said, folded into what the loop may do. Pure: messages in, plain fields out.

The loop reads these fields at the border of each micro-batch and clears what it has acted on
(`take_*`); nothing here looks at a clock or a socket, so every order of messages can be tested.
"""

from dataclasses import dataclass, field
from pathlib import Path

from peer.data.reader import LeasedRange, leased_range_from_signed
from peer.ipc import Message
from peer.swarm.strategy import Outcome
from protos.contract.errors import UsageError
from protos.contract.telemetry import RoundOutcome
from protos.muster.v1 import common_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationOrder:
    """A duty to evaluate the state."""

    duty_id: str
    eval_tokens: int
    heldout_paths: tuple[Path, ...]


@dataclass(slots=True, kw_only=True)
class TrainerState:
    """The daemon's wishes; `fold` takes in one message."""

    is_stopping: bool = False
    stop_reason: str = ""
    is_paused: bool = False
    is_state_announced: bool = False
    """True once there is a state to train on."""
    has_news: bool = False
    """True while an announced state or budget has not been looked at."""
    round_tokens: int = 0
    offer_number: int = 0
    """Of the contribution that travels; 0 if none does. An outcome that names another is news only:
    the state in shared memory may have been read, and worked on, before its outcome came.
    """
    outcome: Outcome | None = None
    """Of that contribution, until it is taken."""
    has_no_more_leases: bool = False
    """True while the feed will not be filled; false while leases may be on their way."""
    lost_lease_numbers: list[int] = field(default_factory=list)
    evaluations: list[EvaluationOrder] = field(default_factory=list)
    _leases: list[tuple[int, LeasedRange]] = field(default_factory=list)

    def fold(self, message: Message) -> None:
        """Take in one message. Raises UsageError for a kind that there is not."""
        match message["kind"]:
            case "leases":
                self._fold_leases(message)
            case "lost_leases":
                lost = set(message["lease_numbers"])
                self.lost_lease_numbers += sorted(lost)
                self._leases = [e for e in self._leases if e[1].lease_number not in lost]
            case "no_more_leases":
                self.has_no_more_leases = True
            case "state_ready":
                self.is_state_announced = self.has_news = True
                self.round_tokens = message["round_tokens"]
            case "round_outcome":
                self.is_state_announced = self.has_news = True
                self.round_tokens = message["round_tokens"]
                if self.offer_number and message["offer_number"] == self.offer_number:
                    self.offer_number = 0
                    self.outcome = Outcome(
                        kind=RoundOutcome(message["outcome"]),
                        round_tokens=message["round_tokens"],
                        reason=message["reason"],
                    )
            case "evaluate":
                self.evaluations.append(
                    EvaluationOrder(
                        duty_id=message["duty_id"],
                        eval_tokens=message["eval_tokens"],
                        heldout_paths=tuple(Path(path) for path in message["heldout_paths"]),
                    )
                )
            case "pause":
                self.is_paused = message["is_paused"]
            case "stop":
                self.is_stopping, self.stop_reason = True, message.get("reason", "asked to stop")
            case "closed":
                self.is_stopping, self.stop_reason = True, "the daemon is gone"
            case kind:
                raise UsageError(
                    f"message {kind!r} to the trainer",
                    allowed="the kinds of TrainerState.fold",
                    remedy="run daemon and trainer from the same installation",
                )

    def _fold_leases(self, message: Message) -> None:
        self.has_no_more_leases = False
        for plain in message["leases"]:
            leased = leased_range_from_signed(plain["lease"], path=Path(plain["path"]))
            signed = common_pb2.Signed.FromString(plain["lease"])
            incarnation = common_pb2.Lease.FromString(signed.payload).incarnation
            self._leases.append((incarnation, leased))

    def take_leases(self, incarnation: int) -> list[LeasedRange]:
        """Leases of this incarnation that have come since; older ones are dropped, newer ones wait
        for their state.
        """
        taken = [leased for number, leased in self._leases if number == incarnation]
        self._leases = [entry for entry in self._leases if entry[0] > incarnation]
        return taken

    def take_outcome(self) -> Outcome | None:
        """The outcome that has come since, once."""
        outcome, self.outcome = self.outcome, None
        return outcome

    def take_lost(self) -> list[int]:
        """Numbers of lost leases that have come since, once."""
        numbers, self.lost_lease_numbers = self.lost_lease_numbers, []
        return numbers
