"""An answer that comes in the moment in which its call is given up harms no other call."""

import asyncio
from types import SimpleNamespace
from typing import Any

from hivemind.p2p.p2p_daemon_bindings.control import ControlClient
from hivemind.proto import p2pd_pb2

from peer.swarm.open_calls import OpenCalls


def _answer_to(call_id: bytes) -> bytes:
    answer = p2pd_pb2.CallUnaryResponse(response=b"answer")
    frame = p2pd_pb2.PersistentConnectionResponse(callId=call_id, callUnaryResponse=answer)
    data = frame.SerializeToString()
    return bytes([len(data)]) + data


def test_an_answer_to_a_call_just_given_up_does_not_end_the_connection_to_p2pd() -> None:
    """From Python 3.12 on every process that was stopped during a call has this when it wakes up:
    answer and timer are due together, and the timer's cancellation comes before the reading.
    """

    async def scenario() -> None:
        control: Any = ControlClient(Any, _initialized_with_create=True)  # type: ignore[arg-type]
        control._pending_calls = OpenCalls()
        reader = asyncio.StreamReader()
        reading = asyncio.create_task(control._read_from_persistent_conn(reader))
        member: Any = SimpleNamespace(to_bytes=lambda: b"member")

        async def called() -> tuple["asyncio.Task[bytes]", bytes]:
            call = asyncio.create_task(control.call_unary_handler(member, "round", b""))
            await asyncio.sleep(0)
            (call_id,) = control._pending_calls
            return call, call_id.bytes

        call, call_id = await called()
        reader.feed_data(_answer_to(call_id))
        call.cancel()
        await asyncio.wait({call})
        assert call.cancelled() and not reading.done()
        call, call_id = await called()
        reader.feed_data(_answer_to(call_id))
        assert await call == b"answer"
        reader.feed_eof()
        await reading

    asyncio.run(scenario())
