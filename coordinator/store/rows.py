"""Rows of runs and of the ledger: one frozen dataclass per table, one field per column, in the
schema's order.

Instants are unix milliseconds, ranges are half-open windows in the chunk's permuted order. 0 stands
for "not yet" in instants and for "never" in `rolled_back_by` (an incarnation that rolls something
back is at least 1).
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RunRow:
    """One run: its immutable spec and where it stands."""

    run_id: str
    run_digest: str
    spec: bytes
    dataset_id: str
    dataset_dir: str
    dht_prefix: str
    state: str
    state_reason: str
    min_peers: int
    incarnation: int
    directive_number: int
    """Newest directive issued."""
    create_unix_ms: int
    start_unix_ms: int
    finish_unix_ms: int


@dataclass(frozen=True, slots=True)
class IncarnationRow:
    """A signed IncarnationRecord and the fields that are looked up."""

    run_id: str
    incarnation: int
    to_outer_step: int
    base_incarnation: int
    base_state_digest: bytes
    payload: bytes
    signature: bytes
    decide_unix_ms: int


@dataclass(frozen=True, slots=True)
class DirectiveRow:
    """A signed Directive."""

    run_id: str
    directive_number: int
    incarnation: int
    payload: bytes
    signature: bytes
    issue_unix_ms: int


@dataclass(frozen=True, slots=True)
class EventRow:
    """One line of the event log, for people."""

    event_id: int
    run_id: str
    unix_ms: int
    kind: str
    peer_id: str
    text: str


@dataclass(frozen=True, slots=True)
class RequestRow:
    """The answer that was given to a request id, kept to be given again."""

    caller: str
    request_id: str
    method: str
    request_digest: bytes
    response: bytes
    store_unix_ms: int


@dataclass(frozen=True, slots=True)
class BookRow:
    """Totals of one run's ledger. granted = active + released + expired + credited, always."""

    run_id: str
    seq_len: int
    budget_tokens: int
    frontier_position: int
    frontier_window: int
    granted_tokens: int
    """Tokens of all windows before the frontier, each counted once."""
    active_tokens: int
    """Under an active lease and not credited."""
    released_tokens: int
    expired_tokens: int
    credited_tokens: int
    uncredited_tokens: int
    """Trained in committed rounds but not creditable; each (range, certificate) once."""
    rolled_back_tokens: int
    schedule_tokens: int
    """Of the newest certified state, as its members count it."""
    certified_outer_step: int
    """Newest outer step whose certificate is stored and not rolled back."""


@dataclass(frozen=True, slots=True)
class PeerTotalRow:
    """Totals of one peer in one run."""

    run_id: str
    peer_id: str
    credited_tokens: int
    uncredited_tokens: int
    rolled_back_tokens: int


@dataclass(frozen=True, slots=True)
class LeaseRow:
    """One lease. A partly credited lease stays ACTIVE; `credited_windows` says how much is done."""

    run_id: str
    incarnation: int
    peer_id: str
    lease_number: int
    fence: int
    schedule_position: int
    data_pass: int
    chunk_index: int
    begin_window: int
    end_window: int
    state: str
    credited_windows: int
    grant_unix_ms: int
    expire_unix_ms: int
    end_reason: str


@dataclass(frozen=True, slots=True)
class ReturnedRow:
    """Windows that were leased before and may be leased again; `fence` is the newest one they were
    under.
    """

    run_id: str
    schedule_position: int
    begin_window: int
    end_window: int
    data_pass: int
    chunk_index: int
    fence: int
    cause: str
    """RELEASED (also after a rollback) or EXPIRED."""


@dataclass(frozen=True, slots=True)
class JournalRow:
    """One fact of the ledger in the order in which it happened; never changed, never deleted."""

    journal_number: int
    run_id: str
    unix_ms: int
    kind: str
    """OPEN, GRANT, RELEASE, EXPIRE, CERTIFICATE, ROLLBACK."""
    incarnation: int
    outer_step: int
    peer_id: str
    lease_number: int
    fence: int
    data_pass: int
    chunk_index: int
    begin_window: int
    end_window: int
    reason: str


@dataclass(frozen=True, slots=True)
class CertificateRow:
    """A stored certificate and what it did to the ledger."""

    run_id: str
    incarnation: int
    outer_step: int
    attempt: int
    next_directive_number: int
    num_members: int
    num_contributors: int
    trained_tokens: int
    credited_tokens: int
    uncredited_tokens: int
    schedule_tokens: int
    """After this outer step."""
    loss_nats: float
    """Token-weighted mean of the members' claims; 0 if nobody trained."""
    store_unix_ms: int
    rolled_back_by: int
    value: bytes
    """Serialised RoundValue; like the certificate at the end, so that the numbers before can be
    read without it.
    """
    certificate: bytes


@dataclass(frozen=True, slots=True)
class CreditRow:
    """Windows credited by one certificate."""

    run_id: str
    incarnation: int
    outer_step: int
    peer_id: str
    lease_number: int
    schedule_position: int
    data_pass: int
    chunk_index: int
    begin_window: int
    end_window: int
    rolled_back_by: int


@dataclass(frozen=True, slots=True)
class UncreditedRow:
    """Windows that a certificate lists but that could not be credited, and why."""

    uncredited_id: int
    run_id: str
    incarnation: int
    outer_step: int
    peer_id: str
    lease_number: int
    data_pass: int
    chunk_index: int
    begin_window: int
    end_window: int
    reason: str


@dataclass(frozen=True, slots=True)
class AcceptorRow:
    """The coordinator's promise and vote for one outer step; vote_attempt is -1 before a vote."""

    run_id: str
    incarnation: int
    outer_step: int
    promised_attempt: int
    vote_attempt: int
    vote_value: bytes
    equivocation_reason: str
