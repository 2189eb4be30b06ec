"""Wire <-> dataclass: the only place where protobuf messages become operations' requests and their
answers messages.

What a client sends is checked here for form (lengths; UTF-8 is protobuf's); what it may do is for
the operations.
"""

import dataclasses
import math
from typing import Any, TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from coordinator.api.auth import Caller
from coordinator.operations.requests import (
    BeginUploadRequest,
    Capabilities,
    CheckpointInfo,
    Claims,
    DutyOrder,
    EvaluationResult,
    HeartbeatRequest,
    HeartbeatResponse,
    JoinRequest,
    JoinResponse,
    LeaveRequest,
    ReportDutyRequest,
    TrialPointResult,
    TrialResult,
)
from coordinator.operations.requests_ledger import (
    AcquireLeasesRequest,
    CertificateReceipt,
    ExchangeRequest,
    ExchangeResponse,
    FetchCertificatesRequest,
    ReleaseLeasesRequest,
    SubmitVotesRequest,
)
from protos.contract.errors import ErrorCode, UsageError
from protos.muster.v1 import common_pb2, duties_pb2, leases_pb2, membership_pb2, rounds_pb2

_Sized = TypeVar("_Sized", str, bytes, list[Any])

MAX_TEXT_CHARACTERS = 512
MAX_REQUEST_ID_CHARACTERS = 64
MAX_HEARTBEAT_ITEMS = 4096
MAX_ADDRESSES = 32
MAX_TRIAL_POINTS = 256
MAX_CERTIFICATES = 256


def timestamp(unix_seconds: float) -> Timestamp:
    """Instant on the wire."""
    whole_seconds = math.floor(unix_seconds)
    return Timestamp(seconds=whole_seconds, nanos=int((unix_seconds - whole_seconds) * 1e9))


def duration(seconds: float) -> Duration:
    """Duration on the wire."""
    return Duration(seconds=int(seconds), nanos=int((seconds - int(seconds)) * 1e9))


def checked_text(text: str, *, name: str, max_characters: int = MAX_TEXT_CHARACTERS) -> str:
    """The text, control characters made visible. Raises UsageError (TOO_LARGE) if too long."""
    checked_length(text, name=name, most=max_characters)
    return (
        text
        if text.isprintable()
        else text.encode("unicode_escape").decode("ascii")[:max_characters]
    )


def checked_length(items: _Sized, *, name: str, most: int) -> _Sized:
    """The items. Raises UsageError (TOO_LARGE) when there are more than `most`."""
    if len(items) > most:
        raise UsageError(
            f"{name} has {len(items)} items",
            allowed=f"at most {most}",
            remedy="send less",
            code=ErrorCode.TOO_LARGE,
        )
    return items


def signed_or_none(message: Message, field: str) -> common_pb2.Signed | None:
    """A Signed field, None if it is absent."""
    value: common_pb2.Signed = getattr(message, field)
    return value if message.HasField(field) else None


def certificate_from_bytes(data: bytes) -> rounds_pb2.Certificate:
    """A stored certificate as a message."""
    certificate: rounds_pb2.Certificate = rounds_pb2.Certificate.FromString(data)
    return certificate


# Membership.


def capabilities_from_wire(message: membership_pb2.PeerCapabilities) -> Capabilities:
    """What a machine says of itself; lists bounded."""
    return Capabilities(
        package_version=checked_text(message.package_version, name="package_version"),
        torch_version=checked_text(message.torch_version, name="torch_version"),
        tokens_per_second=message.tokens_per_second,
        memory_bytes=message.memory_bytes,
        can_accept_connections=message.can_accept_connections,
        addresses=_texts(message.addresses, name="addresses"),
        codecs=_texts(message.codecs, name="codecs"),
        strategies=_texts(message.strategies, name="strategies"),
        objectives=_texts(message.objectives, name="objectives"),
    )


def claims_from_wire(message: membership_pb2.PeerClaims) -> Claims:
    """A peer's numbers about itself, field for field; texts bounded."""
    values = {field.name: getattr(message, field.name) for field in dataclasses.fields(Claims)}
    values["state"] = checked_text(message.state, name="state", max_characters=32)
    for name in ("state_reason", "discard_reason"):
        values[name] = checked_text(values[name], name=name)
    return Claims(**values)


def join_request_from_wire(message: membership_pb2.JoinRequest) -> JoinRequest:
    """See membership.proto."""
    return JoinRequest(
        run_id=message.run_id,
        token_secret=checked_length(message.token_secret, name="token_secret", most=128),
        nonce=message.nonce,
        public_key=message.public_key,
        signature=message.signature,
        p2p_public_key=checked_length(message.p2p_public_key, name="p2p_public_key", most=2048),
        p2p_signature=checked_length(message.p2p_signature, name="p2p_signature", most=2048),
        name=checked_length(message.name, name="name", most=40),
        protocol_version=message.protocol_version,
        capabilities=capabilities_from_wire(message.capabilities),
    )


