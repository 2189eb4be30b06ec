"""The daemon's side of every call to the coordinator: pinned TLS, session key, deadlines, retries,
plain errors.

A call either returns the response or raises a MusterError, decoded from the coordinator's trailing
metadata. What may be tried again (UNAVAILABLE, DEADLINE_EXCEEDED) is, with jittered backoff, until
`retry_seconds` have passed; requests carry a `request_id` that stays the same, so an answer that
was lost on the way is given again and nothing happens twice. Every attempt tells the `observe`
callback how it went: that is how the session learns whether the coordinator can be reached.

The only user of gRPC stubs in the peer. Clock offsets are measured as NTP does: half the round trip
lies before the answer.
"""

import asyncio
import random
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from typing import Any, Self

import grpc

from protos.contract import channel
from protos.contract.certificate import Tag, join_payload, p2p_join_payload
from protos.contract.channel import JoinString
from protos.contract.errors import (
    ErrorCode,
    MusterError,
    RefusedError,
    UnavailableError,
    UsageError,
)
from protos.contract.ids import PROTOCOL_VERSION, PeerId
from protos.contract.signing import SigningKey
from protos.muster.v1 import (
    corpus_pb2,
    corpus_pb2_grpc,
    duties_pb2,
    duties_pb2_grpc,
    leases_pb2,
    leases_pb2_grpc,
    membership_pb2,
    membership_pb2_grpc,
    rounds_pb2,
    rounds_pb2_grpc,
)

CLOCK_WARN_SECONDS = 0.5
CLOCK_REFUSE_SECONDS = 1.5
"""The DHT drops records of peers whose clock is 3 s off; two peers may err in opposite directions.
"""
_FIRST_BACKOFF_SECONDS = 0.2
_MAX_BACKOFF_SECONDS = 5.0
_CLOCK_SAMPLES = 3
_RETRIED = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED})


@dataclass(frozen=True, slots=True, kw_only=True)
class CallResult:
    """How one attempt went."""

    method: str
    status: str
    """gRPC status name."""
    seconds: float
    is_answered: bool
    """True if the coordinator itself answered, be it with a refusal."""
    reason: str
    """Why not, otherwise."""


Observer = Callable[[CallResult], None]


def _observe_nothing(result: CallResult) -> None:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class ClockOffset:
    """This machine's clock minus the coordinator's."""

    offset_seconds: float
    uncertainty_seconds: float
    """Half the round trip: the true offset is that near."""

    @property
    def certain_seconds(self) -> float:
        """The part of the offset that the round trip cannot explain."""
        return max(0.0, abs(self.offset_seconds) - self.uncertainty_seconds)


def check_clock(clock: ClockOffset) -> None:
    """Raise RefusedError CLOCK_SKEW if this clock is too far off to take part."""
    if clock.certain_seconds > CLOCK_REFUSE_SECONDS:
        raise RefusedError(
            f"this machine's clock differs from the coordinator's by {clock.offset_seconds:+.1f} s",
            allowed=f"at most {CLOCK_REFUSE_SECONDS} s, because records in the DHT expire by time",
            remedy="synchronise the clock: timedatectl set-ntp true, or chronyc makestep",
            code=ErrorCode.CLOCK_SKEW,
        )


