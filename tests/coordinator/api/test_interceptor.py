"""How long a stream of the coordinator may take."""

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from coordinator.api import interceptor
from coordinator.api.auth import Caller
from coordinator.api.interceptor import BorderInterceptor
from coordinator.api.rate_limit import RateLimiter
from protos.contract import channel
from protos.muster.v1 import duties_pb2

Response = duties_pb2.FetchCheckpointResponse


class Admission:
    """Knows everybody."""

    def knows(self, peer_id: str) -> bool:
        return True

    async def authenticate(self, method: str, metadata: Any) -> Caller:
        return Caller(peer_id="anna", run_id="demo")


class Context:
    """One call's context; aborting raises, as gRPC's does."""

    def __init__(self) -> None:
        self.status: grpc.StatusCode | None = None

    def invocation_metadata(self) -> tuple[()]:
        return ()

    async def abort(self, status: grpc.StatusCode, details: str, metadata: Any) -> None:
        self.status = status
        raise grpc.aio.AbortError


async def fetch(total_bytes: int, context: Context) -> list[bytes]:
    """Download through the border from a servicer that pauses for 0.3 s after its header."""

    async def parts(request: Any, _: Any) -> AsyncIterator[Any]:
        yield Response(data=b"a", total_bytes=total_bytes)
        later = asyncio.Event()
        asyncio.get_running_loop().call_later(0.3, later.set)
        await later.wait()
        yield Response(data=b"b")

    async def continuation(_: Any) -> grpc.RpcMethodHandler:
        return grpc.unary_stream_rpc_method_handler(parts)

    limiter = RateLimiter(calls_per_second=10.0, burst_calls=10.0)
    border = BorderInterceptor(
        authenticator=Admission(),  # type: ignore[arg-type]
        member_limiter=limiter,
        stranger_limiter=limiter,
        observe_call=lambda method, status, seconds: None,
    )
    details = SimpleNamespace(method="/muster.v1.Duties/FetchCheckpoint")
    handler = await border.intercept_service(continuation, details)  # type: ignore[arg-type]
    assert handler is not None
    return [part.data async for part in handler.unary_stream(None, context)]


def test_a_download_may_take_as_long_as_its_size_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (channel, interceptor):
        monkeypatch.setattr(module, "STREAM_DEADLINE_SECONDS", 0.1)
    monkeypatch.setattr(channel, "SLOWEST_LINK_BYTES_PER_SECOND", 10.0)
    context = Context()
    assert asyncio.run(fetch(100, context)) == [b"a", b"b"] and context.status is None
    with pytest.raises(grpc.aio.AbortError):
        asyncio.run(fetch(0, context))
    assert context.status is grpc.StatusCode.UNAVAILABLE
