"""What happens around every call: rate limit, authentication, latency, and the border where errors become statuses.

This is the API's broad-exception border: a MusterError goes to the caller with its code; anything else is a bug, is logged
with its traceback here and reaches the caller as INTERNAL without details.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from coordinator.api.auth import CALLER, Authenticator
from coordinator.api.errors import abort, status_of
from coordinator.api.rate_limit import RateLimiter
from protos.contract.channel import STREAM_DEADLINE_SECONDS, UNAUTHENTICATED_METHODS
from protos.contract.errors import ErrorCode, MusterError, UnavailableError
from protos.contract.telemetry import LogField

_LOGGER = logging.getLogger(__name__)
ObserveCall = Callable[[str, str, float], None]
"""(method, status, seconds)."""


class BorderInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """The only interceptor; wraps every method that a servicer registered."""

    def __init__(
        self,
        *,
        authenticator: Authenticator,
        member_limiter: RateLimiter,
        stranger_limiter: RateLimiter,
        observe_call: ObserveCall,
    ) -> None:
        self._authenticator = authenticator
        self._member_limiter = member_limiter
        self._stranger_limiter = stranger_limiter
        self._observe_call = observe_call

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        """Wrap the handler; None (unknown method) stays None."""
        handler = await continuation(details)
        if handler is None:
            return None
        method = details.method
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                self._wrap_stream(method, handler.unary_stream),
                handler.request_deserializer,
                handler.response_serializer,
            )
        wrap = self._wrap_unary(
            method, handler.stream_unary or handler.unary_unary, handler.request_streaming
        )
        make = (
            grpc.stream_unary_rpc_method_handler
            if handler.request_streaming
            else grpc.unary_unary_rpc_method_handler
        )
        return make(wrap, handler.request_deserializer, handler.response_serializer)

    def _wrap_unary(
        self, method: str, inner: Callable[[Any, Any], Awaitable[Any]], is_stream: bool
    ) -> Callable[[Any, Any], Awaitable[Any]]:
        limit_seconds = STREAM_DEADLINE_SECONDS if is_stream else None

        async def call(request: Any, context: Any) -> Any:
            with self._measured(method) as outcome:
                try:
                    await self._admit(method, context)
                    async with asyncio.timeout(limit_seconds):
                        return await inner(request, context)
                except (Exception, asyncio.CancelledError) as error:
                    await self._refuse(method, context, error, outcome)

        return call

    def _wrap_stream(
        self, method: str, inner: Callable[[Any, Any], AsyncIterator[Any]]
    ) -> Callable[[Any, Any], AsyncIterator[Any]]:
        async def call(request: Any, context: Any) -> AsyncIterator[Any]:
            with self._measured(method) as outcome:
                try:
                    await self._admit(method, context)
                    async with asyncio.timeout(STREAM_DEADLINE_SECONDS):
                        async for part in inner(request, context):
                            yield part
                except (Exception, asyncio.CancelledError) as error:
                    await self._refuse(method, context, error, outcome)

        return call

    @contextmanager
    def _measured(self, method: str) -> Iterator[list[str]]:
        begin_seconds = time.perf_counter()
        outcome = ["OK"]
        try:
            yield outcome
        finally:
            short_name = method.rpartition("/")[2]
            self._observe_call(short_name, outcome[0], time.perf_counter() - begin_seconds)

    async def _admit(self, method: str, context: Any) -> None:
        now_monotonic_seconds = time.monotonic()
        if method in UNAUTHENTICATED_METHODS:
            address = context.peer().rpartition(":")[0]
            self._stranger_limiter.take(address, now_monotonic_seconds=now_monotonic_seconds)
        metadata = {
            key: value
            for key, value in (context.invocation_metadata() or ())
            if isinstance(value, str)
        }
        caller = await self._authenticator.authenticate(method, metadata)
        if caller.peer_id:
            self._member_limiter.take(caller.peer_id, now_monotonic_seconds=now_monotonic_seconds)
        CALLER.set(caller)

    async def _refuse(
        self, method: str, context: Any, error: BaseException, outcome: list[str]
    ) -> None:
        if isinstance(error, asyncio.CancelledError | grpc.aio.AbortError):
            outcome[0] = "CANCELLED"
            raise error
        if isinstance(error, TimeoutError):
            error = UnavailableError(
                f"{method} took longer than {STREAM_DEADLINE_SECONDS:.0f} s",
                remedy="try again over a faster connection",
                code=ErrorCode.NOT_READY,
            )
        if not isinstance(error, MusterError):
            _LOGGER.error("%s failed: %s=%s", method, LogField.REASON, error, exc_info=error)
            error = MusterError("the coordinator failed at this call", remedy="see its log")
        outcome[0] = status_of(error).name
        await abort(context, error)
