"""Lanes between two real transports on loopback: the same bytes, the way back to libp2p, strangers,
and the death of a lane.
"""

import asyncio
import os
import select
import socket
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from peer.swarm import lanes as lanes_module
from peer.swarm.address_book import AddressSource
from peer.swarm.bulk_stream import BulkStream, StreamError
from peer.swarm.lane_frames import HELLO_BYTES
from peer.swarm.lane_stream import Bundle, LaneStream
from peer.swarm.lanes import _pause_seconds, num_lanes_for
from peer.swarm.transport import Stream, Transport
from protos.muster.v1 import state_pb2
from tests.peer.swarm.p2p_hosts import introduce, start_host

NUM_BYTES = 3_000_001


class Pair:
    """Two members; b sends back what a sends it."""

    def __init__(self, first: Transport, second: Transport) -> None:
        self.first, self.second = first, second
        self.kinds: list[type] = []
        """Of the streams, as b has them."""
        self.served: list[BulkStream] = []
        self.may_close = asyncio.Event()
        """Unset: b does not say that it is done with a stream."""
        self.may_close.set()

    async def answer(self, sender: str, stream: Stream) -> None:
        await stream.read_bytes(3)
        bulk = await stream.detach()
        self.kinds.append(type(bulk))
        self.served.append(bulk)

        def echo() -> None:
            bulk.send(bulk.read_bytes(NUM_BYTES))
            bulk.wait_acknowledged()

        await asyncio.to_thread(echo)
        await self.may_close.wait()
        bulk.close()

    async def open(self) -> BulkStream:
        stream = await self.first.open_stream("b", "echo")
        await stream.send_bytes(b"abc")
        return await stream.detach()

    async def echo(self) -> type:
        """One stream there and back; what kind it was on both sides."""
        bulk = await self.open()
        await self.use(bulk)
        assert self.kinds[-1] is type(bulk)
        return type(bulk)

    async def use(self, bulk: BulkStream) -> None:
        """Send something and have it back."""
        data = os.urandom(NUM_BYTES)

        def exchange() -> bytearray:
            bulk.send(data)
            found = bulk.read_bytes(NUM_BYTES)
            bulk.acknowledge()
            bulk.linger()
            return found

        assert await asyncio.to_thread(exchange) == data

    async def made(self) -> None:
        """Wait until a's lanes to b are made, or given up."""
        making = self.first.lanes._ways["b"].making
        assert making is not None
        await asyncio.wait_for(making, 20.0)

    async def on_lanes(self) -> None:
        assert await self.echo() is BulkStream, "the first stream goes before there are lanes"
        await self.made()
        way = self.first.ways()["b"]
        assert way.num_lanes >= 2 and way.rtt_seconds > 0.0 and not way.reason

    async def on_lanes_again(self) -> None:
        """Without lanes libp2p goes on, and new ones are made meanwhile."""
        assert await self.echo() is BulkStream
        await self.made()
        assert await self.echo() is LaneStream


def _with_pair(folder: Path, body: Callable[[Pair], Awaitable[None]]) -> None:
    async def run() -> None:
        hosts = [start_host(folder / name, lanes_from_seconds=0.0) for name in "ab"]
        first, second = await asyncio.gather(*hosts)
        pair = Pair(first, second)
        try:
            await introduce({"a": first, "b": second})
            await second.serve_streams("echo", pair.answer)
            await body(pair)
        finally:
            await asyncio.gather(first.close(), second.close())

    asyncio.run(run())


def test_one_stream_after_another_over_the_same_lanes(tmp_path: Path) -> None:
    async def body(pair: Pair) -> None:
        await pair.on_lanes()
        bundle = pair.first.lanes._ways["b"].own
        before = pair.second.moved_by_peer()["a"]
        for _ in range(3):
            assert await pair.echo() is LaneStream
        assert pair.first.lanes._ways["b"].own is bundle
        sent, received = pair.second.moved_by_peer()["a"]
        assert received - before[1] >= 3 * NUM_BYTES and sent - before[0] >= 3 * NUM_BYTES
        pair.first.set_members({})
        assert bundle is not None and not bundle.is_alive(), "keys end with membership"

    _with_pair(tmp_path, body)


