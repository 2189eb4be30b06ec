"""Names that people and machines see on both sides: states, metrics, log fields.

A metric is declared once, here, as a `Metric`; `peer/metrics.py` and `coordinator/metrics.py` build
their registries from `PEER_METRICS` and `COORDINATOR_METRICS` and nothing else. Names carry the
side (`muster_peer_`, `muster_coordinator_`), units are base units (seconds, bytes, tokens, nats,
ratio 0..1), counters end in `_total`. No label may have more values than `MAX_LABELLED_PEERS`;
counters of the coordinator carry no peer label at all.
"""

from dataclasses import dataclass
from enum import StrEnum


class SessionState(StrEnum):
    """What a peer is doing, as its daemon says; always shown with a reason."""

    IDLE = "IDLE"
    JOINING = "JOINING"
    SYNCING = "SYNCING"
    TRAINING = "TRAINING"
    AVERAGING = "AVERAGING"
    ON_DUTY = "ON_DUTY"
    WAITING = "WAITING"
    DRAINING = "DRAINING"
    LEFT = "LEFT"


class PeerState(StrEnum):
    """What a member is to the coordinator: known, attested, voting, or gone in three ways."""

    JOINED = "JOINED"
    SYNCED = "SYNCED"
    VOTER = "VOTER"
    LOST = "LOST"
    LEFT = "LEFT"
    EVICTED = "EVICTED"


class RunState(StrEnum):
    """State of a run; FINISHED and STOPPED are final."""

    WAITING_FOR_PEERS = "WAITING_FOR_PEERS"
    RUNNING = "RUNNING"
    PAUSED = "PAUSED"
    STALLED = "STALLED"
    FINISHED = "FINISHED"
    STOPPED = "STOPPED"


class CoordinatorState(StrEnum):
    """RECOVERING for a while after a start: nothing expires and nothing is granted again."""

    RECOVERING = "RECOVERING"
    SERVING = "SERVING"
    STOPPED = "STOPPED"
    """No process serves the data directory; only who reads the store directly can see this."""


class LeaseState(StrEnum):
    """ACTIVE, and the three ends of a lease."""

    ACTIVE = "ACTIVE"
    COMMITTED = "COMMITTED"
    RELEASED = "RELEASED"
    EXPIRED = "EXPIRED"


class RoundPhase(StrEnum):
    """Phase of the swarm process: a round's five, and what it does between rounds."""

    IDLE = "IDLE"
    FORM = "FORM"
    EXCHANGE = "EXCHANGE"
    REDUCE = "REDUCE"
    AGREE = "AGREE"
    APPLY = "APPLY"
    SYNC = "SYNC"
    NO_QUORUM = "NO_QUORUM"


ATTEMPT_PHASES = (
    RoundPhase.FORM,
    RoundPhase.EXCHANGE,
    RoundPhase.REDUCE,
    RoundPhase.AGREE,
    RoundPhase.APPLY,
)
"""Phases of an attempt, in order."""


class RoundOutcome(StrEnum):
    """How a contribution ended."""

    COMMITTED = "COMMITTED"
    RESYNC = "RESYNC"


class AttemptOutcome(StrEnum):
    """How one attempt ended; a discarded attempt changed nothing."""

    COMMITTED = "committed"
    DISCARDED = "discarded"
    SUPERSEDED = "superseded"


class MetricKind(StrEnum):
    """Prometheus types in use."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


MAX_LABELLED_PEERS = 256
"""Peers beyond this number appear in sums only."""

LATENCY_BUCKETS_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0)
"""Remote calls: a durable write is a few milliseconds, a deadline some seconds."""

ROUND_BUCKETS_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
"""Phases of a round: from loopback to a slow uplink."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One metric: everything that a registry needs to create it."""

    name: str
    help_text: str
    kind: MetricKind
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    """Histograms only: upper bounds."""


def _counter(name: str, help_text: str, *labels: str) -> Metric:
    return Metric(name=name, help_text=help_text, kind=MetricKind.COUNTER, labels=labels)


def _gauge(name: str, help_text: str, *labels: str) -> Metric:
    return Metric(name=name, help_text=help_text, kind=MetricKind.GAUGE, labels=labels)


def _histogram(name: str, help_text: str, buckets: tuple[float, ...], *labels: str) -> Metric:
    return Metric(
        name=name, help_text=help_text, kind=MetricKind.HISTOGRAM, labels=labels, buckets=buckets
    )


