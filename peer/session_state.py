"""What the session machine remembers, and which state that amounts to. Pure, a part of session.py.

The state of a session is derived from facts by precedence: the first claim that holds wins, and its
sentence is the reason.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from peer.lease_holdings import LeaseHoldings
from peer.session_events import ChildName, DutyOffered, RoundEnded
from peer.session_link import GRACE_SECONDS, CoordinatorLink
from protos.contract.telemetry import RoundOutcome, RoundPhase, SessionState

_REDUCING = (RoundPhase.EXCHANGE, RoundPhase.REDUCE, RoundPhase.AGREE, RoundPhase.APPLY)


@dataclass(frozen=True, slots=True)
class Position:
    """A state of the model and this peer's part in the round after it."""

    incarnation: int
    outer_step: int
    round_tokens: int
    state_digest: bytes = b""


@dataclass(slots=True)
class OpenDuty:
    """A duty that was accepted."""

    event: DutyOffered
    is_begun: bool = False


@dataclass(slots=True)
class SessionFacts:
    """Everything that the machine remembers, leases and the coordinator apart."""

    join_reason: str = ""
    is_joined: bool = False
    is_dataset_ready: bool = False
    is_swarm_ready: bool = False
    is_trainer_ready: bool = False
    micro_batch_sequences: int = 0
    """Windows in one micro-batch of the trainer that was ready last."""
    can_save_memory: bool = False
    """True if that trainer could still recompute activations."""
    position: Position | None = None
    """The swarm process's state; None while it has none."""
    coming_tokens: int = 0
    """Of a round once the newest directive is in force, if this peer has none before."""
    is_run_paused: bool = False
    phase: RoundPhase = RoundPhase.SYNC
    phase_reason: str = "the swarm process is starting"
    is_trainer_idle: bool = False
    is_swarm_told_idle: bool = False
    """What the swarm process was told of this peer's work last. A joiner has none before its roster
    is in force: it takes part in rounds, gets each step's bytes with the others, and they do not
    wait for it.
    """
    is_trainer_paused: bool = False
    trainer_position: Position | None = None
    """What the trainer was told last; None before its first state."""
    contribution_tokens: int = 0
    """Tokens in the contribution that the trainer is making."""
    is_contributing: bool = False
    """True from a contribution to the end of its round."""
    offer_number: int = 0
    """Of the contribution whose verdict the trainer has not been told; 0 if there is none."""
    outcome: RoundEnded | None = None
    """Ended round that the trainer has not been told of."""
    duty: OpenDuty | None = None
    last_duty: tuple[str, int] = ("", 0)
    drain_reason: str | None = None
    left_reason: str | None = None
    deaths_by_child: dict[ChildName, list[float]] = field(default_factory=dict)
    proven_children: set[ChildName] = field(default_factory=set)
    """Those that were ready at least once, so that this machine can run them."""

    @property
    def tokens_to_lease(self) -> int:
        """Of one round of this peer, now or as soon as the newest directive is in force."""
        if self.position is None or self.is_run_paused:
            return 0
        return self.position.round_tokens or self.coming_tokens

    def lost_offer(self, reason: str) -> RoundEnded:
        """Verdict on a contribution that no round has had."""
        return RoundEnded(
            outcome=RoundOutcome.RESYNC,
            incarnation=0,
            outer_step=0,
            reason=reason,
            offer_number=self.offer_number,
        )


def derive_state(
    facts: SessionFacts, link: CoordinatorLink, leases: LeaseHoldings, *, now_seconds: float
) -> tuple[SessionState, str]:
    """State and reason."""
    for state, reason in _claims(facts, link, leases, now_seconds):
        if reason is not None:
            return state, reason
    raise AssertionError("the last claim always has a reason")


def _claims(
    facts: SessionFacts, link: CoordinatorLink, leases: LeaseHoldings, now_seconds: float
) -> Iterator[tuple[SessionState, str | None]]:
    """States in order of precedence, each with the reason for it, or None if it does not hold."""
    yield SessionState.LEFT, facts.left_reason
    yield SessionState.DRAINING, facts.drain_reason
    if not facts.is_joined:
        yield SessionState.JOINING, facts.join_reason or None
        yield SessionState.IDLE, "not started"
    yield SessionState.SYNCING, _syncing_reason(facts)
    position = facts.position
    assert position is not None
    if facts.duty is not None and facts.duty.is_begun:
        event = facts.duty.event
        yield SessionState.ON_DUTY, f"{event.kind} (duty {event.duty_id})"
    if facts.is_run_paused:
        yield SessionState.WAITING, "the run is paused by its operator"
    if facts.phase is RoundPhase.NO_QUORUM:
        yield SessionState.WAITING, f"no quorum: {facts.phase_reason}"
    if link.is_grace_over(now_seconds):
        minutes = GRACE_SECONDS / 60
        yield (
            SessionState.WAITING,
            f"WAITING_FOR_COORDINATOR for more than {minutes:.0f} minutes: {link.lost_reason}",
        )
    is_in_round = facts.phase in _REDUCING and facts.is_trainer_idle
    if facts.is_contributing or is_in_round:
        yield SessionState.AVERAGING, f"step {position.outer_step + 1}"
    if position.round_tokens == 0:
        yield SessionState.WAITING, "not in the roster in force yet; the next directive decides"
    if facts.is_trainer_idle and leases.left_tokens == 0:
        yield SessionState.WAITING, f"no leases: {link.no_lease_reason or 'asking for more'}"
    yield SessionState.TRAINING, f"step {position.outer_step + 1}"


def _syncing_reason(facts: SessionFacts) -> str | None:
    if not facts.is_swarm_ready:
        return facts.phase_reason
    if facts.phase is RoundPhase.SYNC:
        return facts.phase_reason
    if facts.position is None:
        return "loading the state"
    if not facts.is_dataset_ready:
        return "fetching manifest, tokenizer and held-out chunks"
    if not facts.is_trainer_ready:
        return "the trainer is starting"
    return None
