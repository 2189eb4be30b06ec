"""Dialling back: a real p2pd is recognised by its identity, everybody else is told from it, and the
roster follows what was found.
"""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization

from coordinator.dial_back.dialler import Dialler, dial
from coordinator.dial_back.hello import is_loopback, tcp_endpoint
from coordinator.operations.reachability import DialTask
from coordinator.operations.requests_admin import EventsRequest
from coordinator.operations.status import events
from coordinator.operations.writer import Writer
from protos.contract.ids import p2p_peer_id_from_public_key
from tests.coordinator.operations.swarm_world import (
    CAPABILITIES,
    RUN_ID,
    SwarmWorld,
    p2p_public_key_of,
    rsa_key,
)

needs_hivemind = pytest.mark.skipif(find_spec("hivemind") is None, reason="needs the [peer] extra")
OWN_ID = p2p_peer_id_from_public_key(p2p_public_key_of(rsa_key(0)))
OTHER_ID = p2p_peer_id_from_public_key(p2p_public_key_of(rsa_key(1)))


@asynccontextmanager
async def listening(home: Path) -> AsyncIterator[tuple[str, ...]]:
    """p2pd with the libp2p key of peer 0; yields its addresses."""
    from peer.swarm.transport import Transport  # late: hivemind takes seconds to import

    private = rsa_key(0).private_bytes(
        serialization.Encoding.DER,
        serialization.PrivateFormat.TraditionalOpenSSL,
        serialization.NoEncryption(),
    )
    length = bytes([len(private) & 0x7F | 0x80, len(private) >> 7])
    (home / "p2p.key").write_bytes(b"\x08\x00\x12" + length + private)
    transport = await Transport.create(
        home=home, identity_path=home / "p2p.key", prefix="x", host="127.0.0.1", listen_port=0
    )
    try:
        yield tuple(await transport.addresses())
    finally:
        await transport.close()


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def task_at(*addresses: str, identity: str = OWN_ID) -> DialTask:
    return DialTask(RUN_ID, SwarmWorld.id_of(0), identity, addresses)


@pytest.mark.slow
@needs_hivemind
def test_only_the_member_itself_counts_and_the_roster_follows(tmp_path: Path) -> None:
    async def scenario() -> None:
        dead = f"/ip4/127.0.0.1/tcp/{closed_port()}"
        async with listening(tmp_path) as addresses:
            assert await dial(task_at(*addresses)) == ""
            assert await dial(task_at(dead, *addresses)) == ""
            found = await dial(task_at(*addresses, identity=OTHER_ID))
            assert found is not None and "somebody else listens there" in found
            await check_roster(addresses, dead)
        gone = await dial(task_at(*addresses))
        assert gone is not None and "refused" in gone.lower()

    asyncio.run(scenario())


async def check_roster(addresses: tuple[str, ...], dead: str) -> None:
    """Peer 0 answers, peer 1 does not; then peer 0 goes as well."""
    world = SwarmWorld.create()
    world.join(0, capabilities=replace(CAPABILITIES, addresses=addresses))
    world.join(1, capabilities=replace(CAPABILITIES, addresses=(dead,)))
    world.attest()
    world.tick(1.0)
    assert reducers(world) == {0, 1}
    writer = Writer(world.store, context=world.context, clock=lambda: world.now).start()
    dialler = Dialler(writer)
    try:
        await dialler.dial_due(0.0)
        world.tick(20.0)
        assert reducers(world) == {0, 1}, "one failure may be a moment's trouble"
        await dialler.dial_due(5.0)
        world.tick(20.0)
        assert reducers(world) == {0}
        assert "cannot be dialled and reduces nothing" in world.directive().reason
        assert world.status().reach_warning == ""
        world.join(1, capabilities=replace(CAPABILITIES, addresses=(dead,)))
        assert world.row(1).capabilities_json.count("refused") == 1, "a rejoin does not forget"
        world.join(0, capabilities=replace(CAPABILITIES, addresses=(dead,)))
        world.attest()
        for seconds in (10.0, 15.0):
            await dialler.dial_due(seconds)
        world.tick(20.0)
        assert reducers(world) == set()
        assert "none of the 2 live peers can be dialled" in world.status().reach_warning
        assert "--announce" in world.status().reach_warning
        world.join(
            1, capabilities=replace(CAPABILITIES, addresses=("/ip4/127.0.0.1/udp/4001/quic",))
        )
        world.attest()
        await dialler.dial_due(20.0)
        assert world.status().reach_warning == "", "what is not dialled from here is not accused"
    finally:
        writer.stop()
    with world.store.read() as tx:
        request = EventsRequest(run_id=RUN_ID, max_events=1000)
        told = events(tx, request, context=world.context, now_unix_seconds=world.now).events
    assert any(e.kind == "reach" and "peer 1 cannot be dialled" in e.text for e in told)


def reducers(world: SwarmWorld) -> set[int]:
    able = {e.peer_id for e in world.directive().roster if e.can_accept_connections}
    return {index for index in range(2) if SwarmWorld.id_of(index) in able}


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        (b"", "no answer within"),
        (b"HTTP/1.1 400 Bad Request\r\n" + bytes(80), "no libp2p listener"),
        (b"\x13/multistream/1.0.0\n\x03na\n", "no libp2p listener"),
        (b"\x13/multistream/1.0.0\n\x07/noise\n\x00\x05abcde", "handshake has 5 bytes"),
        (
            b"\x13/multistream/1.0.0\n\x07/noise\n\x00\xc8" + bytes(range(200)),
            "does not decrypt",
        ),
    ],
)
def test_others_are_told_from_a_member(said: bytes, problem: str) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(said)
        await reader.read()
        writer.close()

    async def scenario() -> str | None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        found = await dial(task_at(f"/ip4/127.0.0.1/tcp/{port}"), timeout_seconds=0.5)
        server.close()
        return found

    found = asyncio.run(scenario())
    assert found is not None
    assert problem in found


def test_addresses_that_are_dialled() -> None:
    identity = f"/p2p/{OWN_ID}"
    assert tcp_endpoint("/ip4/192.0.2.7/tcp/4001" + identity) == ("192.0.2.7", 4001)
    assert tcp_endpoint("/dns4/host.example/tcp/1") == ("host.example", 1)
    for other in ("/udp/4001/quic-v1", "/tcp/4001/ws", f"/tcp/4001{identity}/p2p-circuit"):
        assert tcp_endpoint("/ip4/192.0.2.7" + other) is None
    assert is_loopback("/ip4/127.0.0.1/tcp/1") and is_loopback("/ip6/::1/tcp/1")
    assert not is_loopback("/ip4/192.0.2.7/tcp/1")
    relayed = asyncio.run(dial(task_at(f"/ip4/192.0.2.7/tcp/1{identity}/p2p-circuit")))
    assert relayed == "it announces a relay's address only"
