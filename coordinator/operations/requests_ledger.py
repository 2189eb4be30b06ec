"""What peers and the ticker ask of leases, rounds and the ledger; the conventions are those of
requests.py.
"""

from dataclasses import dataclass

from protos.muster.v1 import common_pb2, rounds_pb2

# Leases.


@dataclass(frozen=True, slots=True, kw_only=True)
class AcquireLeasesRequest:
    """See leases.proto; run_id and peer_id are those of the session."""

    run_id: str
    peer_id: str
    request_id: str
    incarnation: int
    wanted_tokens: int
    held_tokens: int = 0
    """What the peer says; the book's own figure decides."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AcquireLeasesResponse:
    """See leases.proto."""

    leases: tuple[common_pb2.Signed, ...]
    reason: str
    is_budget_exhausted: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseLeasesRequest:
    """See leases.proto; idempotent by itself: what is no longer active is not released again."""

    run_id: str
    peer_id: str
    incarnation: int
    lease_numbers: tuple[int, ...]
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseAllRequest:
    """Returns every lease of a peer: it left, was evicted, or joined again as a new process."""

    run_id: str
    peer_id: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseLeasesResponse:
    """Leases that were active and are free now."""

    num_released_leases: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RenewLeasesRequest:
    """Part of a heartbeat."""

    run_id: str
    peer_id: str
    incarnation: int
    lease_numbers: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RenewLeasesResponse:
    """Leases named in the request that are not the peer's; committed ones are not lost."""

    lost_lease_numbers: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpireLeasesRequest:
    """Sent by the tick."""

    run_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpireLeasesResponse:
    """Leases whose time was over; `num_tokens` of theirs may be granted again."""

    num_expired_leases: int
    num_tokens: int
    reason: str


# Rounds.


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangeRequest:
    """See rounds.proto's CoordinatorExchangeRequest."""

    run_id: str
    peer_id: str
    """Who asks; needs a vote in the roster in force."""
    incarnation: int
    outer_step: int
    attempt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangeResponse:
    """See rounds.proto's CoordinatorExchangeResponse."""

    answer: rounds_pb2.ExchangeAnswer
    certificate: rounds_pb2.Certificate | None
    is_promised: bool
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SubmitVotesRequest:
    """See rounds.proto; idempotent by itself: a stored certificate is returned."""

    run_id: str
    votes: tuple[rounds_pb2.Vote, ...]
    contributions: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SubmitVotesResponse:
    """See rounds.proto."""

    certificate: rounds_pb2.Certificate | None
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportCertificatesRequest:
    """See rounds.proto; in order of outer_step. Idempotent by (run, incarnation, outer_step)."""

    run_id: str
    certificates: tuple[rounds_pb2.Certificate, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CertificateReceipt:
    """See rounds.proto."""

    outer_step: int
    is_stored: bool
    credited_tokens: int
    uncredited_tokens: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportCertificatesResponse:
    """One receipt for each certificate, in order."""

    receipts: tuple[CertificateReceipt, ...]
    directive: common_pb2.Signed | None = None
    """Newest directive, if the newest certificate names an older one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchCertificatesRequest:
    """See rounds.proto; also what a heartbeat uses for members behind."""

    run_id: str
    incarnation: int
    from_outer_step: int
    num_certificates: int
    max_bytes: int = 1_048_576
    """Of all certificates together; the first one always fits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchCertificatesResponse:
    """Serialised Certificates in order of outer_step."""

    certificates: tuple[bytes, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ApplyRollback:
    """A new incarnation begins from `to_outer_step`; its record and directive are written by the
    caller.
    """

    run_id: str
    incarnation: int
    """The new one."""
    to_outer_step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyLedgerRequest:
    """See ledger_verify.py."""

    run_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyLedgerResponse:
    """Empty violations mean that the books are right."""

    violations: tuple[str, ...]
    state_digests_equal: bool
    num_certificates: int
    num_leases: int
    credited_tokens: int
