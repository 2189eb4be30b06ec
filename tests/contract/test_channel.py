"""Join strings, request authentication, and TLS pinning against a real server on loopback."""

import asyncio
import base64
import dataclasses
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st

from protos.contract import channel
from protos.contract.channel import JoinString
from protos.contract.errors import (
    ErrorCode,
    MusterError,
    RefusedError,
    UnavailableError,
    UsageError,
)
from protos.contract.ids import PROTOCOL_VERSION
from protos.muster.v1 import membership_pb2, membership_pb2_grpc

GOOD = JoinString(
    address="example.org:7070",
    ca_fingerprint="0f" * 32,
    run_id="run-1",
    secret="s3cret",
    expire_unix_seconds=1_900_000_000,
)
GOLDEN_JOIN_STRING = (
    "muster1:eyJhZGRyZXNzIjoiZXhhbXBsZS5vcmc6NzA3MCIsImNhX2ZpbmdlcnByaW50IjoiMGYwZjBmMGYwZjBm"
    "MGYwZjBmMGYwZjBmMGYwZjBmMGYwZjBmMGYwZjBmMGYwZjBmMGYwZjBmMGYwZjBmMGYwZiIsImV4cGlyZV91bml4X3N"
    "lY29uZHMiOjE5MDAwMDAwMDAsInJ1bl9pZCI6InJ1bi0xIiwic2VjcmV0IjoiczNjcmV0In0"
)


def encode_plain(plain: Any) -> str:
    """A join string with any JSON inside."""
    return "muster1:" + base64.urlsafe_b64encode(json.dumps(plain).encode()).decode().rstrip("=")


def changed(**fields: Any) -> str:
    """The good join string with some fields replaced."""
    return encode_plain(dataclasses.asdict(GOOD) | fields)


def test_join_string_is_golden() -> None:
    assert GOOD.encode() == GOLDEN_JOIN_STRING
    assert JoinString.decode(f"  {GOLDEN_JOIN_STRING}\n") == GOOD


