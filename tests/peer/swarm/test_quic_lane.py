"""Two real hosts try TCP and QUIC, use what they chose, and keep strangers out on both ways."""

import asyncio
from pathlib import Path

import pytest

from peer.swarm.quic_lane import LANE_CALL, Routes
from peer.swarm.route_choice import Route
from peer.swarm.transport import PeerCallError, Stream, StreamError, Transport
from protos.muster.v1 import state_pb2
from tests.peer.swarm.swarm_hub import write_p2p_key

ECHO = "echo"


async def _host(folder: Path, name: str) -> tuple[Transport, Routes]:
    home = folder / name
    home.mkdir()
    write_p2p_key(home / "p2p.key")
    transport = await Transport.create(
        home=home,
        identity_path=home / "p2p.key",
        prefix="quic",
        host="127.0.0.1",
        listen_port=0,
    )
    routes = Routes(transport)
    await routes.start()
    await routes.serve_streams(ECHO, _echo)
    return transport, routes


async def _echo(peer_id: str, stream: Stream) -> None:
    data = await stream.read_bytes(4)
    await stream.send_bytes(data + peer_id.encode())


async def _ask(routes: Routes, peer_id: str) -> bytes:
    stream = await routes.open_stream(peer_id, ECHO)
    try:
        await stream.send_bytes(b"data")
        return await stream.read_bytes(5)
    finally:
        stream.close()


async def _story(folder: Path) -> None:
    hosts = {name: await _host(folder, name) for name in "abs"}
    a, b, stranger = (hosts[name] for name in "abs")
    try:
        a[0].set_members({"b": b[0].p2p_peer_id})
        b[0].set_members({"a": a[0].p2p_peer_id})
        stranger[0].set_members({"a": a[0].p2p_peer_id, "b": b[0].p2p_peer_id})
        for transport, _ in hosts.values():
            for name in "ab":
                transport.add_addresses(name, await hosts[name][0].addresses())
        assert await _ask(a[1], "b") == b"dataa"

        moved = {"b": 50_000_000}
        await a[1].after_round(moved, seconds=1.0, rtt_by_peer={"b": 0.1})
        pair = a[1].route_of("b")
        assert "over TCP and" in pair.reason and " 0.0 MB/s" not in pair.reason
        pair.note_probe(tcp_bytes_per_second=1.0, quic_bytes_per_second=2.0)
        assert pair.route is Route.QUIC
        assert await _ask(a[1], "b") == b"dataa"
        assert pair.route is Route.QUIC, "it did not fall back"

        with pytest.raises(PeerCallError, match="not a member"):
            await stranger[0].call("b", LANE_CALL, state_pb2.LaneOffer(), state_pb2.LaneOffer)
        lane = a[1].route_of("b")
        stranger[1].route_of("b").route = lane.route
        with pytest.raises((PeerCallError, StreamError)):
            await _ask(stranger[1], "b")

        await b[1].close()
        assert await _ask(a[1], "b") == b"dataa", "TCP is always there"
        assert pair.route is Route.TCP
    finally:
        for transport, routes in hosts.values():
            await routes.close()
            await transport.close()


@pytest.mark.slow
def test_two_ways_between_two_hosts(tmp_path: Path) -> None:
    asyncio.run(_story(tmp_path))