def join_response_to_wire(
    response: JoinResponse,
    *,
    rendezvous: tuple[str, ...],
    checkpoint_mirrors: tuple[str, ...],
) -> membership_pb2.JoinResponse:
    """See membership.proto; the rendezvous comes before live peers."""
    return membership_pb2.JoinResponse(
        peer_id=response.peer_id,
        session_key=response.session_key,
        session_expire_time=timestamp(response.session_expire_unix_seconds),
        run_spec=response.run_spec,
        coordinator_public_key=response.coordinator_public_key,
        dht_prefix=response.dht_prefix,
        initial_peers=(*rendezvous, *response.initial_peers),
        incarnation_record=response.incarnation_record,
        directive=response.directive,
        checkpoint_mirrors=checkpoint_mirrors,
        outer_step=response.outer_step,
        dataset_id=response.dataset_id,
        heartbeat_interval_duration=duration(response.heartbeat_interval_seconds),
        now_time=timestamp(response.now_unix_seconds),
        next_lease_number=response.next_lease_number,
    )


def heartbeat_request_from_wire(
    message: membership_pb2.HeartbeatRequest, caller: Caller
) -> HeartbeatRequest:
    """See membership.proto."""
    attestations = checked_length(
        list(message.attestations), name="attestations", most=MAX_HEARTBEAT_ITEMS
    )
    lease_numbers = checked_length(
        list(message.lease_numbers), name="lease_numbers", most=MAX_HEARTBEAT_ITEMS
    )
    return HeartbeatRequest(
        run_id=caller.run_id,
        peer_id=caller.peer_id,
        claims=claims_from_wire(message.claims),
        attestations=tuple(attestations),
        lease_numbers=tuple(lease_numbers),
        directive_number=message.directive_number,
        incarnation=message.incarnation,
        addresses=_texts(message.addresses, name="addresses"),
        has_lost_state=message.has_lost_state,
        duty_id=checked_text(message.duty_id, name="duty_id"),
        duty_fence=message.duty_fence,
    )


def heartbeat_response_to_wire(
    response: HeartbeatResponse, *, rendezvous: tuple[str, ...]
) -> membership_pb2.HeartbeatResponse:
    """See membership.proto; the rendezvous comes before live peers."""
    return membership_pb2.HeartbeatResponse(
        directive=response.directive,
        incarnation_record=response.incarnation_record,
        certificates=[certificate_from_bytes(data) for data in response.certificates],
        lost_lease_numbers=response.lost_lease_numbers,
        duty=None if response.duty is None else duty_to_wire(response.duty),
        heartbeat_interval_duration=duration(response.heartbeat_interval_seconds),
        now_time=timestamp(response.now_unix_seconds),
        is_run_over=response.is_run_over,
        run_state=response.run_state,
        run_state_reason=response.run_state_reason,
        initial_peers=(*rendezvous, *response.initial_peers),
        outer_step=response.outer_step,
    )


def leave_request_from_wire(message: membership_pb2.LeaveRequest, caller: Caller) -> LeaveRequest:
    """See membership.proto."""
    attestations = checked_length(
        list(message.attestations), name="attestations", most=MAX_HEARTBEAT_ITEMS
    )
    return LeaveRequest(
        run_id=caller.run_id,
        peer_id=caller.peer_id,
        reason=checked_text(message.reason, name="reason"),
        attestations=tuple(attestations),
    )


# Duties.


def duty_to_wire(duty: DutyOrder) -> duties_pb2.Duty:
    """See duties.proto."""
    return duties_pb2.Duty(
        duty_id=duty.duty_id,
        kind=duties_pb2.DutyKind.Value(f"DUTY_KIND_{duty.kind}"),
        fence=duty.fence,
        eval_tokens=duty.eval_tokens,
        min_outer_step=duty.min_outer_step,
        trial=duties_pb2.Trial(run_spec=duty.trial_spec, mark_tokens=duty.mark_tokens)
        if duty.trial_spec
        else None,
    )


def report_duty_from_wire(
    message: duties_pb2.ReportDutyRequest, caller: Caller
) -> ReportDutyRequest:
    """See duties.proto."""
    evaluation = None
    if message.HasField("evaluation"):
        names = [field.name for field in dataclasses.fields(EvaluationResult)]
        evaluation = EvaluationResult(**{name: getattr(message.evaluation, name) for name in names})
    return ReportDutyRequest(
        run_id=caller.run_id,
        peer_id=caller.peer_id,
        duty_id=checked_text(message.duty_id, name="duty_id", max_characters=128),
        fence=message.fence,
        failure_reason=checked_text(message.failure_reason, name="failure_reason"),
        evaluation=evaluation,
        trial=_trial_from_wire(message.trial) if message.HasField("trial") else None,
    )


