"""The reduce over real libp2p hosts on loopback: exact, the same bytes everywhere, and refusing what is wrong."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from peer.swarm.allreduce import AllReduce, ReduceFailed, ReduceGroup, ReduceMember, weighted_sum
from peer.swarm.dht import Presence, SwarmDht
from peer.swarm.transport import PeerUnreachable, Transport
from protos.contract.digest import PIECE_VALUES, Float32Vector, num_pieces, vector_piece_digests
from protos.muster.v1 import rounds_pb2

NUM_VALUES = 3 * PIECE_VALUES + 1234
STREAM = "parts"


@asynccontextmanager
async def hosts(tmp_path: Path, number: int) -> AsyncIterator[list[Transport]]:
    """Connected libp2p hosts."""
    started: list[Transport] = []
    try:
        for index in range(number):
            known = await started[0].addresses() if started else []
            started.append(
                await Transport.start(
                    identity_path=tmp_path / f"{index}.key",
                    host="127.0.0.1",
                    port=0,
                    initial_peers=known,
                )
            )
        for host in started[1:]:
            await host.connect(started[0].p2p_peer_id, await started[0].addresses())
            for other in started[1:]:
                if other is not host:
                    await host.connect(other.p2p_peer_id, await other.addresses())
        yield started
    finally:
        await asyncio.gather(*(host.stop() for host in started))


def vectors(number: int) -> list[Float32Vector]:
    """Different vectors from fixed seeds."""
    return [
        np.random.default_rng(seed).standard_normal(NUM_VALUES).astype(np.float32)
        for seed in range(number)
    ]


def group_of(
    transports: list[Transport],
    contributions: list[Float32Vector | None],
    weights: list[int],
    own_index: int,
) -> ReduceGroup:
    """The same group as seen by one member; pieces are dealt out evenly."""
    pieces = num_pieces(NUM_VALUES)
    ends = tuple(pieces * (index + 1) // len(transports) for index in range(len(transports)))
    members = tuple(
        ReduceMember(
            peer_id=f"{index:032x}",
            p2p_peer_id=transport.p2p_peer_id,
            weight_tokens=weight,
            piece_digests=() if vector is None else tuple(vector_piece_digests(vector)),
        )
        for index, (transport, vector, weight) in enumerate(
            zip(transports, contributions, weights, strict=True)
        )
    )
    return ReduceGroup(
        incarnation=1, outer_step=5, attempt=0, num_values=NUM_VALUES, own_index=own_index,
        members=members, reducer_piece_ends=ends,
    )  # fmt: skip


async def reducers(transports: list[Transport]) -> list[AllReduce]:
    """One AllReduce per host, serving everybody."""
    found = [AllReduce(transport, stream_name=STREAM) for transport in transports]
    for transport, reducer in zip(transports, found, strict=True):
        await transport.serve_stream(STREAM, reducer.serve, may_call=lambda _: True)
    return found


@pytest.mark.parametrize("idle", [None, 1])
def test_everybody_gets_the_same_exact_average(tmp_path: Path, idle: int | None) -> None:
    """Weights by tokens; a member without work reduces and receives, but contributes nothing."""

    async def scenario() -> None:
        contributions: list[Float32Vector | None] = list(vectors(3))
        weights = [300, 500, 200]
        if idle is not None:
            contributions[idle], weights[idle] = None, 0
        async with hosts(tmp_path, 3) as transports:
            found = await reducers(transports)
            results = await asyncio.gather(
                *(
                    reducer.run(
                        group_of(transports, contributions, weights, index),
                        contributions[index],
                        deadline_seconds=20,
                    )
                    for index, reducer in enumerate(found)
                )
            )
        total = sum(weights)
        working = [
            (v, np.float32(w / total))
            for v, w in zip(contributions, weights, strict=True)
            if v is not None
        ]
        expected = weighted_sum([v for v, _ in working], [c for _, c in working])
        for result in results:
            assert result.averaged.tobytes() == expected.tobytes()
            assert result.averaged_digest == results[0].averaged_digest
        double = sum(
            v.astype(np.float64) * w / total
            for v, w in zip(contributions, weights, strict=True)
            if v is not None
        )
        assert np.linalg.norm(expected - double) <= 1e-6 * np.linalg.norm(double)

    asyncio.run(scenario())


@pytest.mark.parametrize("fault", ["other bytes", "not finite"])
def test_a_bad_part_ends_the_attempt_and_names_the_member(tmp_path: Path, fault: str) -> None:
    """Bytes that differ from the commitment, or values that are not finite, never reach a sum."""

    async def scenario() -> list[BaseException | object]:
        good, bad = vectors(2)
        if fault == "not finite":
            bad[7] = np.nan
        committed = bad.copy()
        if fault == "other bytes":
            bad[7] += 1
        async with hosts(tmp_path, 2) as transports:
            found = await reducers(transports)
            return await asyncio.gather(
                found[0].run(
                    group_of(transports, [good, committed], [1, 1], 0), good, deadline_seconds=10
                ),
                found[1].run(
                    group_of(transports, [good, committed], [1, 1], 1), bad, deadline_seconds=10
                ),
                return_exceptions=True,
            )

    results = asyncio.run(scenario())
    assert isinstance(results[0], ReduceFailed)
    assert "00000000" in str(results[0])
    assert ("commitment" if fault == "other bytes" else "finite") in str(results[0])


def test_a_silent_member_ends_the_attempt_at_the_deadline(tmp_path: Path) -> None:
    """The reason names who was missing."""

    async def scenario() -> None:
        contributions: list[Float32Vector | None] = list(vectors(2))
        async with hosts(tmp_path, 2) as transports:
            found = await reducers(transports)
            with pytest.raises(ReduceFailed, match="00000000"):
                await found[0].run(
                    group_of(transports, contributions, [1, 1], 0),
                    contributions[0],
                    deadline_seconds=0.5,
                )

    asyncio.run(scenario())


def test_a_stranger_gets_no_bytes(tmp_path: Path) -> None:
    """Neither a unary call nor a stream of somebody who may not call is served."""

    async def scenario() -> None:
        async with hosts(tmp_path, 2) as (member, stranger):

            async def answer(request: rounds_pb2.RoundAck, remote_id: str) -> rounds_pb2.RoundAck:
                return request

            async def serve(stream: object, remote_id: str) -> None:
                raise AssertionError("served a stranger")

            await member.serve_unary("info", answer, rounds_pb2.RoundAck, may_call=lambda _: False)
            await member.serve_stream("state", serve, may_call=lambda _: False)  # type: ignore[arg-type]
            with pytest.raises(PeerUnreachable):
                await stranger.call_unary(
                    member.p2p_peer_id, "info", rounds_pb2.RoundAck(outer_step=1), rounds_pb2.RoundAck,
                    deadline_seconds=5,
                )  # fmt: skip
            stream = await stranger.open_stream(member.p2p_peer_id, "state", deadline_seconds=5)
            with pytest.raises(PeerUnreachable):
                await stream.receive_bytes(1)

    asyncio.run(scenario())


def test_members_find_each_other_in_the_dht(tmp_path: Path) -> None:
    """A record stored by one is found by another."""

    async def scenario() -> None:
        async with hosts(tmp_path, 2) as (first, second):
            dhts = [await SwarmDht.start(first, dht_prefix="run")]
            dhts.append(
                await SwarmDht.start(
                    second, dht_prefix="run", initial_peers=await first.addresses()
                )
            )
            said = Presence(
                p2p_peer_id=second.p2p_peer_id, addresses=("/ip4/127.0.0.1/tcp/1",), outer_step=3
            )
            assert await dhts[1].publish("ab", said)
            assert await dhts[0].find("ab") == said
            assert await dhts[0].find("cd") is None
            for dht in dhts:
                await dht.stop()

    asyncio.run(scenario())
