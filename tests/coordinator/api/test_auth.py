"""Who may come in, over a real server and TLS: tokens, keys, MACs, the CA pin, limits."""

import asyncio
import dataclasses
import secrets
import time
from pathlib import Path
from typing import Any

import pytest

from coordinator.api import server
from coordinator.operations.admin import evict_peer
from coordinator.operations.membership import find_session
from coordinator.operations.requests import FindSessionRequest
from coordinator.operations.requests_admin import (
    EvictPeerRequest,
    ListTokensRequest,
    RevokeTokenRequest,
)
from coordinator.operations.tokens import list_tokens, revoke_token
from coordinator.store.base import Transaction
from protos.contract.channel import MAX_MESSAGE_BYTES, fetch_pinned_ca, split_address
from protos.contract.errors import ErrorCode, MusterError, RefusedError, UnavailableError
from protos.muster.v1 import membership_pb2, runs_pb2
from tests.coordinator.loopback import RUN_ID, deployed, open_client


class Clock:
    """Unix seconds that a test moves on."""

    def __init__(self) -> None:
        self.offset_seconds = 0.0

    def __call__(self) -> float:
        return time.time() + self.offset_seconds


def test_tokens(tmp_path: Path) -> None:
    clock = Clock()

    async def scenario() -> None:
        async with deployed(tmp_path, clock=clock) as deployment:
            coordinator = deployment.coordinator
            good = await deployment.token(max_uses=1)
            async with open_client(good, 0) as client:
                joined = await client.join()
                assert joined.peer_id == client.peer_id
                assert joined.dataset_id.hex() == deployment.manifest.dataset_id
                first_key = joined.session_key
                again = await client.join(token_secret=b"")
                assert again.session_key != first_key, "a known key rejoins without its token"
            async with open_client(good, 1) as client:
                assert await refusal(client.join()) is ErrorCode.TOKEN_EXHAUSTED
                wrong = await refusal(client.join(token_secret=secrets.token_bytes(32)))
                assert wrong is ErrorCode.TOKEN_UNKNOWN
                assert await refusal(client.join(run_id="other")) is ErrorCode.UNKNOWN_RUN
                assert (
                    await refusal(client.join(signature=bytes(64))) is ErrorCode.SIGNATURE_INVALID
                )
                assert (
                    await refusal(client.join(p2p_signature=bytes(256)))
                    is ErrorCode.SIGNATURE_INVALID
                )
                assert (
                    await refusal(client.join(protocol_version=99)) is ErrorCode.PROTOCOL_MISMATCH
                )
                assert await refusal(client.join(nonce=bytes(32))) is ErrorCode.SIGNATURE_INVALID
                assert await refusal(client.join(name="x" * 41)) is ErrorCode.TOO_LARGE
            expiring = await deployment.token(expire_after_seconds=60.0)
            revoked = await deployment.token()
            listed = await coordinator.look(list_tokens, ListTokensRequest(run_id=RUN_ID))
            for token in listed.tokens:
                if token.max_uses == 0 and token.expire_unix_seconds == revoked.expire_unix_seconds:
                    await coordinator.perform(
                        revoke_token, RevokeTokenRequest(token_id=token.token_id)
                    )
            clock.offset_seconds = 61.0
            async with open_client(expiring, 1) as client:
                assert await refusal(client.join()) is ErrorCode.TOKEN_EXPIRED
            async with open_client(revoked, 1) as client:
                assert await refusal(client.join()) is ErrorCode.TOKEN_REVOKED

    asyncio.run(scenario())