class CoordinatorClient:
    """Calls as one peer; safe for any number of concurrent calls on one event loop."""

    def __init__(
        self,
        *,
        grpc_channel: grpc.aio.Channel,
        certificate_pem: bytes,
        address: str,
        peer_id: PeerId,
        observe: Observer = _observe_nothing,
    ) -> None:
        self._channel = grpc_channel
        self.certificate_pem = certificate_pem
        """For the next session."""
        self._address = address
        self._peer_id = peer_id
        self._observe = observe
        self._session_key = b""
        self._membership: Any = membership_pb2_grpc.MembershipStub(grpc_channel)
        self._leases: Any = leases_pb2_grpc.LeasesStub(grpc_channel)
        self._rounds: Any = rounds_pb2_grpc.RoundsStub(grpc_channel)
        self._corpus: Any = corpus_pb2_grpc.CorpusStub(grpc_channel)
        self._duties: Any = duties_pb2_grpc.DutiesStub(grpc_channel)

    @classmethod
    async def open(
        cls,
        join_string: JoinString,
        *,
        peer_id: PeerId,
        certificate_pem: bytes = b"",
        observe: Observer = _observe_nothing,
    ) -> Self:
        """Open the channel with the certificate that the join string pins, fetching it unless it is
        given.

        Raises UnavailableError, RefusedError CA_MISMATCH. With a certificate from an earlier
        session nobody has to answer yet.
        """
        host, port = channel.split_address(join_string.address)
        is_known = certificate_pem and (
            channel.ca_fingerprint(certificate_pem) == join_string.ca_fingerprint
        )
        if not is_known:
            certificate_pem = await asyncio.to_thread(
                channel.fetch_pinned_ca,
                host,
                port,
                join_string.ca_fingerprint,
                timeout_seconds=channel.CONNECT_DEADLINE_SECONDS,
            )
        return cls(
            grpc_channel=channel.open_aio_channel(join_string.address, certificate_pem),
            certificate_pem=certificate_pem,
            address=join_string.address,
            peer_id=peer_id,
            observe=observe,
        )

    async def close(self) -> None:
        """Close the channel; calls under way are cancelled."""
        await self._channel.close()

    def use_session(self, session_key: bytes) -> None:
        """Authenticate later calls with the key that Join returned."""
        self._session_key = session_key

    # Membership.

    async def challenge(self) -> tuple[bytes, ClockOffset]:
        """A nonce for one Join, and this clock's offset by the best of a few exchanges."""
        samples = []
        nonce = b""
        for _ in range(_CLOCK_SAMPLES):
            began_unix_seconds = time.time()
            response = await self._call(
                self._membership.Challenge,
                "/muster.v1.Membership/Challenge",
                membership_pb2.ChallengeRequest(),
            )
            nonce = response.nonce
            samples.append(_clock_offset(began_unix_seconds, time.time(), response.now_time))
        return nonce, min(samples, key=lambda sample: sample.uncertainty_seconds)

    async def join(
        self,
        *,
        join_string: JoinString,
        nonce: bytes,
        signing_key: SigningKey,
        p2p_public_key: bytes,
        sign_with_p2p_key: Callable[[bytes], bytes],
        name: str,
        capabilities: membership_pb2.PeerCapabilities,
    ) -> membership_pb2.JoinResponse:
        """Prove both keys; later calls use the session key of the answer."""
        run_id = join_string.run_id
        request = membership_pb2.JoinRequest(
            request_id=_new_request_id(),
            run_id=run_id,
            token_secret=_secret_bytes(join_string),
            nonce=nonce,
            public_key=signing_key.public_key,
            signature=signing_key.sign(
                Tag.JOIN, join_payload(nonce, run_id=run_id, p2p_public_key=p2p_public_key)
            ),
            p2p_public_key=p2p_public_key,
            p2p_signature=sign_with_p2p_key(
                p2p_join_payload(nonce, public_key=signing_key.public_key)
            ),
            name=name,
            protocol_version=PROTOCOL_VERSION,
            capabilities=capabilities,
        )
        response: membership_pb2.JoinResponse = await self._call(
            self._membership.Join,
            "/muster.v1.Membership/Join",
            request,
            deadline_seconds=channel.JOIN_DEADLINE_SECONDS,
        )
        self.use_session(response.session_key)
        return response

    async def heartbeat(
        self, request: membership_pb2.HeartbeatRequest
    ) -> tuple[membership_pb2.HeartbeatResponse, ClockOffset]:
        """One try: the next heartbeat comes anyway."""
        request.request_id = request.request_id or _new_request_id()
        began_unix_seconds = time.time()
        response: membership_pb2.HeartbeatResponse = await self._call(
            self._membership.Heartbeat, "/muster.v1.Membership/Heartbeat", request
        )
        return response, _clock_offset(began_unix_seconds, time.time(), response.now_time)

    async def leave(
        self, request: membership_pb2.LeaveRequest, *, deadline_seconds: float
    ) -> membership_pb2.LeaveResponse:
        """Leave in good order."""
        request.request_id = request.request_id or _new_request_id()
        response: membership_pb2.LeaveResponse = await self._call(
            self._membership.Leave,
            "/muster.v1.Membership/Leave",
            request,
            deadline_seconds=deadline_seconds,
        )
        return response

    # Leases.

    async def acquire_leases(
        self, request: leases_pb2.AcquireLeasesRequest, *, retry_seconds: float
    ) -> leases_pb2.AcquireLeasesResponse:
        """Ask for work; the same request_id gives the same leases."""
        request.request_id = request.request_id or _new_request_id()
        response: leases_pb2.AcquireLeasesResponse = await self._call(
            self._leases.AcquireLeases,
            "/muster.v1.Leases/AcquireLeases",
            request,
            retry_seconds=retry_seconds,
        )
        return response

    async def release_leases(
        self, request: leases_pb2.ReleaseLeasesRequest, *, retry_seconds: float
    ) -> leases_pb2.ReleaseLeasesResponse:
        """Return leases."""
        request.request_id = request.request_id or _new_request_id()
        response: leases_pb2.ReleaseLeasesResponse = await self._call(
            self._leases.ReleaseLeases,
            "/muster.v1.Leases/ReleaseLeases",
            request,
            retry_seconds=retry_seconds,
        )
        return response

    # Rounds.

    async def exchange(
        self, request: rounds_pb2.CoordinatorExchangeRequest
    ) -> rounds_pb2.CoordinatorExchangeResponse:
        """The coordinator's promise and highest vote."""
        response: rounds_pb2.CoordinatorExchangeResponse = await self._call(
            self._rounds.Exchange, "/muster.v1.Rounds/Exchange", request
        )
        return response

    async def submit_votes(
        self, request: rounds_pb2.SubmitVotesRequest
    ) -> rounds_pb2.SubmitVotesResponse:
        """Offer votes for the coordinator's half."""
        request.request_id = request.request_id or _new_request_id()
        response: rounds_pb2.SubmitVotesResponse = await self._call(
            self._rounds.SubmitVotes, "/muster.v1.Rounds/SubmitVotes", request
        )
        return response

    async def report_certificates(
        self, certificates: Iterable[rounds_pb2.Certificate]
    ) -> rounds_pb2.ReportCertificatesResponse:
        """Report in order of outer_step; one receipt for each, and a directive that is news."""
        request = rounds_pb2.ReportCertificatesRequest(
            request_id=_new_request_id(), certificates=list(certificates)
        )
        response: rounds_pb2.ReportCertificatesResponse = await self._call(
            self._rounds.ReportCertificates, "/muster.v1.Rounds/ReportCertificates", request
        )
        return response

    async def fetch_certificates(
        self, *, incarnation: int, from_outer_step: int, num_certificates: int
    ) -> list[rounds_pb2.Certificate]:
        """Stored certificates in order."""
        request = rounds_pb2.FetchCertificatesRequest(
            incarnation=incarnation,
            from_outer_step=from_outer_step,
            num_certificates=num_certificates,
        )
        response = await self._call(
            self._rounds.FetchCertificates, "/muster.v1.Rounds/FetchCertificates", request
        )
        return list(response.certificates)

    # Corpus and duties.

    async def fetch_file(self, file: int, *, chunk_index: int = 0) -> AsyncIterator[bytes]:
        """Stream a file of the dataset (a corpus_pb2.DatasetFile)."""
        request = corpus_pb2.FetchFileRequest(
            file=file,  # type: ignore[arg-type]
            chunk_index=chunk_index,
        )
        method = "/muster.v1.Corpus/FetchFile"
        async for message in self._stream(self._corpus.FetchFile, method, request):
            yield message.data

    async def report_duty(
        self, request: duties_pb2.ReportDutyRequest
    ) -> duties_pb2.ReportDutyResponse:
        """Report a duty done or failed."""
        request.request_id = request.request_id or _new_request_id()
        response: duties_pb2.ReportDutyResponse = await self._call(
            self._duties.ReportDuty, "/muster.v1.Duties/ReportDuty", request, retry_seconds=20.0
        )
        return response

    async def upload_checkpoint(
        self, header: duties_pb2.CheckpointHeader, parts: Iterable[bytes]
    ) -> duties_pb2.UploadCheckpointResponse:
        """Upload a file in parts of at most MAX_STREAM_PART_BYTES."""
        method = "/muster.v1.Duties/UploadCheckpoint"

        async def messages() -> AsyncIterator[duties_pb2.UploadCheckpointRequest]:
            yield duties_pb2.UploadCheckpointRequest(header=header)
            for part in parts:
                yield duties_pb2.UploadCheckpointRequest(data=part)

        began_seconds = time.monotonic()
        try:
            response: duties_pb2.UploadCheckpointResponse = await self._duties.UploadCheckpoint(
                messages(),
                timeout=channel.transfer_deadline_seconds(header.total_bytes),
                metadata=self._metadata(method),
            )
        except grpc.aio.AioRpcError as error:
            raise self._failed(method, error, began_seconds) from error
        self._note(method, "OK", began_seconds)
        return response

    async def fetch_checkpoint(
        self, *, max_outer_step: int
    ) -> AsyncIterator[duties_pb2.FetchCheckpointResponse]:
        """Stream the coordinator's newest checkpoint: a header message, then data."""
        request = duties_pb2.FetchCheckpointRequest(max_outer_step=max_outer_step)
        method = "/muster.v1.Duties/FetchCheckpoint"
        async for message in self._stream(self._duties.FetchCheckpoint, method, request):
            yield message

    # How calls are made.

    async def _call(
        self,
        stub_method: Callable[..., Any],
        method: str,
        request: Any,
        *,
        deadline_seconds: float = channel.UNARY_DEADLINE_SECONDS,
        retry_seconds: float = 0.0,
    ) -> Any:
        """Call until it succeeds, is refused or `retry_seconds` are over. Raises MusterError."""
        give_up_seconds = time.monotonic() + retry_seconds
        backoff_seconds = _FIRST_BACKOFF_SECONDS
        while True:
            began_seconds = time.monotonic()
            try:
                response = await stub_method(
                    request, timeout=deadline_seconds, metadata=self._metadata(method)
                )
            except grpc.aio.AioRpcError as error:
                failure = self._failed(method, error, began_seconds)
                if error.code() not in _RETRIED or time.monotonic() >= give_up_seconds:
                    raise failure from error
            else:
                self._note(method, "OK", began_seconds)
                return response
            await asyncio.sleep(backoff_seconds * random.uniform(0.5, 1.5))
            backoff_seconds = min(2 * backoff_seconds, _MAX_BACKOFF_SECONDS)

    async def _stream(
        self, stub_method: Callable[..., Any], method: str, request: Any
    ) -> AsyncIterator[Any]:
        """Messages of a download; the size in the first one says how long it may take."""
        began_seconds, seconds = time.monotonic(), channel.STREAM_DEADLINE_SECONDS
        call = stub_method(request, metadata=self._metadata(method))
        try:
            while True:
                async with asyncio.timeout(began_seconds + seconds - time.monotonic()):
                    message = await call.read()
                if message is grpc.aio.EOF:
                    break
                seconds = max(seconds, channel.transfer_deadline_seconds(message.total_bytes))
                yield message
        except grpc.aio.AioRpcError as error:
            raise self._failed(method, error, began_seconds) from error
        except TimeoutError as error:
            failure = self._unanswered(f"no whole answer in {seconds:.0f} s")
            self._note(method, "DEADLINE_EXCEEDED", began_seconds, reason=failure.found)
            raise failure from error
        finally:
            call.cancel()
        self._note(method, "OK", began_seconds)

    def _metadata(self, method: str) -> tuple[tuple[str, str], ...]:
        if method in channel.UNAUTHENTICATED_METHODS:
            return ()
        return channel.auth_metadata(
            self._session_key,
            method=method,
            peer_id=self._peer_id,
            now_unix_seconds=time.time(),
        )

    def _failed(
        self, method: str, error: grpc.aio.AioRpcError, began_seconds: float
    ) -> MusterError:
        failure = channel.error_from_rpc(error)
        metadata = {key for key, _ in (error.trailing_metadata() or ())}
        is_answered = error.code() not in _RETRIED or channel.METADATA_ERROR_CODE in metadata
        if not is_answered:
            failure = self._unanswered(error.details() or error.code().name)
        reason = "" if is_answered else failure.found
        self._note(method, error.code().name, began_seconds, reason=reason)
        return failure

    def _unanswered(self, details: str) -> UnavailableError:
        return UnavailableError(
            f"the coordinator at {self._address} does not answer ({details})",
            allowed="a running coordinator that this machine can reach",
            remedy="wait until it is back, or check the network and its firewall",
        )

    def _note(self, method: str, status: str, began_seconds: float, *, reason: str = "") -> None:
        self._observe(
            CallResult(
                method=method.rpartition("/")[2],
                status=status,
                seconds=time.monotonic() - began_seconds,
                is_answered=not reason,
                reason=reason,
            )
        )


def _new_request_id() -> str:
    return uuid.uuid4().hex


def _clock_offset(
    began_unix_seconds: float, ended_unix_seconds: float, now_time: Any
) -> ClockOffset:
    coordinator_unix_seconds = now_time.seconds + now_time.nanos / 1e9
    middle_unix_seconds = (began_unix_seconds + ended_unix_seconds) / 2
    return ClockOffset(
        offset_seconds=middle_unix_seconds - coordinator_unix_seconds,
        uncertainty_seconds=abs(ended_unix_seconds - began_unix_seconds) / 2,
    )


def _secret_bytes(join_string: JoinString) -> bytes:
    try:
        return bytes.fromhex(join_string.secret)
    except ValueError as error:
        raise UsageError(
            "join string: its secret is not hexadecimal",
            allowed="the whole line that `muster-coordinator token create` printed",
            remedy="copy it again",
        ) from error
