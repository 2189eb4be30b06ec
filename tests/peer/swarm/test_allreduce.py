"""The butterfly over real libp2p hosts on loopback: exact, the same bytes everywhere, refusing what
is wrong.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from peer.swarm.allreduce import (
    MAX_TICK_SECONDS,
    PART_STREAM,
    AveragedVector,
    ReduceError,
    Reduction,
    Streams,
)
from peer.swarm.codecs import EncodedVector
from peer.swarm.reduction_desk import ReductionDesk
from peer.swarm.slice_sum import SliceSum
from peer.swarm.transport import Stream, StreamError, StreamHandler, Transport
from protos.contract.codecs_wire import CODEC_NAMES, Codec, codec_named
from protos.contract.digest import (
    PIECE_VALUES,
    Float32Vector,
    num_pieces,
    vector_piece_digests,
)
from protos.muster.v1 import rounds_pb2
from tests.peer.swarm.p2p_hosts import introduce, start_host

NUM_VALUES = 3 * PIECE_VALUES + 1234
PEERS = ("a", "b", "c")
TOKENS = {"a": 100, "b": 300, "c": 0}
"""c has no work: it reduces, and brings nothing."""

Hosts = dict[str, Transport]
FP32 = codec_named("fp32")


def _with_hosts(folder: Path, body: Callable[[Hosts], Awaitable[None]]) -> None:
    async def run() -> None:
        started = await asyncio.gather(*(start_host(folder / peer) for peer in PEERS))
        hosts = dict(zip(PEERS, started, strict=True))
        await introduce(hosts)
        try:
            await body(hosts)
        finally:
            await asyncio.gather(*(host.close() for host in started))

    asyncio.run(run())


def _vector(peer: str) -> Float32Vector:
    values = np.random.default_rng(ord(peer)).standard_normal(NUM_VALUES)
    return values.astype(np.float32)


PIECES = num_pieces(NUM_VALUES)


def _group(codec: Codec, ends: tuple[int, ...] = (1, 3, PIECES)) -> rounds_pb2.FormGroup:
    members = []
    for peer in PEERS:
        ranges = [rounds_pb2.LeasedRange(end_window=1)] if TOKENS[peer] else []
        digests = EncodedVector.encode(codec, _vector(peer)).digests() if TOKENS[peer] else ()
        contribution = rounds_pb2.Contribution(peer_id=peer, ranges=ranges)
        members.append(rounds_pb2.JoinGroup(contribution=contribution, piece_digests=digests))
    return rounds_pb2.FormGroup(members=members, reducer_piece_ends=ends)


async def _start_desks(hosts: Hosts) -> dict[str, ReductionDesk]:
    desks = {peer: ReductionDesk(host) for peer, host in hosts.items()}
    await asyncio.gather(*(desk.start() for desk in desks.values()))
    return desks


async def _average(
    hosts: Hosts,
    vectors: dict[str, Float32Vector],
    codec: Codec = FP32,
    *,
    group: rounds_pb2.FormGroup | None = None,
    forged: dict[str, EncodedVector] | None = None,
    desks: dict[str, ReductionDesk] | None = None,
    attempt: int = 0,
) -> dict[str, AveragedVector | BaseException]:
    """Everybody averages; what each of them got."""
    encoded = {p: EncodedVector.encode(codec, vectors[p]) for p in PEERS if TOKENS[p]}
    encoded |= forged or {}
    reductions = {}
    desks = desks or await _start_desks(hosts)
    for peer, host in hosts.items():
        reductions[peer] = Reduction(
            host,
            place=(1, 1, attempt),
            group=group or _group(codec),
            tokens_by_peer=TOKENS,
            own_peer_id=peer,
            codec=codec,
            num_values=NUM_VALUES,
            own=encoded.get(peer),
        )
        desks[peer].open(reductions[peer])
    runs = [asyncio.wait_for(reductions[peer].run(), 20.0) for peer in PEERS]
    results = await asyncio.gather(*runs, return_exceptions=True)
    for peer, result in zip(PEERS, results, strict=True):
        assert isinstance(result, BaseException) or reductions[peer].num_moved > 0
    return dict(zip(PEERS, results, strict=True))


def test_everybody_gets_the_exact_weighted_mean(tmp_path: Path) -> None:
    async def body(hosts: Hosts) -> None:
        results = await _average(hosts, {peer: _vector(peer) for peer in PEERS})
        expected = np.float32(0.25) * _vector("a") + np.float32(0.75) * _vector("b")
        for result in results.values():
            assert isinstance(result, AveragedVector)
            assert np.array_equal(result.encoded.decoded(), expected)
            assert list(result.piece_digests) == vector_piece_digests(expected)

    _with_hosts(tmp_path, body)


def test_with_every_codec_everybody_gets_the_same_bytes_of_the_decoded_parts(
    tmp_path: Path,
) -> None:
    async def body(hosts: Hosts) -> None:
        vectors = {peer: _vector(peer) for peer in PEERS}
        desks = await _start_desks(hosts)
        for attempt, codec in enumerate(map(codec_named, CODEC_NAMES)):
            results = await _average(hosts, vectors, codec, desks=desks, attempt=attempt)
            parts = [EncodedVector.encode(codec, vectors[peer]).decoded() for peer in "ab"]
            total = np.float32(0.25) * parts[0] + np.float32(0.75) * parts[1]
            expected = EncodedVector.encode(codec.for_result(2), total)
            for result in results.values():
                assert isinstance(result, AveragedVector), result
                assert result.encoded.data == expected.data
                assert result.piece_digests == expected.digests()

    _with_hosts(tmp_path, body)


def test_part_that_no_encoder_writes_ends_the_attempt_and_names_its_sender(tmp_path: Path) -> None:
    async def body(hosts: Hosts) -> None:
        int8 = codec_named("int8")
        data = bytearray(int8.encode(_vector("b")))
        data[5] = 0x80  # code -128
        forged = EncodedVector(codec=int8, num_values=NUM_VALUES, data=memoryview(data))
        group = _group(int8)
        del group.members[1].piece_digests[:]
        group.members[1].piece_digests.extend(forged.digests())
        vectors = {peer: _vector(peer) for peer in PEERS}
        results = await _average(hosts, vectors, int8, group=group, forged={"b": forged})
        failure = results["a"]
        assert isinstance(failure, ReduceError)
        assert failure.peer_id == "b" and failure.is_invalid
        assert "part of b: codec int8: code -128" in str(failure)

    _with_hosts(tmp_path, body)


def test_bytes_that_were_not_committed_to_end_the_attempt(tmp_path: Path) -> None:
    async def body(hosts: Hosts) -> None:
        vectors = {peer: _vector(peer) for peer in PEERS}
        vectors["b"][0] = 1.5  # changed after committing; piece 0 is reduced by a
        results = await _average(hosts, vectors)
        assert all(isinstance(result, ReduceError) for result in results.values())
        failure = results["a"]
        assert isinstance(failure, ReduceError)
        assert failure.peer_id == "b" and failure.is_invalid
        assert "part of b: piece 0 is not what was committed to" in str(failure)

    _with_hosts(tmp_path, body)


def test_member_that_cannot_be_dialled_reduces_nothing(tmp_path: Path) -> None:
    async def body(hosts: Hosts) -> None:
        vectors = {peer: _vector(peer) for peer in PEERS}
        results = await _average(hosts, vectors, group=_group(FP32, ends=(0, 3, PIECES)))
        assert all(isinstance(result, AveragedVector) for result in results.values()), results
        assert len({r.averaged_digest for r in results.values()}) == 1  # type: ignore[union-attr]

    _with_hosts(tmp_path, body)


def test_a_stopped_member_is_named_by_those_who_wait_for_it(tmp_path: Path) -> None:
    async def body(hosts: Hosts) -> None:
        reductions, end = {}, asyncio.Event()
        for peer in ("a", "c"):
            desk = ReductionDesk(hosts[peer])
            await desk.start()
            reductions[peer] = _reduction(hosts[peer], peer)
            desk.open(reductions[peer])
        await hosts["b"].serve_streams(PART_STREAM, lambda sender, stream: _wait(end))
        runs = [asyncio.ensure_future(r.run()) for r in reductions.values()]
        while not reductions["a"].silent_peer(0.2)[0]:
            await asyncio.wait(runs, timeout=0.05)
            reductions["a"].tick()
        peer_id, seconds = reductions["a"].silent_peer(0.2)
        assert peer_id == "b" and seconds >= 0.2
        assert reductions["a"].silent_peer(100.0) == ("", 0.0)
        for reduction in reductions.values():
            reduction.fail(ReduceError("b is silent", peer_id="b"))
        for run in runs:
            with pytest.raises(ReduceError, match="silent"):
                await run
        end.set()

    _with_hosts(tmp_path, body)


def test_an_end_that_nobody_acknowledged_proves_nothing(tmp_path: Path) -> None:
    """A receiver that has read everything and closes, or says something else, is an error."""

    async def answer(sender: str, stream: Stream) -> None:
        kind = await stream.read_bytes(1)
        await stream.read_bytes(1000)
        if kind != b"-":
            await stream.send_bytes(kind)

    async def body(hosts: Hosts) -> None:
        await hosts["b"].serve_streams("test", answer)
        for kind in (b"A", b"-", b"x"):
            for is_bulk in (False, True):
                stream = await hosts["a"].open_stream("b", "test")
                await stream.send_bytes(kind + bytes(1000))
                if is_bulk:
                    bulk = await stream.detach()
                    waiting = asyncio.to_thread(bulk.wait_acknowledged)
                else:
                    waiting = stream.wait_acknowledged()
                if kind == b"A":
                    await waiting
                    continue
                with pytest.raises(StreamError, match="ended early|not acknowledged"):
                    await waiting

    _with_hosts(tmp_path, body)


def test_who_was_stopped_itself_blames_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    time = SimpleNamespace(monotonic=lambda: clock[0])
    monkeypatch.setattr("peer.swarm.allreduce.time", time)

    def pass_time(reduction: Reduction, num_ticks: int, tick_seconds: float = 0.1) -> None:
        for _ in range(num_ticks):
            clock[0] += tick_seconds
            reduction.tick()

    async def body() -> None:
        reduction = _reduction(_LostStreams(), "a")
        reduction._awaited["b", False] = (None, clock[0])
        reduction._sent_to = set(reduction._reducers)
        pass_time(reduction, 10)
        assert reduction.silent_peer(0.9)[0] == "b"
        clock[0] += 30.0
        assert reduction.silent_peer(0.9) == ("", 0.0)  # before the first tick after it as well
        pass_time(reduction, 1, 0.0)
        assert reduction.silent_peer(0.9) == ("", 0.0)
        assert reduction.late_seconds_by_peer["b"] == pytest.approx(1.0 + MAX_TICK_SECONDS)
        pass_time(reduction, 8)
        assert reduction.silent_peer(0.9) == ("", 0.0)
        pass_time(reduction, 2)
        assert reduction.silent_peer(0.9)[0] == "b"

    asyncio.run(body())


def test_a_stopped_reducer_is_found_before_its_stream_is_open() -> None:
    """Whoever reduces nothing waits for nobody's part, and a stream may take seconds to fail."""

    class Streams:
        async def open_stream(self, peer_id: str, name: str) -> Stream:
            await asyncio.Event().wait()
            raise AssertionError("never")

    async def body() -> None:
        reduction = _reduction(Streams(), "a", group=_group(FP32, ends=(0, 2, PIECES)))
        run = asyncio.ensure_future(reduction.run())
        await asyncio.sleep(0)
        assert reduction.silent_peer(1e-9)[0] in ("b", "c")
        reduction.fail(ReduceError("c is silent", peer_id="c"))
        with pytest.raises(ReduceError, match="silent"):
            await run

    asyncio.run(body())