PEER_LOSS_NATS = _gauge(
    "muster_peer_loss_nats", "Mean training loss of the last micro-batches, nats per token."
)
PEER_TRAINED_TOKENS = _counter(
    "muster_peer_trained_tokens_total", "Tokens trained locally, credited or not."
)
PEER_BAD_BATCHES = _counter(
    "muster_peer_bad_batches_total",
    "Micro-batches skipped because loss or gradient was not finite.",
)
PEER_COMMITTED_TOKENS = _counter(
    "muster_peer_committed_tokens_total", "Tokens of this peer in rounds that committed."
)
PEER_TOKENS_PER_SECOND = _gauge("muster_peer_tokens_per_second", "Local training speed.")
PEER_OUTER_STEP = _gauge("muster_peer_outer_step", "Committed outer steps in this peer's state.")
PEER_INCARNATION = _gauge("muster_peer_incarnation", "Incarnation that this peer is in.")
PEER_ROUND_PHASE_SECONDS = _histogram(
    "muster_peer_round_phase_seconds",
    "Duration of a round's phases.",
    ROUND_BUCKETS_SECONDS,
    "phase",
)
PEER_ROUND_PEERS = _gauge("muster_peer_round_peers", "Members of the last round's group.")
PEER_ATTEMPTS = _counter(
    "muster_peer_attempts_total", "Attempts at outer steps by outcome.", "outcome"
)
PEER_ROUND_WIRE_BYTES = _counter(
    "muster_peer_round_wire_bytes_total", "Bytes moved for rounds, by direction.", "direction"
)
PEER_DISCARDED_SECONDS = _counter(
    "muster_peer_discarded_attempt_seconds_total", "Time spent in attempts that were discarded."
)
PEER_AVERAGING_BYTES_PER_SECOND = _gauge(
    "muster_peer_averaging_bytes_per_second",
    "Bytes in and out per second of exchange and reduce in the last committed attempt.",
)
PEER_LINK_BYTES = _gauge(
    "muster_peer_link_bytes",
    "Bytes of rounds since the start, by the member at the other end.",
    "peer",
    "direction",
)
PEER_LINK_LANES = _gauge(
    "muster_peer_link_lanes",
    "Connections beside libp2p's for parts to another member; 0: its one stream.",
    "peer",
)
PEER_LINK_RTT_SECONDS = _gauge(
    "muster_peer_link_rtt_seconds", "Quickest call to another member so far.", "peer"
)
PEER_LINK_BYTES_PER_SECOND = _gauge(
    "muster_peer_link_bytes_per_second",
    "Bytes exchanged with another member per second of averaging, last committed attempt.",
    "peer",
    "direction",
)
PEER_HELD_LEASES = _gauge("muster_peer_held_leases", "Leases held and not yet put into a round.")
PEER_HELD_TOKENS = _gauge("muster_peer_held_tokens", "Tokens of those leases.")
PEER_FETCHED_BYTES = _counter(
    "muster_peer_fetched_bytes_total", "Dataset bytes by origin.", "origin"
)
PEER_STATE = _gauge(
    "muster_peer_session_state", "1 for the session's state, 0 for the others.", "state"
)
PEER_DUTIES = _counter("muster_peer_duties_total", "Duties by kind and outcome.", "kind", "outcome")
PEER_RPC_SECONDS = _histogram(
    "muster_peer_rpc_seconds",
    "Calls to the coordinator.",
    LATENCY_BUCKETS_SECONDS,
    "method",
    "status",
)
PEER_CLOCK_OFFSET_SECONDS = _gauge(
    "muster_peer_clock_offset_seconds", "This machine's clock minus the coordinator's."
)
PEER_CHILD_RESTARTS = _counter(
    "muster_peer_child_restarts_total", "Restarts of the swarm and trainer processes.", "process"
)
PEER_MEMORY_BYTES = _gauge("muster_peer_memory_bytes", "Resident memory of the peer's processes.")
PEER_INFO = _gauge(
    "muster_peer_info", "Always 1; versions as labels.", "version", "torch_version", "device"
)

PEER_LAYER_ACTIVATION = _gauge(
    "muster_peer_layer_activation",
    "What a layer put out in the last probed micro-batch: rms, max.",
    "layer",
    "statistic",
)
PEER_LAYER_GRADIENT = _gauge(
    "muster_peer_layer_gradient",
    "Gradient per token of a layer's parameters in the last probed micro-batch: rms, max.",
    "layer",
    "statistic",
)