def test_a_stream_waits_for_lanes_whose_last_stream_is_just_ending(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounds that follow one another do not fall back to libp2p every other time; a stream beside
    one that is in use does not wait.
    """
    monkeypatch.setattr(lanes_module, "_LOOKS", 1000)

    async def body(pair: Pair) -> None:
        await pair.on_lanes()
        lanes, has_asked = pair.first.lanes, asyncio.Event()
        lend = lanes.lend

        async def lend_and_tell(peer_id: str) -> Bundle | None:
            has_asked.set()
            return await lend(peer_id)

        pair.may_close.clear()
        first = await pair.open()
        beside = await pair.open()
        assert (type(first), type(beside)) == (LaneStream, BulkStream)
        lanes.lend = lend_and_tell  # type: ignore[method-assign]
        ending = asyncio.ensure_future(pair.use(first))
        while not first._bundle.is_ending:  # type: ignore[attr-defined]
            await asyncio.sleep(0)
        opening = asyncio.ensure_future(pair.open())
        await has_asked.wait()
        pair.may_close.set()
        await ending
        second = await opening
        assert type(second) is LaneStream
        await pair.use(second)
        await pair.use(beside)

    _with_pair(tmp_path, body)


def test_a_lane_that_dies_ends_the_stream_at_once_and_libp2p_goes_on(tmp_path: Path) -> None:
    async def body(pair: Pair) -> None:
        await pair.on_lanes()
        bulk = await pair.open()
        assert isinstance(bulk, LaneStream)
        await asyncio.to_thread(bulk.send, bytes(NUM_BYTES // 2))
        begin_seconds = time.monotonic()
        bulk._bundle._lanes[1].socket.shutdown(socket.SHUT_RDWR)
        with pytest.raises(StreamError, match="a lane has ended"):
            await asyncio.to_thread(bulk.read_bytes, 1)
        bulk.close()
        assert time.monotonic() - begin_seconds < 5.0, "well before any deadline"
        await pair.on_lanes_again()

    _with_pair(tmp_path, body)


def test_lanes_that_died_idle_are_found_out_before_use(tmp_path: Path) -> None:
    async def body(pair: Pair) -> None:
        await pair.on_lanes()
        bundle = next(iter(pair.second.lanes._ways["a"].others.values()))
        bundle.close()
        own = pair.first.lanes._ways["b"].own
        assert own is not None
        lane = own._lanes[0].socket
        assert (await asyncio.to_thread(select.select, [lane], [], [], 5.0))[0], "its end comes"
        await pair.on_lanes_again()

    _with_pair(tmp_path, body)


def test_whoever_can_be_dialled_is(tmp_path: Path) -> None:
    """b does not listen, so it dials a; then neither listens, and the pair stays on libp2p."""

    async def body(pair: Pair) -> None:
        pair.second.lanes._listen = lambda: 0  # type: ignore[method-assign]
        await pair.on_lanes()
        assert await pair.echo() is LaneStream
        bundle = pair.first.lanes._ways["b"].own
        assert bundle is not None
        bundle.close()
        pair.first.lanes._listen = lambda: 0  # type: ignore[method-assign]
        assert await pair.echo() is BulkStream
        await pair.made()
        assert await pair.echo() is BulkStream
        await pair.made()
        assert pair.first.lanes._ways["b"].not_before_seconds > time.monotonic()
        way = pair.first.ways()["b"]
        assert way.num_lanes == 0 and "no port here" in way.reason
        assert await pair.echo() is BulkStream

    _with_pair(tmp_path, body)


def test_a_stranger_at_the_port_hears_nothing_and_blocks_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes_module, "HANDSHAKE_SECONDS", 1.0)

    async def body(pair: Pair) -> None:
        port = pair.second.lanes._listen()
        loop = asyncio.get_running_loop()
        strangers = [socket.create_connection(("127.0.0.1", port)) for _ in range(100)]
        for stranger in strangers:
            stranger.setblocking(False)
        strangers[-1].send(os.urandom(HELLO_BYTES))
        await pair.on_lanes()  # they are there all the while
        assert len(pair.second.lanes._half_open) <= lanes_module._MOST_HALF_OPEN_OF_HOST
        heard = [loop.sock_recv(stranger, 1) for stranger in strangers]
        found = await asyncio.wait_for(asyncio.gather(*heard, return_exceptions=True), 5.0)
        assert all(data == b"" or isinstance(data, ConnectionError) for data in found), found
        assert await pair.echo() is LaneStream
        for stranger in strangers:
            stranger.close()

    _with_pair(tmp_path, body)


def test_only_hosts_that_a_member_is_connected_from_are_dialled_for_it(tmp_path: Path) -> None:
    """a is connected from 127.0.0.1, and says that it is at 127.0.0.2 as well."""

    async def body(pair: Pair) -> None:
        victim = socket.create_server(("127.0.0.2", 0))
        victim.setblocking(False)
        port = victim.getsockname()[1]
        await pair.on_lanes()  # libp2p has made its own connections, at addresses of its own
        said = [f"/ip4/127.0.0.2/tcp/{port}"]
        pair.second.add_addresses("a", said)
        pair.first.add_addresses("b", said, source=AddressSource.PRESENCE)
        assert await pair.first._hosts_of("b") == ["127.0.0.1"]
        assert await pair.second._hosts_of("a") == ["127.0.0.1"]
        lanes = pair.second.lanes

        def ask(port: int) -> state_pb2.LaneAsk:
            return state_pb2.LaneAsk(
                bundle_id=os.urandom(16), secret=os.urandom(32), num_lanes=4, port=port
            )

        answers = [await lanes.on_ask("a", ask(port)) for _ in range(5)]
        assert not any(answer.is_connected for answer in answers)
        assert ["in vain" in answer.reason for answer in answers] == [False] * 2 + [True] * 3
        assert "bad request" in (await lanes.on_ask("a", ask(22))).reason
        with pytest.raises(BlockingIOError):
            victim.accept()
        victim.close()

    _with_pair(tmp_path, body)


def test_a_member_has_one_stream_over_a_bundle_and_few_bundles_to_come(tmp_path: Path) -> None:
    async def body(pair: Pair) -> None:
        await pair.on_lanes()
        lanes = pair.second.lanes
        ((bundle_id, bundle),) = lanes._ways["a"].others.items()
        assert await lanes.lent_by("a", bundle_id) is bundle
        assert await lanes.lent_by("a", bundle_id) is None, "it is in use"
        lanes.give_back("a", bundle, is_own=False, is_clean=True)
        assert await lanes.lent_by("a", bundle_id) is bundle
        asks = [
            state_pb2.LaneAsk(bundle_id=os.urandom(16), secret=os.urandom(32), num_lanes=4)
            for _ in range(20)
        ]
        answers = [await lanes.on_ask("a", ask) for ask in asks]
        assert [bool(answer.port) for answer in answers] == [True] * 2 + [False] * 18
        assert "at once" in answers[-1].reason
        asks[0].port = 70_000
        assert "bad request" in (await lanes.on_ask("a", asks[0])).reason

    _with_pair(tmp_path, body)


def test_lanes_of_a_stream_that_cannot_be_agreed_on_come_back(tmp_path: Path) -> None:
    async def body(pair: Pair) -> None:
        await pair.on_lanes()
        stream = await pair.first.open_stream("b", "echo")
        stream.close()
        with pytest.raises(StreamError):
            await stream.detach()
        way = pair.first.lanes._ways["b"]
        assert way.lent is None and way.own is None
        await pair.on_lanes_again()

    _with_pair(tmp_path, body)


def test_farther_members_get_more_lanes() -> None:
    assert [num_lanes_for(rtt) for rtt in (0.02, 0.1, 0.16, 0.5)] == [2, 2, 3, 4]


def test_pauses_between_tries_are_bounded_after_any_number_of_failures() -> None:
    pauses = [_pause_seconds(num) for num in (0, 1, 2, 6, 7, 1024, 10**9)]
    assert pauses == [0.0, 10.0, 30.0, 600.0, 600.0, 600.0, 600.0]
