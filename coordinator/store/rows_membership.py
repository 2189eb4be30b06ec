"""Rows of membership and duties: one frozen dataclass per table, one field per column, in the
schema's order.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TokenRow:
    """A join token; only the digest of its secret is kept."""

    token_id: str
    run_id: str
    secret_digest: bytes
    max_uses: int
    num_uses: int
    create_unix_ms: int
    expire_unix_ms: int
    is_revoked: bool


@dataclass(frozen=True, slots=True)
class PeerRow:
    """One peer of one run."""

    run_id: str
    peer_id: str
    p2p_peer_id: str
    public_key: bytes
    name: str
    state: str
    state_reason: str
    first_join_unix_ms: int
    join_unix_ms: int
    last_heartbeat_unix_ms: int
    session_key: bytes
    session_expire_unix_ms: int
    capabilities_json: str
    claims_json: str
    attested_incarnation: int
    attested_outer_step: int
    attested_digest: bytes
    has_vote: bool


@dataclass(frozen=True, slots=True)
class AttestationRow:
    """A signed Attestation as it came in."""

    run_id: str
    incarnation: int
    outer_step: int
    peer_id: str
    state_digest: bytes
    payload: bytes
    signature: bytes
    receive_unix_ms: int


@dataclass(frozen=True, slots=True)
class DutyRow:
    """One duty and whose it is."""

    duty_id: str
    run_id: str
    kind: str
    state: str
    peer_id: str
    fence: int
    eval_tokens: int
    min_outer_step: int
    create_unix_ms: int
    assign_unix_ms: int
    finish_unix_ms: int
    reason: str
    renew_unix_ms: int = 0


@dataclass(frozen=True, slots=True)
class EvaluationRow:
    """An accepted evaluation."""

    run_id: str
    incarnation: int
    outer_step: int
    duty_id: str
    peer_id: str
    state_digest: bytes
    total_nats: float
    num_tokens: int
    num_bytes: int
    schedule_tokens: int
    receive_unix_ms: int


@dataclass(frozen=True, slots=True)
class CheckpointRow:
    """A stored checkpoint file; `path` is relative to the data directory."""

    run_id: str
    incarnation: int
    outer_step: int
    state_digest: bytes
    path: str
    total_bytes: int
    peer_id: str
    store_unix_ms: int


@dataclass(frozen=True, slots=True)
class StepRow:
    """A certificate in force without its bytes, for curves."""

    incarnation: int
    outer_step: int
    attempt: int
    store_unix_ms: int
    schedule_tokens: int
    trained_tokens: int
    credited_tokens: int
    loss_nats: float
    num_members: int
    num_contributors: int
