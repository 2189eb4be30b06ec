"""What a call to a member comes to, whatever it answers; p2pd is played."""

import asyncio
from typing import Any

import pytest
from google.protobuf.message import Message
from hivemind.p2p import PeerID

from peer.swarm.transport import PeerCallError, Transport
from protos.muster.v1 import rounds_pb2

OWN, OTHER = (PeerID(b"\x12\x20" + bytes([i]) * 32) for i in (1, 200))


class _P2pd:
    """Brings the same bytes as the answer to every call; nobody has to be dialled."""

    def __init__(self, answer: bytes) -> None:
        self.peer_id, self._client, self._answer = OWN, self, answer

    async def call_protobuf_handler(
        self, identity: PeerID, name: str, message: Message, answer_type: type[Message]
    ) -> Message:
        return answer_type.FromString(self._answer)


def _call(answer: bytes) -> rounds_pb2.RoundAck:
    async def call() -> rounds_pb2.RoundAck:
        p2pd: Any = _P2pd(answer)
        transport = Transport(p2pd, prefix="test", upload_limit_mbit=None)
        transport.set_members({"b": OTHER.to_base58()})
        return await transport.call("b", "round", rounds_pb2.RoundMessage(), rounds_pb2.RoundAck)

    return asyncio.run(call())


def test_an_answer_that_is_none_is_the_members_failure_not_ours() -> None:
    """Anything else than PeerCallError would end the process of whoever calls it."""
    assert _call(rounds_pb2.RoundAck(outer_step=7).SerializeToString()).outer_step == 7
    with pytest.raises(PeerCallError, match="refused") as found:
        _call(b"\xff")
    assert not found.value.is_down
