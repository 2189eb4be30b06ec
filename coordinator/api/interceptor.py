"""What happens around every call: rate limit, authentication, latency, and the border where errors
become statuses.

This is the API's broad-exception border: a MusterError goes to the caller with its code; anything
else is a bug, is logged with its traceback here and reaches the caller as INTERNAL without details.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

from coordinator.api.auth import CALLER, Authenticator
from coordinator.api.errors import abort, status_of
from coordinator.api.rate_limit import RateLimiter
from protos.contract.channel import (
    METADATA_PEER,
    STREAM_DEADLINE_SECONDS,
    UNAUTHENTICATED_METHODS,
    transfer_deadline_seconds,
)
from protos.contract.errors import ErrorCode, MusterError, RefusedError, UnavailableError
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
        self._handler_by_method: dict[str, grpc.RpcMethodHandler] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        """Wrap the handler, once per method; None (unknown method) stays None."""
        method = details.method
        known = self._handler_by_method.get(method)
        if known is not None:
            return known
        handler = await continuation(details)
        if handler is None:
            return None
        wrapped = self._handler_by_method[method] = self._wrap(method, handler)
        return wrapped

    def _wrap(self, method: str, handler: grpc.RpcMethodHandler) -> grpc.RpcMethodHandler:
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                self._wrap_stream(method, handler.unary_stream),
                handler.request_deserializer,
                handler.response_serializer,
            )
        wrap = self._wrap_unary(method, handler.stream_unary or handler.unary_unary)
        make = (
            grpc.stream_unary_rpc_method_handler
            if handler.request_streaming
            else grpc.unary_unary_rpc_method_handler
        )
        return make(wrap, handler.request_deserializer, handler.response_serializer)

    def _wrap_unary(
        self, method: str, inner: Callable[[Any, Any], Awaitable[Any]]
    ) -> Callable[[Any, Any], Awaitable[Any]]:
        name = method.rpartition("/")[2]

        async def call(request: Any, context: Any) -> Any:
            begin_seconds, outcome = time.perf_counter(), ["OK"]
            try:
                await self._admit(method, context)
                return await inner(request, context)
            except (Exception, asyncio.CancelledError) as error:
                await self._refuse(method, context, error, outcome)
            finally:
                self._observe_call(name, outcome[0], time.perf_counter() - begin_seconds)

        return call

    def _wrap_stream(
        self, method: str, inner: Callable[[Any, Any], AsyncIterator[Any]]
    ) -> Callable[[Any, Any], AsyncIterator[Any]]:
        name = method.rpartition("/")[2]

        async def call(request: Any, context: Any) -> AsyncIterator[Any]:
            begin_seconds, outcome = time.perf_counter(), ["OK"]
            try:
                await self._admit(method, context)
                async with asyncio.timeout(STREAM_DEADLINE_SECONDS) as deadline:
                    begin_loop_seconds = asyncio.get_running_loop().time()
                    async for part in inner(request, context):
                        if part.total_bytes:  # in the first one
                            seconds = transfer_deadline_seconds(part.total_bytes)
                            deadline.reschedule(begin_loop_seconds + seconds)
                        yield part
            except (Exception, asyncio.CancelledError) as error:
                await self._refuse(method, context, error, outcome)
            finally:
                self._observe_call(name, outcome[0], time.perf_counter() - begin_seconds)

        return call

    async def _admit(self, method: str, context: Any) -> None:
        now_monotonic_seconds = time.monotonic()
        metadata = {
            key: value
            for key, value in (context.invocation_metadata() or ())
            if isinstance(value, str)
        }
        peer_id = metadata.get(METADATA_PEER, "")
        is_stranger = method in UNAUTHENTICATED_METHODS or not self._authenticator.knows(peer_id)
        if is_stranger:  # before the store is asked for its session
            self._stranger_limiter.take(
                _address_of(context), now_monotonic_seconds=now_monotonic_seconds
            )
        try:
            caller = await self._authenticator.authenticate(method, metadata)
        except RefusedError:
            if not is_stranger:
                self._stranger_limiter.take(
                    _address_of(context), now_monotonic_seconds=now_monotonic_seconds
                )
            raise
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
                f"{method} took longer than a transfer may",
                allowed=f"{STREAM_DEADLINE_SECONDS:.0f} s, and more for a large file",
                remedy="try again over a faster connection",
                code=ErrorCode.NOT_READY,
            )
        if not isinstance(error, MusterError):
            _LOGGER.error("%s failed: %s=%s", method, LogField.REASON, error, exc_info=error)
            error = MusterError("the coordinator failed at this call", remedy="see its log")
        outcome[0] = status_of(error).name
        await abort(context, error)


def _address_of(context: Any) -> str:
    """Who is at the other end, without the port."""
    return str(context.peer()).rpartition(":")[0]
