"""What the operator and the readers (command line, page, metrics) ask: runs, tokens, status.

`run_id` "" means the only run there is, or the newest one. Instants are unix seconds; digests for
people are hex.
"""

from dataclasses import dataclass

from coordinator.operations.requests import Capabilities, Claims
from coordinator.scaling.live import LiveForecast

# Admin: runs.


@dataclass(frozen=True, slots=True, kw_only=True)
class CreateRunRequest:
    """`budget_tokens` of the spec is rounded down to whole windows."""

    run_id: str
    """Empty = derived from the spec's digest."""
    spec: bytes
    """RunSpec as JSON (RunSpec.to_wire; the budget need not be whole windows)."""
    dataset_dir: str
    manifest: bytes
    """Bytes of manifest.json in dataset_dir, read by the caller."""
    min_peers: int = 1
    """Peers that attest the initial state before the first step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CreateRunResponse:
    """The run as it was made."""

    run_id: str
    run_digest: str
    budget_tokens: int
    reason: str
    """How the budget was rounded, and how many passes over the data it takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRequest:
    """Pause, resume or stop a run; the reason goes into the log and to the peers."""

    run_id: str = ""
    reason: str = "asked by the operator"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """One line of `run list`, and the answer to pause, resume and stop."""

    run_id: str
    run_digest: str
    state: str
    state_reason: str
    incarnation: int
    outer_step: int
    credited_tokens: int
    budget_tokens: int
    num_live_peers: int
    create_unix_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ListRunsRequest:
    """All runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ListRunsResponse:
    """Newest first."""

    runs: tuple[RunSummary, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvictPeerRequest:
    """Ends a membership for good: the key may not join this run again."""

    peer_id: str
    """The id, or a beginning of it that fits one peer only."""
    run_id: str = ""
    reason: str = "evicted by the operator"


@dataclass(frozen=True, slots=True, kw_only=True)
class EvictPeerResponse:
    """Who was evicted."""

    peer_id: str
    num_released_leases: int


# Admin: tokens.


@dataclass(frozen=True, slots=True, kw_only=True)
class CreateTokenRequest:
    """max_uses counts new keys; 0 = any number. expire_after_seconds 0 = never."""

    run_id: str = ""
    max_uses: int = 0
    expire_after_seconds: float = 86_400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CreateTokenResponse:
    """The secret is shown once; the store keeps its digest. The join string carries
    `secret.hex()`.
    """

    run_id: str
    token_id: str
    secret: bytes
    max_uses: int
    expire_unix_seconds: int
    """0 = never."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ListTokensRequest:
    """Tokens of a run."""

    run_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSummary:
    """One line of `token list`."""

    token_id: str
    state: str
    """VALID, EXPIRED, EXHAUSTED or REVOKED."""
    num_uses: int
    max_uses: int
    create_unix_seconds: float
    expire_unix_seconds: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ListTokensResponse:
    """Newest first."""

    run_id: str
    tokens: tuple[TokenSummary, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RevokeTokenRequest:
    """Members that came by the token stay."""

    token_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RevokeTokenResponse:
    """was_revoked is False if it had been revoked before."""

    token_id: str
    was_revoked: bool


# Status.


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusRequest:
    """One run; cheap enough to ask every second."""

    run_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationPoint:
    """One accepted evaluation."""

    incarnation: int
    outer_step: int
    schedule_tokens: int
    loss_nats: float
    bits_per_byte: float
    """0 if the evaluator named no bytes."""
    peer_id: str
    unix_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ForecastStatus:
    """The newest forecast of the held-out loss at the end of the budget."""

    forecast: LiveForecast | None
    reason: str
    """How it was made, or why there is none."""
    outer_step: int
    """Of the evaluation after which it was made."""
    credited_tokens: int
    """When it was made."""
    budget_tokens: int
    """Then."""
    make_unix_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusResponse:
    """Everything that `status`, the page's head and summary.json need; digests are hex."""

    run_id: str
    run_digest: str
    dataset_id: str
    state: str
    state_reason: str
    coordinator_state: str
    """RECOVERING or SERVING (telemetry.CoordinatorState)."""
    coordinator_state_reason: str
    incarnation: int
    directive_number: int
    outer_step: int
    """Newest certified outer step that is not rolled back."""
    outer_steps_committed: int
    """Certificates stored, not rolled back."""
    outer_steps_rolled_back: int
    num_rollbacks: int
    schedule_tokens: int
    budget_tokens: int
    granted_tokens: int
    active_tokens: int
    released_tokens: int
    expired_tokens: int
    credited_tokens: int
    uncredited_trained_tokens: int
    rolled_back_tokens: int
    credited_tokens_by_peer: dict[str, int]
    name_by_peer: dict[str, str]
    num_peers_seen: int
    num_live_peers: int
    num_voters: int
    peers_by_state: dict[str, int]
    leases_by_state: dict[str, int]
    """Of the current incarnation; COMMITTED means wholly credited."""
    train_loss_nats: float
    """Of the newest certificate; 0 before the first."""
    first_evaluation: EvaluationPoint | None
    last_evaluation: EvaluationPoint | None
    goodput_tokens_per_second: float
    """Credited tokens over the last minute."""
    mean_goodput_tokens_per_second: float
    """Credited tokens over the time from the first step to the last."""
    train_seconds: float
    """From the start of the first incarnation with a roster until now or the last certified step.
    """
    eta_seconds: float
    """Until the budget is credited at the present goodput; 0 if over, negative if it cannot be
    told.
    """
    state_digests_equal: bool
    """No two attestations, nor an attestation and a certificate, name different digests for one
    (incarnation, outer_step).
    """
    num_attestations: int
    num_open_duties: int
    num_checkpoints: int
    newest_checkpoint_path: str
    create_unix_seconds: float
    start_unix_seconds: float
    finish_unix_seconds: float
    heartbeat_interval_seconds: float
    now_unix_seconds: float
    has_final_evaluation: bool
    has_final_checkpoint: bool
    forecast: ForecastStatus
    equivocation_reason: str = ""
    reach_warning: str = ""
    """What is wrong if of several live peers none can be dialled; "" otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeersRequest:
    """Peers of a run."""

    run_id: str = ""
    is_live_only: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerStatus:
    """One line of `peers`. `claims` is what the peer says, everything else is what the coordinator
    knows.
    """

    peer_id: str
    p2p_peer_id: str
    name: str
    state: str
    """telemetry.PeerState."""
    state_reason: str
    is_live: bool
    has_vote: bool
    """Under the newest directive."""
    round_tokens: int
    """Budget per round under the newest directive."""
    claims: Claims
    capabilities: Capabilities
    attested_incarnation: int
    attested_outer_step: int
    credited_tokens: int
    uncredited_tokens: int
    rolled_back_tokens: int
    active_leases: int
    last_heartbeat_unix_seconds: float
    join_unix_seconds: float
    first_join_unix_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PeersResponse:
    """Live ones first, then by name."""

    run_id: str
    peers: tuple[PeerStatus, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolRequest:
    """The live peers of a run as a pool to plan with."""

    run_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class EventsRequest:
    """Events after an id, oldest first; with after_event_id = -1 the newest `max_events`, oldest
    first.
    """

    run_id: str = ""
    after_event_id: int = -1
    max_events: int = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class EventStatus:
    """One line of the event log."""

    event_id: int
    unix_seconds: float
    kind: str
    peer_id: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EventsResponse:
    """See EventsRequest."""

    run_id: str
    events: tuple[EventStatus, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SeriesRequest:
    """Curves for the page; decimated evenly to at most max_points, the first and the last kept."""

    run_id: str = ""
    max_points: int = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPoint:
    """One certified outer step of the chain in force."""

    incarnation: int
    outer_step: int
    unix_seconds: float
    schedule_tokens: int
    credited_tokens: int
    """Credited by this and all earlier steps of the chain."""
    step_tokens: int
    """Trained tokens of this step."""
    loss_nats: float
    num_members: int
    num_contributors: int
    attempt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ForecastPoint:
    """One published forecast, as it was."""

    credited_tokens: int
    """When it was made."""
    unix_seconds: float
    final_tokens: float
    loss_nats: float
    low_nats: float
    high_nats: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SeriesResponse:
    """See SeriesRequest."""

    run_id: str
    steps: tuple[StepPoint, ...]
    evaluations: tuple[EvaluationPoint, ...] = ()
    forecasts: tuple[ForecastPoint, ...] = ()
