"""What a call to a member comes to, whatever it answers; p2pd is played."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from google.protobuf.message import Message
from hivemind.p2p import PeerID

from peer.swarm.transport import PeerCallError, Transport
from protos.muster.v1 import rounds_pb2
from tests.peer.swarm.p2p_hosts import introduce, start_host

OWN, OTHER = (PeerID(b"\x12\x20" + bytes([i]) * 32) for i in (1, 200))


class _P2pd:
    """Brings the same bytes as the answer to every call; nobody has to be dialled."""

    def __init__(self, answer: bytes) -> None:
        self.peer_id, self._client, self._answer = OWN, self, answer

    async def call_protobuf_handler(
        self, identity: PeerID, name: str, message: Message, answer_type: type[Message]
    ) -> Message:
        return answer_type.FromString(self._answer)


def _call(answer: bytes, *, num_digests: int = 0) -> rounds_pb2.RoundAck:
    async def call() -> rounds_pb2.RoundAck:
        p2pd: Any = _P2pd(answer)
        transport = Transport(p2pd, prefix="test", upload_limit_mbit=None)
        transport.set_members({"b": OTHER.to_base58()})
        message = _message(num_digests)
        return await transport.call("b", "round", message, rounds_pb2.RoundAck)

    return asyncio.run(call())


def _message(num_digests: int) -> rounds_pb2.RoundMessage:
    join = rounds_pb2.JoinGroup(piece_digests=[bytes(32)] * num_digests)
    return rounds_pb2.RoundMessage(join_group=join)


def test_an_answer_that_is_none_is_the_members_failure_not_ours() -> None:
    """Anything else than PeerCallError would end the process of whoever calls it."""
    assert _call(rounds_pb2.RoundAck(outer_step=7).SerializeToString()).outer_step == 7
    with pytest.raises(PeerCallError, match="refused") as found:
        _call(b"\xff")
    assert not found.value.is_down


def test_a_message_that_is_too_large_says_nothing_of_whom_it_is_for() -> None:
    with pytest.raises(PeerCallError, match="at most 33554432 can be sent") as found:
        _call(b"", num_digests=1_000_000)
    assert not found.value.is_down


def test_a_member_has_only_so_many_streams_open() -> None:
    """Each holds a descriptor and what it serves, as long as the member likes."""

    async def body() -> None:
        p2pd: Any = _P2pd(b"")
        transport = Transport(p2pd, prefix="test", upload_limit_mbit=None)
        end, begun, closed = asyncio.Event(), [], []
        nothing: Any = SimpleNamespace(close=lambda: closed.append(True))

        async def stay(peer_id: str, stream: Any) -> None:
            begun.append(peer_id)
            await end.wait()

        def open_one(peer_id: str) -> asyncio.Task[None]:
            handling = transport.handle_stream(
                peer_id, "averaged", stay, nothing, nothing, most_streams=2
            )
            return asyncio.create_task(handling)

        tasks = [open_one(peer_id) for peer_id in "aaaaab"]
        await asyncio.sleep(0)
        assert begun == ["a", "a", "b"]
        await asyncio.sleep(0)
        assert len(closed) == 3
        end.set()
        await asyncio.gather(*tasks)
        again = open_one("a")
        await again
        assert begun == ["a", "a", "b", "a"]

    asyncio.run(body())


@pytest.mark.slow
def test_a_group_of_many_members_with_large_contributions_arrives(tmp_path: Path) -> None:
    """20 MB; p2pd and its client would take 4 MiB if nobody told them."""
    message = _message(600_000)

    async def scenario() -> None:
        hosts = {name: await start_host(tmp_path / name) for name in "ab"}
        await introduce(hosts)

        async def size(peer_id: str, found: Message) -> Message:
            return rounds_pb2.RoundAck(outer_step=found.ByteSize())

        await hosts["b"].serve_messages("round", size, rounds_pb2.RoundMessage)
        ack = await hosts["a"].call(
            "b", "round", message, rounds_pb2.RoundAck, timeout_seconds=60.0
        )
        assert ack.outer_step == message.ByteSize()
        for host in hosts.values():
            await host.close()

    asyncio.run(scenario())