def test_a_stopped_reducer_is_found_while_another_member_still_sends() -> None:
    async def body() -> None:
        reduction, now = _reduction(_LostStreams(), "a"), time.monotonic()
        reduction.begin_seconds = reduction._heed_seconds = now - 60.0
        reduction._awaited = {("b", True): (None, now - 55.0), ("c", False): (None, now)}
        assert reduction.silent_peer(5.0)[0] == "b"
        reduction._awaited["c", False] = (None, now - 50.0)
        assert reduction.silent_peer(5.0)[0] == "c"

    asyncio.run(body())


def test_a_reducer_that_alone_says_to_the_end_that_it_waits_is_noted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It could hold up every attempt by that, and nobody would be late."""
    clock = [100.0]
    time = SimpleNamespace(monotonic=lambda: clock[0])
    monkeypatch.setattr("peer.swarm.allreduce.time", time)

    async def body() -> None:
        for others, expected in ((set(), {"b": pytest.approx(2.0)}), ({"c"}, {})):
            reduction = _reduction(_LostStreams(), "a")
            reduction._sent_to = set(reduction._reducers)
            for reducer in {"b", *others}:
                reduction._awaited[reducer, True] = (None, clock[0])
                reduction._note_waiting(reducer, True)
            for _ in range(20):
                clock[0] += 0.1
                reduction.tick()
            assert reduction.late_seconds_by_peer == {}
            assert reduction.waiting_seconds_by_peer == expected

    asyncio.run(body())


async def _wait(end: asyncio.Event) -> None:
    await end.wait()


class _LostStreams:
    """Fails in a way that nobody foresaw."""

    async def open_stream(self, peer_id: str, name: str) -> Stream:
        raise ValueError(f"no way to {peer_id}")

    async def serve_streams(self, name: str, handler: StreamHandler) -> None:
        pass


def _reduction(host: Streams, peer: str, *, group: rounds_pb2.FormGroup | None = None) -> Reduction:
    return Reduction(
        host,
        place=(1, 1, 0),
        group=group or _group(FP32),
        tokens_by_peer=TOKENS,
        own_peer_id=peer,
        codec=FP32,
        num_values=NUM_VALUES,
        own=EncodedVector.encode(FP32, _vector(peer)) if TOKENS[peer] else None,
    )


def test_dead_member_is_named(tmp_path: Path) -> None:
    async def body(hosts: Hosts) -> None:
        await ReductionDesk(hosts["c"]).start()  # answers, and waits for its own group
        await hosts["b"].close()
        reduction = _reduction(hosts["a"], "a")
        with pytest.raises(ReduceError) as caught:
            await asyncio.wait_for(reduction.run(), 20.0)
        assert caught.value.peer_id == "b"
        assert caught.value.is_down

    _with_hosts(tmp_path, body)


def _failure_of(reduction: Callable[[], Reduction]) -> ReduceError:
    async def run() -> None:
        await asyncio.wait_for(reduction().run(), 5.0)

    with pytest.raises(ReduceError) as caught:
        asyncio.run(run())
    return caught.value


def test_an_error_that_nobody_foresaw_ends_the_attempt() -> None:
    error = _failure_of(lambda: _reduction(_LostStreams(), "a"))
    assert "ValueError: no way to" in str(error)


def test_an_error_in_a_thread_ends_the_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: SliceSum) -> None:
        raise IndexError("list index out of range")

    async def never(self: Reduction, reducer: str) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(SliceSum, "run", broken)
    monkeypatch.setattr(Reduction, "_exchange_with", never)
    error = _failure_of(lambda: _reduction(_LostStreams(), "a"))
    assert "IndexError: list index out of range" in str(error)


def test_a_result_with_a_gap_is_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    async def nothing(self: Reduction, reducer: str) -> None:
        pass

    monkeypatch.setattr(SliceSum, "run", lambda self: None)
    monkeypatch.setattr(Reduction, "_exchange_with", nothing)
    error = _failure_of(lambda: _reduction(_LostStreams(), "a"))
    assert f"{PIECES} averaged pieces are missing" in str(error)