def _trial_from_wire(message: duties_pb2.TrialResult) -> TrialResult:
    points = checked_length(list(message.points), name="points", most=MAX_TRIAL_POINTS)
    names = [field.name for field in dataclasses.fields(TrialPointResult)]
    return TrialResult(
        run_digest=checked_text(message.run_digest, name="run_digest", max_characters=64),
        seed=message.seed,
        convention=checked_text(message.convention, name="convention", max_characters=32),
        params_n=message.params_n,
        flop_per_token=message.flop_per_token,
        points=tuple(
            TrialPointResult(**{name: getattr(point, name) for name in names}) for point in points
        ),
        params_digest=checked_length(message.params_digest, name="params_digest", most=32),
        train_seconds=message.train_seconds,
        divergence=checked_text(message.divergence, name="divergence"),
    )


def begin_upload_from_wire(
    header: duties_pb2.CheckpointHeader, caller: Caller
) -> BeginUploadRequest:
    """See duties.proto."""
    return BeginUploadRequest(
        run_id=caller.run_id,
        peer_id=caller.peer_id,
        duty_id=checked_text(header.duty_id, name="duty_id", max_characters=128),
        fence=header.fence,
        attestation=header.attestation,
        total_bytes=header.total_bytes,
    )


def checkpoint_header_to_wire(checkpoint: CheckpointInfo) -> duties_pb2.FetchCheckpointResponse:
    """First message of a checkpoint's stream."""
    return duties_pb2.FetchCheckpointResponse(
        outer_step=checkpoint.outer_step,
        incarnation=checkpoint.incarnation,
        state_digest=checkpoint.state_digest,
        total_bytes=checkpoint.total_bytes,
    )


# Leases and rounds.


def acquire_leases_from_wire(
    message: leases_pb2.AcquireLeasesRequest, caller: Caller
) -> AcquireLeasesRequest:
    """See leases.proto."""
    return AcquireLeasesRequest(
        run_id=caller.run_id,
        peer_id=caller.peer_id,
        request_id=checked_length(
            message.request_id, name="request_id", most=MAX_REQUEST_ID_CHARACTERS
        ),
        incarnation=message.incarnation,
        wanted_tokens=message.wanted_tokens,
        held_tokens=message.held_tokens,
    )


def release_leases_from_wire(
    message: leases_pb2.ReleaseLeasesRequest, caller: Caller
) -> ReleaseLeasesRequest:
    """See leases.proto."""
    lease_numbers = checked_length(
        list(message.lease_numbers), name="lease_numbers", most=MAX_HEARTBEAT_ITEMS
    )
    return ReleaseLeasesRequest(
        run_id=caller.run_id,
        peer_id=caller.peer_id,
        incarnation=message.incarnation,
        lease_numbers=tuple(lease_numbers),
        reason=checked_text(message.reason, name="reason"),
    )


def exchange_from_wire(
    message: rounds_pb2.CoordinatorExchangeRequest, caller: Caller
) -> ExchangeRequest:
    """See rounds.proto."""
    return ExchangeRequest(
        run_id=caller.run_id,
        peer_id=caller.peer_id,
        incarnation=message.incarnation,
        outer_step=message.outer_step,
        attempt=message.attempt,
    )


def exchange_response_to_wire(response: ExchangeResponse) -> rounds_pb2.CoordinatorExchangeResponse:
    """See rounds.proto."""
    return rounds_pb2.CoordinatorExchangeResponse(
        answer=response.answer,
        certificate=response.certificate,
        is_promised=response.is_promised,
        reason=response.reason,
    )


def submit_votes_from_wire(
    message: rounds_pb2.SubmitVotesRequest, caller: Caller
) -> SubmitVotesRequest:
    """See rounds.proto."""
    votes = checked_length(list(message.votes), name="votes", most=MAX_HEARTBEAT_ITEMS)
    return SubmitVotesRequest(
        run_id=caller.run_id, votes=tuple(votes), contributions=message.contributions
    )


def fetch_certificates_from_wire(
    message: rounds_pb2.FetchCertificatesRequest, caller: Caller
) -> FetchCertificatesRequest:
    """See rounds.proto."""
    return FetchCertificatesRequest(
        run_id=caller.run_id,
        incarnation=message.incarnation,
        from_outer_step=message.from_outer_step,
        num_certificates=min(max(1, message.num_certificates), MAX_CERTIFICATES),
    )


def receipt_to_wire(receipt: CertificateReceipt) -> rounds_pb2.CertificateReceipt:
    """See rounds.proto."""
    return rounds_pb2.CertificateReceipt(
        outer_step=receipt.outer_step,
        is_stored=receipt.is_stored,
        credited_tokens=receipt.credited_tokens,
        uncredited_tokens=receipt.uncredited_tokens,
        reason=receipt.reason,
    )


def _texts(items: Any, *, name: str) -> tuple[str, ...]:
    checked = checked_length(list(items), name=name, most=MAX_ADDRESSES)
    return tuple(checked_text(item, name=name) for item in checked)
