"""The client against a real TLS server whose faults are scripted: authentication, retries, errors,
clocks, streams.
"""

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from peer.coordinator_client import CallResult, ClockOffset, CoordinatorClient, check_clock
from protos.contract import channel
from protos.contract.certificate import Tag, join_payload
from protos.contract.channel import JoinString
from protos.contract.errors import (
    CorruptDataError,
    ErrorCode,
    MusterError,
    RefusedError,
    UnavailableError,
)
from protos.contract.ids import PROTOCOL_VERSION
from protos.contract.signing import SigningKey, has_valid_signature
from protos.muster.v1 import (
    corpus_pb2,
    corpus_pb2_grpc,
    duties_pb2,
    duties_pb2_grpc,
    leases_pb2,
    leases_pb2_grpc,
    membership_pb2,
    membership_pb2_grpc,
)

SESSION_KEY = b"k" * 32
KEY = SigningKey(b"\x07" * 32)


class Script:
    """What the server does next, and what it has seen."""

    def __init__(self) -> None:
        self.failures: list[MusterError | grpc.StatusCode] = []
        self.request_ids: list[str] = []
        self.clock_offset_seconds = 0.0
        self.uploaded = b""

    async def maybe_fail(self, context: Any) -> None:
        if not self.failures:
            return
        failure = self.failures.pop(0)
        if isinstance(failure, MusterError):
            status = grpc.StatusCode[failure.grpc_status_name]
            await context.abort(status, str(failure), channel.error_metadata(failure))
        await context.abort(failure, "scripted")

    def authenticate(self, context: Any, method: str) -> None:
        metadata = {key: value for key, value in context.invocation_metadata()}
        channel.check_auth(SESSION_KEY, metadata, method=method, now_unix_seconds=time.time())
        assert metadata[channel.METADATA_PEER] == KEY.peer_id


class Membership(membership_pb2_grpc.MembershipServicer):
    def __init__(self, script: Script) -> None:
        self.script = script

    async def Challenge(self, request: Any, context: Any) -> Any:
        response = membership_pb2.ChallengeResponse(nonce=b"n" * 32)
        moment = time.time() - self.script.clock_offset_seconds
        response.now_time.FromNanoseconds(int(moment * 1e9))
        return response

    async def Join(self, request: Any, context: Any) -> Any:
        await self.script.maybe_fail(context)
        assert (request.token_secret, request.protocol_version) == (b"\xab" * 32, PROTOCOL_VERSION)
        payload = join_payload(
            request.nonce, run_id=request.run_id, p2p_public_key=request.p2p_public_key
        )
        assert has_valid_signature(request.public_key, Tag.JOIN, payload, request.signature)
        assert request.p2p_signature == request.nonce + request.public_key + b"rsa"
        return membership_pb2.JoinResponse(peer_id=KEY.peer_id, session_key=SESSION_KEY)


class Leases(leases_pb2_grpc.LeasesServicer):
    def __init__(self, script: Script) -> None:
        self.script = script

    async def AcquireLeases(self, request: Any, context: Any) -> Any:
        self.script.authenticate(context, "/muster.v1.Leases/AcquireLeases")
        self.script.request_ids.append(request.request_id)
        await self.script.maybe_fail(context)
        return leases_pb2.AcquireLeasesResponse(reason="nothing is free")


