"""How servicers run operations: on the writer thread for what changes something, in a worker thread
for what only reads.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

from google.protobuf.message import Message

from coordinator.api.auth import CALLER, Caller
from coordinator.api.wire import MAX_REQUEST_ID_CHARACTERS, checked_length
from coordinator.operations.common import OperationContext, answer_once
from coordinator.operations.writer import Operation, Writer
from coordinator.store.base import Transaction

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


def caller() -> Caller:
    """Who makes the call that is being served."""
    return CALLER.get()


class _Landing:
    """Where the writer thread's results reach the event loop: one wake-up for all that a group
    commit resolves.

    `asyncio.wrap_future` wakes the loop once per future, which costs a system call each.
    """

    def __init__(self) -> None:
        self._landed: deque[tuple[asyncio.Future[Any], Future[Any]]] = deque()
        self._is_woken = False

    async def result_of(self, future: Future[_Response]) -> _Response:
        """Wait for a future of another thread; cancelling the wait cancels what has not begun."""
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[_Response] = loop.create_future()
        future.add_done_callback(partial(self._land, loop, waiter))
        try:
            return await waiter
        except asyncio.CancelledError:
            future.cancel()
            raise

    def _land(
        self, loop: asyncio.AbstractEventLoop, waiter: asyncio.Future[Any], future: Future[Any]
    ) -> None:
        """In the writer thread. `_deliver` lowers the flag before it looks, so nothing is left
        behind.
        """
        self._landed.append((waiter, future))
        if not self._is_woken and not loop.is_closed():
            self._is_woken = True
            loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._is_woken = False
        while self._landed:
            waiter, future = self._landed.popleft()
            if waiter.done():
                continue
            error = future.exception()
            if error is None:
                waiter.set_result(future.result())
            else:
                waiter.set_exception(error)


class Calls:
    """Bridge from the server's event loop to the writer."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._landing = _Landing()

    async def change(
        self, operation: Operation[_Request, _Response], request: _Request
    ) -> _Response:
        """Run an operation; its changes are durable when this returns. Raises what it raises."""
        return await self._landing.result_of(self._writer.submit(operation, request))

    async def read(self, operation: Operation[_Request, _Response], request: _Request) -> _Response:
        """Run an operation that only reads, beside the writer."""
        return await asyncio.to_thread(self._writer.read, operation, request)

    async def change_once(
        self,
        operation: Operation[_Request, _Response],
        request: _Request,
        *,
        request_id: str,
        method: str,
        serialise: Callable[[_Response], bytes],
    ) -> bytes:
        """Like `change`, but a repeated request id of a caller gets the first answer again."""
        checked_length(request_id, name="request_id", most=MAX_REQUEST_ID_CHARACTERS)
        name = f"{caller().run_id}/{caller().peer_id}"

        def run(
            tx: Transaction,
            request: _Request,
            /,
            *,
            context: OperationContext,
            now_unix_seconds: float,
        ) -> bytes:
            def respond() -> bytes:
                return serialise(
                    operation(tx, request, context=context, now_unix_seconds=now_unix_seconds)
                )

            return answer_once(
                tx,
                caller=name,
                request_id=request_id,
                method=method,
                request=request,
                now_unix_seconds=now_unix_seconds,
                respond=respond,
                encode=bytes,
                decode=bytes,
            )

        return await self._landing.result_of(self._writer.submit(run, request))


def serialise_with(to_wire: Callable[[Any], Message]) -> Callable[[Any], bytes]:
    """A serialiser for `change_once` from a converter to messages."""
    return lambda response: to_wire(response).SerializeToString()