def test_sessions_and_limits(tmp_path: Path) -> None:
    clock = Clock()

    async def scenario() -> None:
        limits = {"peer_calls_per_second": 10.0, "session_seconds": 600.0}
        async with (
            deployed(tmp_path, clock=clock, **limits) as deployment,
            deployment.client() as client,
        ):
            empty = membership_pb2.HeartbeatRequest()

            async def heartbeat(**changes: object) -> ErrorCode:
                return await refusal(client.call("Membership", "Heartbeat", empty, **changes))

            await client.heartbeat()
            assert await heartbeat(session_key=bytes(32)) is ErrorCode.SESSION_INVALID
            assert await heartbeat(peer_id="0" * 32) is ErrorCode.SESSION_INVALID
            assert (
                await heartbeat(method="/muster.v1.Membership/Leave") is ErrorCode.SESSION_INVALID
            )
            assert await heartbeat(now_unix_seconds=time.time() - 90) is ErrorCode.CLOCK_SKEW
            assert await heartbeat(peer_id="admin") is ErrorCode.SESSION_INVALID
            assert await heartbeat(protocol_version=3) is ErrorCode.PROTOCOL_MISMATCH
            huge = membership_pb2.HeartbeatRequest(request_id="x" * (MAX_MESSAGE_BYTES + 1))
            with pytest.raises(UnavailableError, match="RESOURCE_EXHAUSTED"):
                await client.call("Membership", "Heartbeat", huge)
            many = membership_pb2.HeartbeatRequest(lease_numbers=range(5000))
            assert (
                await refusal(client.call("Membership", "Heartbeat", many)) is ErrorCode.TOO_LARGE
            )
            calls = [client.call("Membership", "Heartbeat", empty) for _ in range(60)]
            codes = set(await asyncio.gather(*map(refusal, calls)))
            assert codes == {ErrorCode.RATE_LIMITED, None}
            clock.offset_seconds = 601.0
            late = {"now_unix_seconds": clock()}
            assert await heartbeat(**late) is ErrorCode.SESSION_INVALID

    asyncio.run(scenario())


def test_strangers_are_limited_before_the_store_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def counted(tx: Transaction, request: FindSessionRequest, /, **keywords: Any) -> Any:
        asked.append(request.peer_id)
        return find_session(tx, request, **keywords)

    monkeypatch.setattr(server, "find_session", counted)

    async def scenario() -> None:
        async with (
            deployed(tmp_path, join_calls_per_second=1.0) as deployment,
            deployment.client() as client,
        ):
            await client.heartbeat()
            empty = membership_pb2.HeartbeatRequest()
            calls = [
                refusal(client.call("Membership", "Heartbeat", empty, peer_id=f"{n:032x}"))
                for n in range(60)
            ]
            codes = [await call for call in calls]
            assert set(codes) == {ErrorCode.SESSION_INVALID, ErrorCode.RATE_LIMITED}
            assert len([name for name in asked if name != client.peer_id]) == codes.count(
                ErrorCode.SESSION_INVALID
            )
            await client.heartbeat()

    asyncio.run(scenario())


def test_eviction_ends_the_session_at_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with deployed(tmp_path) as deployment, deployment.client() as client:
            await client.heartbeat()
            request = EvictPeerRequest(peer_id=client.peer_id, run_id=RUN_ID)
            await deployment.coordinator.perform(evict_peer, request)
            code = await refusal(client.heartbeat())
            assert code in (ErrorCode.PEER_EVICTED, ErrorCode.SESSION_INVALID)
            assert await refusal(client.join()) is ErrorCode.PEER_EVICTED

    asyncio.run(scenario())


def test_wrong_ca_is_noticed(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with deployed(tmp_path) as deployment:
            token = await deployment.token()
            wrong = dataclasses.replace(token, ca_fingerprint="0" * 64)
            with pytest.raises(RefusedError) as caught:
                async with open_client(wrong):
                    pass
            assert caught.value.code is ErrorCode.CA_MISMATCH
            host, port = split_address(token.address)
            fetch_pinned_ca(host, port, token.ca_fingerprint, timeout_seconds=5.0)

    asyncio.run(scenario())


def test_members_may_not_command(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with deployed(tmp_path) as deployment, deployment.client() as client:
            call = client.channel.unary_unary(
                "/muster.v1.Admin/Perform",
                request_serializer=runs_pb2.PerformRequest.SerializeToString,
                response_deserializer=runs_pb2.PerformResponse.FromString,
            )
            with pytest.raises(Exception, match="SESSION_INVALID|admin.key") as caught:
                await call(
                    runs_pb2.PerformRequest(operation="list_runs", arguments_json="{}"),
                    metadata=client.metadata("Admin", "Perform"),
                )
            assert "UNAUTHENTICATED" in str(caught.value)

    asyncio.run(scenario())


async def refusal(awaitable: object) -> ErrorCode | None:
    """Code of the error that the call raises, None if it raises none."""
    try:
        await awaitable  # type: ignore[misc]
    except MusterError as error:
        return error.code
    return None
