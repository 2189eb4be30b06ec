"""What the session machine is told (events) and what it asks for (actions); plain frozen data.

Events carry only what decisions need; the daemon keeps the bytes (signed leases, records,
contributions) that belong to them.
"""

from dataclasses import dataclass
from enum import StrEnum

from peer.lease_holdings import GrantedLease, UsedRange
from protos.contract.telemetry import RoundOutcome, RoundPhase


class ChildName(StrEnum):
    """The two processes beside the daemon."""

    SWARM = "swarm"
    TRAINER = "trainer"


class DutyKind(StrEnum):
    """What a duty asks for."""

    EVALUATE = "evaluate"
    CHECKPOINT = "checkpoint"
    TRIAL = "trial"


# Events.


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinBegun:
    """The daemon is about to join."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """Membership is there, from the coordinator or (it being away) from the last time."""

    heartbeat_interval_seconds: float
    incarnation: int
    has_lost_leases: bool
    """True if this join ended an earlier session whose leases are gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinatorReachable:
    """A call succeeded, or failed for want of an answer."""

    is_reachable: bool
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetReady:
    """Manifest, tokenizer and held-out chunks are there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildReady:
    """A child has been configured and answers."""

    child: ChildName
    micro_batch_sequences: int = 0
    """Windows in one micro-batch of the trainer."""
    can_save_memory: bool = False
    """True if the trainer could still recompute activations instead of keeping them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildDied:
    """A child ended without having been asked to."""

    child: ChildName
    reason: str
    exit_code: int | None = None
    """Of the error that it named, if it named one (protos/contract/errors.py)."""
    is_out_of_memory: bool = False
    """True if it said so, or if the kernel ended it for that."""
    has_lost_device: bool = False
    """True if the trainer named devices that it lost; the next one is planned without them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StateReached:
    """The swarm process holds a state."""

    incarnation: int
    outer_step: int
    round_tokens: int
    is_paused: bool
    state_digest: bytes = b""
    coming_tokens: int = 0
    """Of a round by the newest directive, while one without this peer is in force."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseChanged:
    """What the swarm process is doing."""

    phase: RoundPhase
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundEnded:
    """The swarm process is done with a round."""

    outcome: RoundOutcome
    incarnation: int
    outer_step: int
    reason: str
    offer_number: int
    """Contribution that this is the verdict on; 0 for a round without one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeasesNeeded:
    """The trainer's feed runs low."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeasesGranted:
    """Answer to AcquireLeases; may grant nothing."""

    incarnation: int
    leases: tuple[GrantedLease, ...]
    reason: str
    is_budget_exhausted: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LeasesNotGranted:
    """The call failed."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseFetched:
    """The chunk of a lease is in the cache."""

    lease_number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseUnusable:
    """The chunk of a lease cannot be had."""

    lease_number: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LeasesReleasedByTrainer:
    """The trainer dropped work on these leases."""

    lease_numbers: tuple[int, ...]
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingProgressed:
    """A micro-batch is done."""

    contribution_tokens: int
    """Tokens in the contribution that is being made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerIdle:
    """The trainer has (no) windows to train."""

    is_idle: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ContributionReady:
    """The trainer put a contribution into shared memory."""

    offer_number: int
    """Counts this trainer's contributions, from 1."""
    incarnation: int
    outer_step: int
    ranges: tuple[UsedRange, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CertificatesAcknowledged:
    """The coordinator stores every certificate up to this step."""

    outer_step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HeartbeatAnswered:
    """What a heartbeat brought, apart from the bytes that the daemon passes on."""

    heartbeat_interval_seconds: float
    lost_lease_numbers: tuple[int, ...]
    is_run_over: bool
    run_reason: str
    """Run state and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeartbeatFailed:
    """A heartbeat got no answer."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionRefused:
    """The coordinator no longer knows the session key."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DutyOffered:
    """The coordinator wants something done."""

    duty_id: str
    fence: int
    kind: DutyKind
    min_outer_step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DutyEnded:
    """The daemon is done with a duty, well or not."""

    duty_id: str
    fence: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StopRequested:
    """The owner, the run or the machine wants this peer to end in good order."""

    reason: str
    exit_code: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """Everything is ended."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """Time passes. `jitter_ratio` is uniform in 0..1."""

    jitter_ratio: float


Event = (
    JoinBegun | Joined | CoordinatorReachable | DatasetReady | ChildReady | ChildDied
    | StateReached | PhaseChanged
    | RoundEnded | LeasesNeeded | LeasesGranted | LeasesNotGranted | LeaseFetched | LeaseUnusable
    | LeasesReleasedByTrainer | TrainingProgressed | TrainerIdle | ContributionReady
    | CertificatesAcknowledged
    | HeartbeatAnswered | HeartbeatFailed | SessionRefused | DutyOffered | DutyEnded
    | StopRequested | Left | Tick
)  # fmt: skip


# Actions.


@dataclass(frozen=True, slots=True, kw_only=True)
class SendHeartbeat:
    """Renew these leases, and the duty that is worked on."""

    lease_numbers: tuple[int, ...]
    duty_id: str = ""
    duty_fence: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class AcquireLeases:
    """Ask the coordinator."""

    incarnation: int
    wanted_tokens: int
    held_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseLeases:
    """Return to the coordinator."""

    lease_numbers: tuple[int, ...]
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchChunks:
    """Bring the chunks of these leases into the cache, in this order."""

    lease_numbers: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SendLeases:
    """Give the trainer these parts of leases."""

    parts: tuple[UsedRange, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TellLostLeases:
    """Tell the trainer that these no longer count."""

    lease_numbers: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TellNoMoreLeases:
    """Tell the trainer that nothing more is to be had for now."""

    is_exhausted: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TellStateReady:
    """Tell the trainer to load the state and train."""

    incarnation: int
    outer_step: int
    round_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TellRoundOutcome:
    """Tell the trainer how its contribution ended and which state holds now."""

    outcome: RoundOutcome
    incarnation: int
    outer_step: int
    round_tokens: int
    reason: str
    offer_number: int
    """Contribution that this is the verdict on; 0 if it is news of the state only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TellPause:
    """Tell the trainer to pause or to go on."""

    is_paused: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PassContribution:
    """Pass the trainer's contribution on to the swarm process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TellSwarmIdle:
    """Tell the swarm process whether this peer has work."""

    is_idle: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TellSwarmCoordinator:
    """Tell the swarm process whether the coordinator can be reached."""

    is_reachable: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Respawn:
    """Start a child again."""

    child: ChildName
    reason: str
    max_micro_batch_sequences: int | None = None
    """Bound on the trainer's micro-batch from now on; None leaves it as it is."""
    saves_memory: bool = False
    """True if the trainer has to recompute activations from now on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejoin:
    """Join again; the session has ended."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PerformDuty:
    """Do what the duty asks for."""

    duty_id: str
    fence: int
    kind: DutyKind


@dataclass(frozen=True, slots=True, kw_only=True)
class BeginDrain:
    """End in good order."""

    reason: str
    exit_code: int


Action = (
    SendHeartbeat | AcquireLeases | ReleaseLeases | FetchChunks | SendLeases | TellLostLeases
    | TellNoMoreLeases
    | TellStateReady | TellRoundOutcome | TellPause | PassContribution | TellSwarmIdle
    | TellSwarmCoordinator | Respawn
    | Rejoin | PerformDuty | BeginDrain
)  # fmt: skip