PEER_METRICS: tuple[Metric, ...] = (
    PEER_LAYER_ACTIVATION,
    PEER_LAYER_GRADIENT,
    PEER_LOSS_NATS,
    PEER_TRAINED_TOKENS,
    PEER_BAD_BATCHES,
    PEER_COMMITTED_TOKENS,
    PEER_TOKENS_PER_SECOND,
    PEER_OUTER_STEP,
    PEER_INCARNATION,
    PEER_ROUND_PHASE_SECONDS,
    PEER_ROUND_PEERS,
    PEER_ATTEMPTS,
    PEER_ROUND_WIRE_BYTES,
    PEER_DISCARDED_SECONDS,
    PEER_AVERAGING_BYTES_PER_SECOND,
    PEER_LINK_BYTES,
    PEER_LINK_LANES,
    PEER_LINK_RTT_SECONDS,
    PEER_LINK_BYTES_PER_SECOND,
    PEER_HELD_LEASES,
    PEER_HELD_TOKENS,
    PEER_FETCHED_BYTES,
    PEER_STATE,
    PEER_DUTIES,
    PEER_RPC_SECONDS,
    PEER_CLOCK_OFFSET_SECONDS,
    PEER_CHILD_RESTARTS,
    PEER_MEMORY_BYTES,
    PEER_INFO,
)
"""Everything that a peer exposes."""

COORDINATOR_LOSS_NATS = _gauge(
    "muster_coordinator_loss_nats", "Mean training loss that live peers claim, weighted by speed."
)
COORDINATOR_HELDOUT_LOSS_NATS = _gauge(
    "muster_coordinator_heldout_loss_nats",
    "Loss of the newest accepted evaluation, nats per token.",
)
COORDINATOR_HELDOUT_BITS_PER_BYTE = _gauge(
    "muster_coordinator_heldout_bits_per_byte", "The same in bits per byte of text."
)
COORDINATOR_BUDGET_TOKENS = _gauge("muster_coordinator_budget_tokens", "Token budget of the run.")
COORDINATOR_CREDITED_TOKENS = _gauge(
    "muster_coordinator_credited_tokens", "Tokens credited in the ledger; falls at a rollback."
)
COORDINATOR_LEASED_TOKENS = _gauge(
    "muster_coordinator_leased_tokens", "Tokens under active or expired leases."
)
COORDINATOR_UNCREDITED_TOKENS = _gauge(
    "muster_coordinator_uncredited_trained_tokens",
    "Trained tokens that could not be credited, by reason.",
    "reason",
)
COORDINATOR_ROLLED_BACK_TOKENS = _gauge(
    "muster_coordinator_rolled_back_tokens", "Tokens credited once and then rolled back."
)
COORDINATOR_GOODPUT = _gauge(
    "muster_coordinator_goodput_tokens_per_second",
    "Credited tokens per second over the last minute.",
)
COORDINATOR_OUTER_STEP = _gauge("muster_coordinator_outer_step", "Newest certified outer step.")
COORDINATOR_INCARNATION = _gauge("muster_coordinator_incarnation", "Current incarnation.")
COORDINATOR_DIRECTIVE_NUMBER = _gauge(
    "muster_coordinator_directive_number", "Newest directive issued."
)
COORDINATOR_ROUND_SECONDS = _histogram(
    "muster_coordinator_round_interval_seconds",
    "Time between certified outer steps.",
    ROUND_BUCKETS_SECONDS,
)
COORDINATOR_LEASES = _gauge(
    "muster_coordinator_leases", "Leases of the incarnation by state.", "state"
)
COORDINATOR_LEASE_EVENTS = _counter(
    "muster_coordinator_lease_events_total", "Grants and ends of leases.", "event"
)
COORDINATOR_PEERS = _gauge("muster_coordinator_peers", "Members by state.", "state")
COORDINATOR_PEER_TOKENS_PER_SECOND = _gauge(
    "muster_coordinator_peer_claimed_tokens_per_second",
    "Speed that a live peer claims.",
    "peer",
    "name",
)
COORDINATOR_PEER_CREDITED_TOKENS = _gauge(
    "muster_coordinator_peer_credited_tokens", "Tokens credited to a peer.", "peer", "name"
)
COORDINATOR_PEER_LOSS_NATS = _gauge(
    "muster_coordinator_peer_claimed_loss_nats",
    "Training loss that a live peer claims.",
    "peer",
    "name",
)
COORDINATOR_FORECAST_LOSS_NATS = _gauge(
    "muster_coordinator_forecast_loss_nats",
    "Forecast of the held-out loss at the end of the budget; low and high are its 90 % band.",
    "bound",
)
COORDINATOR_FORECAST_BEST_PARAMETERS = _gauge(
    "muster_coordinator_forecast_best_parameters",
    "Number of parameters that would use the run's whole compute best.",
)
COORDINATOR_FORECAST_EFFICIENCY = _gauge(
    "muster_coordinator_forecast_efficiency_ratio",
    "Share of the run's compute that its number of parameters makes use of.",
)
COORDINATOR_RESTART_ADVISED = _gauge(
    "muster_coordinator_restart_advised",
    "1 if starting again with the best number of parameters would win; the status says why.",
)
COORDINATOR_COOLDOWN_DUE = _gauge(
    "muster_coordinator_cooldown_due",
    "1 if the remaining compute is so little of the spent that the cooldown is due.",
)
COORDINATOR_ETA_SECONDS = _gauge(
    "muster_coordinator_eta_seconds",
    "Until the budget is credited at the present pool; negative if it cannot be told.",
)
COORDINATOR_PEER_AVERAGING_BYTES_PER_SECOND = _gauge(
    "muster_coordinator_peer_claimed_averaging_bytes_per_second",
    "Bytes in and out per second of averaging that a live peer claims for its last round.",
    "peer",
    "name",
)
COORDINATOR_PEER_ROUND_SECONDS = _gauge(
    "muster_coordinator_peer_claimed_round_phase_seconds",
    "Longest phase of a last round that any live peer claims, by phase.",
    "phase",
)
COORDINATOR_RUN_STATE = _gauge(
    "muster_coordinator_run_state", "1 for the run's state, 0 for the others.", "state"
)
COORDINATOR_STATE = _gauge(
    "muster_coordinator_state", "1 for the coordinator's state, 0 for the others.", "state"
)
COORDINATOR_EVENTS = _counter("muster_coordinator_events_total", "Recorded events by kind.", "kind")
COORDINATOR_RPC_SECONDS = _histogram(
    "muster_coordinator_rpc_seconds", "Calls served.", LATENCY_BUCKETS_SECONDS, "method", "status"
)
COORDINATOR_STORE_SECONDS = _histogram(
    "muster_coordinator_store_commit_seconds", "Durable group commits.", LATENCY_BUCKETS_SECONDS
)
COORDINATOR_SENT_BYTES = _counter(
    "muster_coordinator_sent_bytes_total", "Streamed bytes by what they were.", "kind"
)
COORDINATOR_INFO = _gauge(
    "muster_coordinator_info", "Always 1; versions as labels.", "version", "run_id", "run_digest"
)

