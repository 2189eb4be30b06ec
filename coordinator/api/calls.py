"""How servicers run operations: on the writer thread for what changes something, in a worker thread for what only reads."""

import asyncio
from collections.abc import Callable
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


class Calls:
    """Bridge from the server's event loop to the writer."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer

    async def change(
        self, operation: Operation[_Request, _Response], request: _Request
    ) -> _Response:
        """Run an operation; its changes are durable when this returns. Raises what it raises."""
        return await asyncio.wrap_future(self._writer.submit(operation, request))

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
        """Like `change`, but a repeated request id of the same caller gets the first answer again."""
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

        return await asyncio.wrap_future(self._writer.submit(run, request))


def serialise_with(to_wire: Callable[[Any], Message]) -> Callable[[Any], bytes]:
    """A serialiser for `change_once` from a converter to messages."""
    return lambda response: to_wire(response).SerializeToString()
