"""What peers and the ticker ask and what they are told: plain frozen dataclasses, free of protobuf
services and of SQL.

Servicers, the command line, the page and the ticker speak in these; `requests_admin.py` has the
operator's and the readers', `catalogue.py` lists every operation. Two conventions: bytes that were
signed travel as protobuf `Signed` (the exact bytes), and certificates travel serialised. Instants
are unix seconds.
"""

from dataclasses import dataclass

from protos.muster.v1 import common_pb2

# Membership.


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a peer says of its machine; membership.proto's PeerCapabilities, and what
    the coordinator found out.
    """

    package_version: str = ""
    torch_version: str = ""
    tokens_per_second: float = 0.0
    """0 if not measured yet."""
    memory_bytes: int = 0
    can_accept_connections: bool = True
    addresses: tuple[str, ...] = ()
    codecs: tuple[str, ...] = ()
    strategies: tuple[str, ...] = ()
    objectives: tuple[str, ...] = ()
    reach_problem: str = ""
    """Not the peer's word: why the coordinator could not dial it; "" if it could, or did not try.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class Claims:
    """Numbers that a peer claims about itself; field for field membership.proto's PeerClaims."""

    state: str = ""
    state_reason: str = ""
    outer_step: int = 0
    loss_nats: float = 0.0
    tokens_per_second: float = 0.0
    sent_bytes: int = 0
    received_bytes: int = 0
    num_rounds_committed: int = 0
    num_attempts_discarded: int = 0
    round_seconds: float = 0.0
    clock_offset_seconds: float = 0.0
    memory_bytes: int = 0
    trained_tokens: int = 0
    upload_bytes_per_second: float = 0.0
    download_bytes_per_second: float = 0.0
    form_seconds: float = 0.0
    exchange_seconds: float = 0.0
    reduce_seconds: float = 0.0
    agree_seconds: float = 0.0
    apply_seconds: float = 0.0
    averaging_bytes_per_second: float = 0.0
    discard_reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinRequest:
    """The caller has issued `nonce` itself less than a minute ago and has taken it off its list:
    one Join per nonce.
    """

    run_id: str
    token_secret: bytes
    """May be empty for a key that has joined this run before."""
    nonce: bytes
    public_key: bytes
    signature: bytes
    """Ed25519 over (Tag.JOIN, join_payload of protos/contract/certificate.py)."""
    p2p_public_key: bytes
    p2p_signature: bytes
    name: str
    protocol_version: int
    capabilities: Capabilities


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinResponse:
    """See membership.proto."""

    peer_id: str
    session_key: bytes
    session_expire_unix_seconds: float
    run_spec: bytes
    coordinator_public_key: bytes
    dht_prefix: str
    initial_peers: tuple[str, ...]
    """Of live peers; the caller puts its rendezvous in front."""
    incarnation_record: common_pb2.Signed
    directive: common_pb2.Signed
    outer_step: int
    dataset_id: bytes
    heartbeat_interval_seconds: float
    now_unix_seconds: float
    next_lease_number: int
    is_new_member: bool
    num_released_leases: int
    """Leases of an earlier process of the same key, returned by this join."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FindSessionRequest:
    """The interceptor asks once per peer and keeps the answer until a Join of that peer or its
    end.
    """

    peer_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FindSessionResponse:
    """Raises RefusedError (SESSION_INVALID, PEER_EVICTED) instead when there is no live session."""

    run_id: str
    session_key: bytes
    session_expire_unix_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class HeartbeatRequest:
    """See membership.proto; run_id and peer_id are those of the session."""

    run_id: str
    peer_id: str
    claims: Claims
    attestations: tuple[common_pb2.Signed, ...] = ()
    lease_numbers: tuple[int, ...] = ()
    directive_number: int = 0
    incarnation: int = 0
    addresses: tuple[str, ...] = ()
    has_lost_state: bool = False
    duty_id: str = ""
    duty_fence: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DutyOrder:
    """A duty as handed to a peer."""

    duty_id: str
    kind: str
    """DutyKind of coordinator/domain/duties.py."""
    fence: int
    eval_tokens: int
    min_outer_step: int
    trial_spec: bytes = b""
    """RunSpec.to_wire of a trial."""
    mark_tokens: tuple[int, ...] = ()
    """Where a trial is evaluated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeartbeatResponse:
    """See membership.proto."""

    directive: common_pb2.Signed | None
    incarnation_record: common_pb2.Signed | None
    certificates: tuple[bytes, ...]
    """Serialised Certificates, in order."""
    lost_lease_numbers: tuple[int, ...]
    duty: DutyOrder | None
    heartbeat_interval_seconds: float
    now_unix_seconds: float
    is_run_over: bool
    run_state: str
    run_state_reason: str
    initial_peers: tuple[str, ...]
    outer_step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaveRequest:
    """See membership.proto."""

    run_id: str
    peer_id: str
    reason: str
    attestations: tuple[common_pb2.Signed, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaveResponse:
    """Leases returned."""

    num_released_leases: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerExitedRequest:
    """Sent by `up` when a child process of its own has ended: the peer is LOST at once, without
    waiting for the TTL.
    """

    peer_id: str
    reason: str
    run_id: str = ""


# Duties.


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationResult:
    """duties.proto's Evaluation."""

    incarnation: int
    outer_step: int
    state_digest: bytes
    total_nats: float
    num_tokens: int
    num_bytes: int
    schedule_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialPointResult:
    """duties.proto's TrialPoint."""

    tokens: int
    total_nats: float
    num_tokens: int
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialResult:
    """duties.proto's TrialResult."""

    run_digest: str
    seed: int
    convention: str
    params_n: int
    flop_per_token: float
    points: tuple[TrialPointResult, ...]
    params_digest: bytes
    train_seconds: float
    divergence: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportDutyRequest:
    """See duties.proto; `failure_reason` "" means done."""

    run_id: str
    peer_id: str
    duty_id: str
    fence: int
    failure_reason: str = ""
    evaluation: EvaluationResult | None = None
    trial: TrialResult | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportDutyResponse:
    """is_accepted False is an answer, not an error: the reason says what would have been
    accepted.
    """

    is_accepted: bool
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BeginUploadRequest:
    """Asked before the first byte is received."""

    run_id: str
    peer_id: str
    duty_id: str
    fence: int
    attestation: common_pb2.Signed
    total_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BeginUploadResponse:
    """If accepted: receive into a temporary file, verify the digest with safetensors, rename to
    `path`, FinishUpload.
    """

    is_accepted: bool
    reason: str
    path: str = ""
    """Relative to the data directory."""
    incarnation: int = 0
    outer_step: int = 0
    state_digest: bytes = b""
    """What protos.contract.digest.state_digest of the file must give."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishUploadRequest:
    """The file lies at `path`, complete, fsynced, its digest verified by the caller."""

    run_id: str
    peer_id: str
    duty_id: str
    fence: int
    incarnation: int
    outer_step: int
    state_digest: bytes
    path: str
    total_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishUploadResponse:
    """Files that the caller removes after the commit: superseded checkpoints, or the upload itself
    if refused.
    """

    is_accepted: bool
    reason: str
    remove_paths: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class FindCheckpointRequest:
    """Newest stored checkpoint of the chain that is in force."""

    run_id: str = ""
    max_outer_step: int = 0
    """0 = any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointInfo:
    """Where a checkpoint lies; path is relative to the data directory."""

    incarnation: int
    outer_step: int
    state_digest: bytes
    path: str
    total_bytes: int
    peer_id: str
    store_unix_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FindCheckpointResponse:
    """checkpoint is None if there is none; the reason says so."""

    checkpoint: CheckpointInfo | None
    reason: str


# Tick.


@dataclass(frozen=True, slots=True, kw_only=True)
class TickRequest:
    """Sent about once a second; all runs that are not over are looked at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TickResponse:
    """What changed, one sentence each, for the log; empty if nothing did."""

    changes: tuple[str, ...] = ()
    is_recovering: bool = False
