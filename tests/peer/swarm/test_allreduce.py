"""The butterfly over real libp2p hosts on loopback: exact, the same bytes everywhere, refusing what
is wrong.
"""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest

from peer.swarm.allreduce import AveragedVector, ReduceError, Reduction, ReductionDesk
from peer.swarm.transport import Transport
from protos.contract.digest import (
    PIECE_VALUES,
    Float32Vector,
    num_pieces,
    vector_piece_digests,
)
from protos.muster.v1 import rounds_pb2
from tests.peer.swarm.swarm_hub import write_p2p_key

NUM_VALUES = 3 * PIECE_VALUES + 1234
PEERS = ("a", "b", "c")
TOKENS = {"a": 100, "b": 300, "c": 0}
"""c has no work: it reduces, and brings nothing."""

Hosts = dict[str, Transport]


async def _start(folder: Path, peer: str) -> Transport:
    home = folder / peer
    home.mkdir()
    write_p2p_key(home / "p2p.key")
    return await Transport.create(
        home=home,
        identity_path=home / "p2p.key",
        prefix="test",
        host="127.0.0.1",
        listen_port=0,
    )


def _with_hosts(folder: Path, body: Callable[[Hosts], Awaitable[None]]) -> None:
    async def run() -> None:
        started = await asyncio.gather(*(_start(folder, peer) for peer in PEERS))
        hosts = dict(zip(PEERS, started, strict=True))
        for peer, host in hosts.items():
            others = {p: h for p, h in hosts.items() if p != peer}
            host.set_members({p: h.p2p_peer_id for p, h in others.items()})
            for other, transport in others.items():
                host.add_addresses(other, await transport.addresses())
        try:
            await body(hosts)
        finally:
            await asyncio.gather(*(host.close() for host in started))

    asyncio.run(run())


def _vector(peer: str) -> Float32Vector:
    values = np.random.default_rng(ord(peer)).standard_normal(NUM_VALUES)
    return values.astype(np.float32)


def _group() -> rounds_pb2.FormGroup:
    pieces = num_pieces(NUM_VALUES)
    members = []
    for peer in PEERS:
        ranges = [rounds_pb2.LeasedRange(end_window=1)] if TOKENS[peer] else []
        digests = vector_piece_digests(_vector(peer)) if TOKENS[peer] else []
        contribution = rounds_pb2.Contribution(peer_id=peer, ranges=ranges)
        members.append(rounds_pb2.JoinGroup(contribution=contribution, piece_digests=digests))
    return rounds_pb2.FormGroup(members=members, reducer_piece_ends=[1, 3, pieces])


async def _average(
    hosts: Hosts, vectors: dict[str, Float32Vector]
) -> dict[str, AveragedVector | BaseException]:
    """Everybody averages; what each of them got."""
    reductions = {}
    for peer, host in hosts.items():
        desk = ReductionDesk(host)
        await desk.start()
        reductions[peer] = Reduction(
            host,
            place=(1, 1, 0),
            group=_group(),
            tokens_by_peer=TOKENS,
            own_peer_id=peer,
            own_vector=vectors[peer],
        )
        desk.open(reductions[peer])
    runs = [asyncio.wait_for(reductions[peer].run(), 20.0) for peer in PEERS]
    results = await asyncio.gather(*runs, return_exceptions=True)
    return dict(zip(PEERS, results, strict=True))


def test_everybody_gets_the_exact_weighted_mean(tmp_path: Path) -> None:
    async def body(hosts: Hosts) -> None:
        results = await _average(hosts, {peer: _vector(peer) for peer in PEERS})
        expected = np.float32(0.25) * _vector("a") + np.float32(0.75) * _vector("b")
        for result in results.values():
            assert isinstance(result, AveragedVector)
            assert np.array_equal(result.vector, expected)
            assert list(result.piece_digests) == vector_piece_digests(expected)

    _with_hosts(tmp_path, body)


@pytest.mark.parametrize("value", [1.5, np.nan])
def test_bytes_that_were_not_committed_to_end_the_attempt(tmp_path: Path, value: float) -> None:
    async def body(hosts: Hosts) -> None:
        vectors = {peer: _vector(peer) for peer in PEERS}
        vectors["b"][0] = value  # changed after committing; piece 0 is reduced by a
        results = await _average(hosts, vectors)
        assert all(isinstance(result, ReduceError) for result in results.values())
        assert "not what b committed to" in str(results["a"])

    _with_hosts(tmp_path, body)


def test_dead_member_is_named(tmp_path: Path) -> None:
    async def body(hosts: Hosts) -> None:
        await hosts["b"].close()
        reduction = Reduction(
            hosts["a"],
            place=(1, 1, 0),
            group=_group(),
            tokens_by_peer=TOKENS,
            own_peer_id="a",
            own_vector=_vector("a"),
        )
        with pytest.raises(ReduceError) as caught:
            await asyncio.wait_for(reduction.run(), 20.0)
        assert caught.value.peer_id == "b"
        assert caught.value.is_down

    _with_hosts(tmp_path, body)