COORDINATOR_METRICS: tuple[Metric, ...] = (
    COORDINATOR_LOSS_NATS,
    COORDINATOR_HELDOUT_LOSS_NATS,
    COORDINATOR_HELDOUT_BITS_PER_BYTE,
    COORDINATOR_BUDGET_TOKENS,
    COORDINATOR_CREDITED_TOKENS,
    COORDINATOR_LEASED_TOKENS,
    COORDINATOR_UNCREDITED_TOKENS,
    COORDINATOR_ROLLED_BACK_TOKENS,
    COORDINATOR_GOODPUT,
    COORDINATOR_OUTER_STEP,
    COORDINATOR_INCARNATION,
    COORDINATOR_DIRECTIVE_NUMBER,
    COORDINATOR_ROUND_SECONDS,
    COORDINATOR_LEASES,
    COORDINATOR_LEASE_EVENTS,
    COORDINATOR_PEERS,
    COORDINATOR_PEER_TOKENS_PER_SECOND,
    COORDINATOR_PEER_CREDITED_TOKENS,
    COORDINATOR_PEER_LOSS_NATS,
    COORDINATOR_FORECAST_LOSS_NATS,
    COORDINATOR_FORECAST_BEST_PARAMETERS,
    COORDINATOR_FORECAST_EFFICIENCY,
    COORDINATOR_RESTART_ADVISED,
    COORDINATOR_COOLDOWN_DUE,
    COORDINATOR_ETA_SECONDS,
    COORDINATOR_PEER_AVERAGING_BYTES_PER_SECOND,
    COORDINATOR_PEER_ROUND_SECONDS,
    COORDINATOR_RUN_STATE,
    COORDINATOR_STATE,
    COORDINATOR_EVENTS,
    COORDINATOR_RPC_SECONDS,
    COORDINATOR_STORE_SECONDS,
    COORDINATOR_SENT_BYTES,
    COORDINATOR_INFO,
)
"""Everything that a coordinator exposes."""


class LogField(StrEnum):
    """Names of `field=value` pairs in log lines; every line of a run carries RUN and PEER."""

    RUN = "run"
    PEER = "peer"
    PROCESS = "process"
    EVENT = "event"
    REASON = "reason"
    STATE = "state"
    INCARNATION = "incarnation"
    OUTER_STEP = "outer_step"
    ATTEMPT = "attempt"
    PHASE = "phase"
    LEASE = "lease"
    FENCE = "fence"
    RANGE = "range"
    DIRECTIVE = "directive"
    DUTY = "duty"
    TOKENS = "tokens"
    LOSS_NATS = "loss_nats"
    SECONDS = "seconds"
    BYTES = "bytes"
    DIGEST = "digest"