class Corpus(corpus_pb2_grpc.CorpusServicer):
    def __init__(self, script: Script) -> None:
        self.script = script

    async def FetchFile(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.script.authenticate(context, "/muster.v1.Corpus/FetchFile")
        yield corpus_pb2.FileMessage(data=b"first ", total_bytes=11)
        await self.script.maybe_fail(context)
        yield corpus_pb2.FileMessage(data=b"second"[: request.chunk_index])


class Duties(duties_pb2_grpc.DutiesServicer):
    def __init__(self, script: Script) -> None:
        self.script = script

    async def UploadCheckpoint(self, request_iterator: Any, context: Any) -> Any:
        self.script.authenticate(context, "/muster.v1.Duties/UploadCheckpoint")
        async for message in request_iterator:
            self.script.uploaded += message.data
        return duties_pb2.UploadCheckpointResponse(is_accepted=True)

    async def FetchCheckpoint(self, request: Any, context: Any) -> Any:
        yield duties_pb2.FetchCheckpointResponse(data=b"a", total_bytes=request.max_outer_step)
        later = asyncio.Event()
        asyncio.get_running_loop().call_later(0.5, later.set)
        await later.wait()
        yield duties_pb2.FetchCheckpointResponse(data=b"b")


@asynccontextmanager
async def serving(script: Script) -> AsyncIterator[tuple[grpc.aio.Server, JoinString]]:
    certificate_pem, key_pem = channel.create_server_identity(["127.0.0.1"])
    server = grpc.aio.server(options=channel.server_options())
    membership_pb2_grpc.add_MembershipServicer_to_server(Membership(script), server)
    leases_pb2_grpc.add_LeasesServicer_to_server(Leases(script), server)
    corpus_pb2_grpc.add_CorpusServicer_to_server(Corpus(script), server)
    duties_pb2_grpc.add_DutiesServicer_to_server(Duties(script), server)
    port = server.add_secure_port(
        "127.0.0.1:0", channel.server_credentials(certificate_pem, key_pem)
    )
    await server.start()
    join_string = JoinString(
        address=f"127.0.0.1:{port}",
        ca_fingerprint=channel.ca_fingerprint(certificate_pem),
        run_id="demo",
        secret="ab" * 32,
        expire_unix_seconds=0,
    )
    try:
        yield server, join_string
    finally:
        await server.stop(None)


def run(
    scenario: Callable[[CoordinatorClient, Script, list[CallResult], JoinString], Awaitable[None]],
) -> None:
    """Run a scenario with a client that has a session."""

    async def main() -> None:
        script, results = Script(), list[CallResult]()
        async with serving(script) as (_, join_string):
            client = await CoordinatorClient.open(
                join_string, peer_id=KEY.peer_id, observe=results.append
            )
            client.use_session(SESSION_KEY)
            try:
                await scenario(client, script, results, join_string)
            finally:
                await client.close()

    asyncio.run(main())


def acquire(client: CoordinatorClient, *, retry_seconds: float) -> Awaitable[Any]:
    return client.acquire_leases(leases_pb2.AcquireLeasesRequest(), retry_seconds=retry_seconds)


def test_join_proves_both_keys() -> None:
    async def scenario(client: Any, script: Script, results: Any, join_string: JoinString) -> None:
        nonce, clock = await client.challenge()
        assert abs(clock.offset_seconds) <= clock.uncertainty_seconds + 0.01
        response = await client.join(
            join_string=join_string,
            nonce=nonce,
            signing_key=KEY,
            p2p_public_key=b"\x08\x00\x12\x01x",
            sign_with_p2p_key=lambda data: data + b"rsa",
            name="peer",
            capabilities=membership_pb2.PeerCapabilities(),
        )
        assert response.session_key == SESSION_KEY
        await acquire(client, retry_seconds=0)

    run(scenario)


def test_retries_keep_the_request_id() -> None:
    async def scenario(client: Any, script: Script, results: list[CallResult], _: Any) -> None:
        busy = UnavailableError("starting", code=ErrorCode.NOT_READY)
        script.failures = [grpc.StatusCode.UNAVAILABLE, busy]
        response = await acquire(client, retry_seconds=30)
        assert response.reason == "nothing is free"
        assert len(script.request_ids) == 3 and len(set(script.request_ids)) == 1
        assert [(r.status, r.is_answered) for r in results] == [
            ("UNAVAILABLE", False),
            ("UNAVAILABLE", True),
            ("OK", True),
        ]

    run(scenario)


@pytest.mark.parametrize(
    "error",
    [
        RefusedError(
            "token used up", allowed="3 uses", remedy="ask", code=ErrorCode.TOKEN_EXHAUSTED
        ),
        CorruptDataError("digest differs", code=ErrorCode.DIGEST_MISMATCH),
    ],
)
def test_refusals_arrive_whole_and_are_not_tried_again(error: MusterError) -> None:
    async def scenario(client: Any, script: Script, results: Any, _: Any) -> None:
        script.failures = [error]
        with pytest.raises(type(error)) as caught:
            await acquire(client, retry_seconds=30)
        found = caught.value
        assert (found.code, found.found, found.remedy) == (error.code, error.found, error.remedy)
        assert len(script.request_ids) == 1

    run(scenario)


def test_nobody_answers() -> None:
    async def main() -> None:
        async with serving(Script()) as (server, join_string):
            client = await CoordinatorClient.open(join_string, peer_id=KEY.peer_id)
            client.use_session(SESSION_KEY)
            await server.stop(None)
            with pytest.raises(UnavailableError, match=join_string.address) as caught:
                await acquire(client, retry_seconds=0)
            assert caught.value.remedy
            await client.close()
            with pytest.raises(UnavailableError):
                await CoordinatorClient.open(join_string, peer_id=KEY.peer_id)
            known = await CoordinatorClient.open(
                join_string, peer_id=KEY.peer_id, certificate_pem=client.certificate_pem
            )
            await known.close()

    asyncio.run(main())


def test_somebody_else_answers() -> None:
    async def main() -> None:
        async with serving(Script()) as (_, join_string):
            other = JoinString(
                address=join_string.address,
                ca_fingerprint=hashlib.sha256(b"another").hexdigest(),
                run_id="demo",
                secret="ab",
                expire_unix_seconds=0,
            )
            with pytest.raises(RefusedError) as caught:
                await CoordinatorClient.open(other, peer_id=KEY.peer_id)
            assert caught.value.code is ErrorCode.CA_MISMATCH

    asyncio.run(main())


def test_clock_offset_is_measured_and_judged() -> None:
    async def scenario(client: Any, script: Script, results: Any, _: Any) -> None:
        script.clock_offset_seconds = 3.0
        _, clock = await client.challenge()
        assert clock.offset_seconds == pytest.approx(3.0, abs=clock.uncertainty_seconds + 0.01)
        with pytest.raises(RefusedError, match="clock") as caught:
            check_clock(clock)
        assert caught.value.code is ErrorCode.CLOCK_SKEW

    run(scenario)


@pytest.mark.parametrize(("offset", "uncertainty"), [(1.4, 0.0), (-1.4, 0.0), (4.0, 3.0)])
def test_an_offset_that_the_round_trip_may_explain_is_let_in(
    offset: float, uncertainty: float
) -> None:
    check_clock(ClockOffset(offset_seconds=offset, uncertainty_seconds=uncertainty))


def test_streams_in_both_directions() -> None:
    async def scenario(client: Any, script: Script, results: Any, _: Any) -> None:
        parts = [part async for part in client.fetch_file(4, chunk_index=6)]
        assert b"".join(parts) == b"first second"
        header = duties_pb2.CheckpointHeader(duty_id="d", total_bytes=6)
        response = await client.upload_checkpoint(header, [b"abc", b"def"])
        assert response.is_accepted and script.uploaded == b"abcdef"
        script.failures = [RefusedError("not leased", code=ErrorCode.NOT_LEASED)]
        with pytest.raises(RefusedError) as caught:
            _ = [part async for part in client.fetch_file(3, chunk_index=6)]
        assert caught.value.code is ErrorCode.NOT_LEASED

    run(scenario)


def test_a_download_may_take_as_long_as_its_size_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pause of 0.5 s, where an empty file gets 0.2 s and 100 bytes get 10.2 s."""
    monkeypatch.setattr(channel, "STREAM_DEADLINE_SECONDS", 0.2)
    monkeypatch.setattr(channel, "SLOWEST_LINK_BYTES_PER_SECOND", 10.0)

    async def scenario(client: Any, script: Script, results: Any, _: Any) -> None:
        await client.challenge()  # the connection is there
        parts = [part.data async for part in client.fetch_checkpoint(max_outer_step=100)]
        assert parts == [b"a", b"b"] and results[-1].is_answered
        with pytest.raises(UnavailableError, match="no whole answer"):
            _ = [part async for part in client.fetch_checkpoint(max_outer_step=0)]
        assert (results[-1].status, results[-1].is_answered) == ("DEADLINE_EXCEEDED", False)

    run(scenario)