@pytest.mark.parametrize(
    "text",
    [
        "",
        "muster1:",
        "muster2:" + GOLDEN_JOIN_STRING[8:],
        GOLDEN_JOIN_STRING[:-5],
        GOLDEN_JOIN_STRING[:60] + " " + GOLDEN_JOIN_STRING[60:],
        GOLDEN_JOIN_STRING + "=",
        "muster1:" + "A" * 3000,
        "muster1:\u00e9",
        encode_plain([]),
        encode_plain({}),
        changed(extra=1),
        changed(expire_unix_seconds=-1),
        changed(expire_unix_seconds=1.5),
        changed(expire_unix_seconds=True),
        changed(ca_fingerprint="0F" * 32),
        changed(ca_fingerprint="0f"),
        changed(run_id="Run"),
        changed(secret=""),
        changed(secret=5),
        changed(address="nowhere"),
    ],
)
def test_bad_join_string_is_refused_in_three_parts(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        JoinString.decode(text)
    assert caught.value.allowed and caught.value.remedy


@given(st.text(max_size=80))
def test_any_text_is_refused_and_nothing_else_happens(text: str) -> None:
    for attempt in (text, "muster1:" + text):
        with pytest.raises(UsageError):
            JoinString.decode(attempt)


@pytest.mark.parametrize(
    ("address", "expected"),
    [("a:1", ("a", 1)), ("10.0.0.1:65535", ("10.0.0.1", 65535)), ("[::1]:80", ("::1", 80))],
)
def test_good_addresses(address: str, expected: tuple[str, int]) -> None:
    assert channel.split_address(address) == expected


@pytest.mark.parametrize(
    "address", ["", "a", "a:", ":1", "a:0", "a:65536", "a:x", "::1:80", "[]:1"]
)
def test_bad_addresses(address: str) -> None:
    with pytest.raises(UsageError, match="address"):
        channel.split_address(address)


METHOD = "/muster.v1.Membership/Heartbeat"
KEY = bytes(range(32))


def test_mac_is_golden() -> None:
    mac = channel.request_mac(KEY, method=METHOD, peer_id="ab", unix_ms=1_700_000_000_123)
    assert mac == "62a9b3dc8bc42bc14b17588d366f0b53674a14c9256ea96691c27364c93f238a"


def test_authenticated_call_is_accepted_and_any_change_refused() -> None:
    now = 1_700_000_000.5
    metadata = dict(channel.auth_metadata(KEY, method=METHOD, peer_id="ab", now_unix_seconds=now))
    channel.check_auth(KEY, metadata, method=METHOD, now_unix_seconds=now + 59)
    cases: list[tuple[bytes, dict[str, str], str]] = [
        (KEY, metadata, "/muster.v1.Membership/Leave"),
        (bytes(32), metadata, METHOD),
        (KEY, metadata | {channel.METADATA_PEER: "cd"}, METHOD),
        (KEY, metadata | {channel.METADATA_TIME: "1700000000501"}, METHOD),
        (KEY, metadata | {channel.METADATA_TIME: "x"}, METHOD),
        (KEY, metadata | {channel.METADATA_MAC: "\u00e9"}, METHOD),
        (KEY, {}, METHOD),
    ]
    for key, changed_metadata, method in cases:
        with pytest.raises(RefusedError) as caught:
            channel.check_auth(key, changed_metadata, method=method, now_unix_seconds=now)
        assert caught.value.code is ErrorCode.SESSION_INVALID
    for skewed_now in (now + 61, now - 61):
        with pytest.raises(RefusedError, match="clock") as caught:
            channel.check_auth(KEY, metadata, method=METHOD, now_unix_seconds=skewed_now)
        assert caught.value.code is ErrorCode.CLOCK_SKEW
    older = {name: value for name, value in metadata.items() if name != channel.METADATA_PROTOCOL}
    for other in (older, metadata | {channel.METADATA_PROTOCOL: str(PROTOCOL_VERSION + 1)}):
        with pytest.raises(RefusedError, match="version") as caught:
            channel.check_auth(KEY, other, method=METHOD, now_unix_seconds=now)
        assert caught.value.code is ErrorCode.PROTOCOL_MISMATCH
        assert f"version {PROTOCOL_VERSION}" in caught.value.allowed and caught.value.remedy


class Servicer(membership_pb2_grpc.MembershipServicer):
    """Answers Challenge, and refuses Leave the way the coordinator does."""

    async def Challenge(  # noqa: N802
        self, request: membership_pb2.ChallengeRequest, context: grpc.aio.ServicerContext
    ) -> membership_pb2.ChallengeResponse:
        return membership_pb2.ChallengeResponse(nonce=b"n" * 32)

    async def Leave(  # noqa: N802
        self, request: membership_pb2.LeaveRequest, context: grpc.aio.ServicerContext
    ) -> membership_pb2.LeaveResponse:
        error = RefusedError(
            "found", allowed="allowed \u00e9", remedy="", code=ErrorCode.PEER_EVICTED
        )
        await context.abort(
            grpc.StatusCode.PERMISSION_DENIED, str(error), channel.error_metadata(error)
        )
        raise AssertionError("abort raises")


@asynccontextmanager
async def running_server(cert_pem: bytes, key_pem: bytes) -> AsyncIterator[int]:
    """A TLS server on a free loopback port."""
    server = grpc.aio.server(options=channel.server_options())
    membership_pb2_grpc.add_MembershipServicer_to_server(Servicer(), server)
    port = server.add_secure_port("127.0.0.1:0", channel.server_credentials(cert_pem, key_pem))
    await server.start()
    try:
        yield port
    finally:
        await server.stop(None)


def test_certificate_is_its_own_ca_for_the_hosts() -> None:
    cert_pem, key_pem = channel.create_server_identity(["example.org", "10.0.0.1", "::1"])
    certificate = x509.load_pem_x509_certificate(cert_pem)
    constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert constraints.ca
    assert names.get_values_for_type(x509.DNSName) == [channel.TLS_NAME, "example.org"]
    assert len(names.get_values_for_type(x509.IPAddress)) == 2
    lifetime = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    assert lifetime.days > 3600
    assert b"PRIVATE KEY" in key_pem and b"PRIVATE KEY" not in cert_pem


def test_pinned_channel_talks_to_the_right_server_and_to_no_other() -> None:
    async def scenario() -> None:
        cert_pem, key_pem = channel.create_server_identity(["localhost"])
        other_pem, _ = channel.create_server_identity(["localhost"])
        fingerprint = channel.ca_fingerprint(cert_pem)
        async with running_server(cert_pem, key_pem) as port:
            fetched = await asyncio.to_thread(
                channel.fetch_pinned_ca, "127.0.0.1", port, fingerprint, timeout_seconds=5.0
            )
            assert channel.ca_fingerprint(fetched) == fingerprint
            async with channel.open_aio_channel(f"127.0.0.1:{port}", fetched) as link:
                stub = membership_pb2_grpc.MembershipStub(link)
                answer = await stub.Challenge(membership_pb2.ChallengeRequest(), timeout=5.0)
                assert answer.nonce == b"n" * 32
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await stub.Leave(membership_pb2.LeaveRequest(), timeout=5.0)
                error = channel.error_from_rpc(refused.value)
                assert type(error) is RefusedError
                assert (error.code, error.found, error.allowed) == (
                    ErrorCode.PEER_EVICTED,
                    "found",
                    "allowed \u00e9",
                )
            with pytest.raises(RefusedError, match="not the expected one") as mismatch:
                await asyncio.to_thread(
                    channel.fetch_pinned_ca,
                    "127.0.0.1",
                    port,
                    channel.ca_fingerprint(other_pem),
                    timeout_seconds=5.0,
                )
            assert mismatch.value.code is ErrorCode.CA_MISMATCH
            async with channel.open_aio_channel(f"127.0.0.1:{port}", other_pem) as link:
                stub = membership_pb2_grpc.MembershipStub(link)
                with pytest.raises(grpc.aio.AioRpcError) as failed:
                    await stub.Challenge(membership_pb2.ChallengeRequest(), timeout=5.0)
                assert isinstance(channel.error_from_rpc(failed.value), UnavailableError)

    asyncio.run(scenario())


def test_a_taken_port_is_an_error() -> None:
    async def scenario() -> None:
        cert_pem, key_pem = channel.create_server_identity([])
        async with running_server(cert_pem, key_pem) as port:
            second = grpc.aio.server(options=channel.server_options())
            with pytest.raises(RuntimeError):
                second.add_secure_port(
                    f"127.0.0.1:{port}", channel.server_credentials(cert_pem, key_pem)
                )

    asyncio.run(scenario())


def test_nobody_there_and_a_server_without_tls_are_unavailable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(UnavailableError, match=f"127.0.0.1:{port}"):
            channel.fetch_pinned_ca("127.0.0.1", port, "0" * 64, timeout_seconds=0.2)
    with pytest.raises(UnavailableError):
        channel.fetch_pinned_ca("127.0.0.1", port, "0" * 64, timeout_seconds=0.2)


@pytest.mark.parametrize(
    ("status", "details"),
    [
        (grpc.StatusCode.DEADLINE_EXCEEDED, "too late"),
        (grpc.StatusCode.INTERNAL, "Internal error from Core"),
    ],
)
def test_error_without_our_metadata_keeps_the_status(status: grpc.StatusCode, details: str) -> None:
    error = grpc.aio.AioRpcError(status, grpc.aio.Metadata(), grpc.aio.Metadata(), details=details)
    found = channel.error_from_rpc(error)
    assert isinstance(found, UnavailableError) and isinstance(found, MusterError)
    assert details in str(found)
    assert found.code is ErrorCode.COORDINATOR_UNREACHABLE
