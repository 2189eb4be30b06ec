"""A state from several donors over real streams: liars, deaths, restarts, a donor that moves on;
disk and memory bounds.
"""

import asyncio
import gc
import os
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from peer.model.init import initial_vector
from peer.swarm import piece_plan, state_transfer
from peer.swarm.catch_up import CatchUp, DownloadPause
from peer.swarm.incoming_state import IncomingState
from peer.swarm.piece_plan import PieceLayout
from peer.swarm.replica import Replica
from peer.swarm.state_download import FetchedState, StateDownload
from peer.swarm.state_image import ImageShelf, StateImage, make_image
from peer.swarm.state_server import StateServer, serving_bytes_per_second
from peer.swarm.state_transfer import ProvenState
from peer.swarm.transport import Stream, StreamError
from protos.contract.digest import state_digest
from protos.muster.v1 import state_pb2
from tests.peer.swarm.swarm_hub import SPEC, Hub
from tests.peer.swarm.wire import Handler, Wire


@pytest.fixture
def hub(tmp_path: Path) -> Hub:
    hub = Hub(tmp_path)
    hub.begin()
    return hub


def _replica(hub: Hub) -> Replica:
    """A new member that holds the initial state, with moments that are not zero."""
    daemon = hub.add_daemon()
    replica = hub.replica(daemon)
    replica.enter_incarnation(hub.record)
    assert replica.build_initial() and replica.meta is not None
    params = initial_vector(SPEC)
    vectors = (params, params * np.float32(0.5), params * params)
    assert replica.directive is not None
    replica.load(replica.meta, vectors, replica.directive)
    return replica


def _donor(hub: Hub, wire: Wire, name: str) -> tuple[Replica, StateServer]:
    replica = _replica(hub)
    server = StateServer(
        replica,
        wire,  # type: ignore[arg-type]
        upload_limit_mbit=None,
    )
    wire.handler_by_peer[name] = server._on_snapshot
    return replica, server


def _proven(replica: Replica, *donors: str) -> ProvenState:
    incarnation, outer_step = replica.position
    return ProvenState(
        incarnation=incarnation,
        outer_step=outer_step,
        state_digest=replica.state_digest,
        donors=donors,
    )


def _layout(replica: Replica) -> PieceLayout:
    return PieceLayout(tuple(vector.size for vector in replica.vectors.state_vectors()))


def _download(wire: Wire, wanted: ProvenState, incoming: IncomingState) -> StateDownload:
    return StateDownload(
        wire,  # type: ignore[arg-type]
        wanted,
        incoming=incoming,
        check=lambda meta, directive: "",
        stop=asyncio.Event(),
        on_progress=lambda progress: None,
    )


def _is_right(fetched: FetchedState | None, wanted: ProvenState) -> bool:
    return (
        fetched is not None and state_digest(fetched.meta, fetched.vectors) == wanted.state_digest
    )


def _cutting(handler: Handler, *, after_bytes: int) -> Handler:
    """The donor dies when it has sent so much; its first stream only."""
    left = [after_bytes]

    async def cut(peer_id: str, stream: Stream) -> None:
        send = stream.send_bytes

        async def send_some(data: bytes | memoryview) -> None:
            left[0] -= len(data)
            if left[0] < 0:
                raise StreamError("died")
            await send(data)

        stream.send_bytes = send_some  # type: ignore[method-assign]
        await handler(peer_id, stream)

    return cut


def _lying(handler: Handler) -> Handler:
    """The donor changes one bit of every piece."""

    async def lie(peer_id: str, stream: Stream) -> None:
        send = stream.send_bytes

        async def send_wrong(data: bytes | memoryview) -> None:
            wrong = bytearray(data)
            if len(wrong) > 100_000:
                wrong[1000] ^= 1
            await send(bytes(wrong))

        stream.send_bytes = send_wrong  # type: ignore[method-assign]
        await handler(peer_id, stream)

    return lie


def _once(handler: Handler, is_time: Callable[[], bool]) -> Handler:
    """The donor answers late, but not for ever."""

    async def late(peer_id: str, stream: Stream) -> None:
        loop = asyncio.get_running_loop()
        deadline_seconds = loop.time() + 10.0
        while not is_time() and loop.time() < deadline_seconds:
            await asyncio.sleep(0)
        await handler(peer_id, stream)

    return late


def test_three_donors_serve_one_state_and_a_liar_is_found_out(hub: Hub, tmp_path: Path) -> None:
    async def story() -> None:
        wire = Wire()
        donors = [_donor(hub, wire, name) for name in ("a", "b", "liar")]
        wire.handler_by_peer["liar"] = _lying(wire.handler_by_peer["liar"])
        wanted = _proven(donors[0][0], "liar", "a", "b", "dead")
        incoming = IncomingState(tmp_path, _layout(donors[0][0]))
        download = _download(wire, wanted, incoming)
        plan = download.plan.donors
        for name in ("a", "b"):
            honest = wire.handler_by_peer[name]
            wire.handler_by_peer[name] = _once(honest, lambda: plan["liar"].is_out)
        assert _is_right(await download.run(), wanted)
        assert plan["liar"].is_out and "does not match the proven digest" in plan["liar"].reason
        assert plan["dead"].reason == "nobody is there"
        assert plan["a"].num_received + plan["b"].num_received >= download.plan.num_pieces
        for _, server in donors:
            server.close()

    asyncio.run(story())


def test_download_goes_on_over_a_restart_and_a_donors_death(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(piece_plan, "_RETRY_SECONDS", 0.01)

    async def story() -> None:
        wire = Wire()
        replica, server = _donor(hub, wire, "a")
        whole = wire.handler_by_peer["a"]
        layout, wanted = _layout(replica), _proven(replica, "a")
        wire.handler_by_peer["a"] = _cutting(whole, after_bytes=layout.total_bytes // 2)
        first = _download(wire, wanted, IncomingState(tmp_path, layout))
        assert await first.run() is None
        num_there = first.plan.num_held
        assert 0 < num_there < layout.num_pieces

        again = IncomingState(tmp_path, layout)  # another life of the process
        header = again.remembered()
        assert header is not None and again.held(header) == num_there
        wire.handler_by_peer["a"] = whole
        received_bytes = wire.received_bytes
        second = _download(wire, wanted, again)
        assert _is_right(await second.run(), wanted)
        assert second.plan.donors["a"].num_received == layout.num_pieces - num_there
        assert wire.received_bytes - received_bytes < layout.total_bytes * 3 // 4
        again.discard()
        assert again.remembered() is None and not list(tmp_path.glob("incoming.*"))
        server.close()

    asyncio.run(story())


def test_a_donor_whose_list_is_of_another_state_gives_no_byte(hub: Hub, tmp_path: Path) -> None:
    async def story() -> None:
        wire = Wire()
        replica, server = _donor(hub, wire, "a")
        wanted = replace(_proven(replica, "a"), state_digest=b"another state".ljust(32))
        download = _download(wire, wanted, IncomingState(tmp_path, _layout(replica)))
        assert await download.run() is None
        reason = "its list of pieces is not that of the proven state"
        assert download.plan.donors["a"].reason == reason
        assert not list(tmp_path.glob("incoming.*"))
        server.close()

    asyncio.run(story())


def test_donor_serves_its_image_while_its_own_state_moves_on(hub: Hub, tmp_path: Path) -> None:
    async def story() -> None:
        wire = Wire()
        replica, server = _donor(hub, wire, "a")
        wanted, layout = _proven(replica, "a"), _layout(replica)
        stream = await wire.open_stream("a", "snapshot")
        await stream.send_message(state_pb2.SnapshotRequest(incarnation=0, outer_step=0))
        await stream.read_message(state_pb2.SnapshotHeader)
        assert replica.meta is not None and replica.directive is not None
        moved = tuple(vector + np.float32(1) for vector in replica.vectors.state_vectors())
        replica.load(replace(replica.meta, outer_step=1), moved, replica.directive)
        assert replica.averages.is_serving, "the way from the image on is kept as well"
        download = _download(wire, wanted, IncomingState(tmp_path, layout))
        assert _is_right(await download.run(), wanted), "the image is still of step 0"
        newer = _proven(replica, "a")
        later = _download(wire, replace(newer, outer_step=7), IncomingState(tmp_path, layout))
        assert await later.run() is None
        assert later.plan.donors["a"].reason == "state 0/7 is not held any more"
        server.close()

    asyncio.run(story())


def test_a_reader_that_takes_nothing_is_let_go(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight of them would keep every newcomer out."""
    monkeypatch.setattr("peer.swarm.state_server._REQUEST_SECONDS", 0.2)

    async def story() -> None:
        wire = Wire()
        replica, server = _donor(hub, wire, "a")
        stream = await wire.open_stream("a", "snapshot")
        await stream.send_message(state_pb2.SnapshotRequest(incarnation=0, outer_step=0))
        await stream.read_message(state_pb2.SnapshotHeader)
        last = _layout(replica).num_pieces
        for _ in range(50):
            await stream.send_message(state_pb2.PieceRequest(begin_piece=0, end_piece=last))
        await asyncio.wait_for(asyncio.gather(*wire.tasks), 10.0)
        assert server._shelf.num_readers == 0
        server.close()

    asyncio.run(story())


def test_an_image_is_never_torn(hub: Hub, tmp_path: Path) -> None:
    replica = _replica(hub)
    assert replica.meta is not None
    with replica.vectors.writing_state(replica.vectors.position()):
        assert make_image(replica, incarnation=0, outer_step=0, folder=tmp_path) is None
    image = make_image(replica, incarnation=0, outer_step=0, folder=tmp_path)
    assert image is not None
    pieces = b"".join(image.read_piece(piece) for piece in range(image.layout.num_pieces))
    assert pieces == b"".join(vector.tobytes() for vector in replica.vectors.state_vectors())
    assert list(tmp_path.glob("tmp*")) == [], "the image has no name, so nothing can be left over"
    image.close()


def test_memory_on_both_sides_is_a_few_pieces(hub: Hub, tmp_path: Path) -> None:
    """The state of this test is 12 pieces; both sides together hold fewer than that at any time."""

    async def story() -> None:
        wire = Wire()
        replica, server = _donor(hub, wire, "a")
        wanted, layout = _proven(replica, "a"), _layout(replica)
        piece_bytes = 4 * 65_536
        assert layout.num_pieces == 12
        (tmp_path / "again").mkdir()
        assert _is_right(
            await _download(wire, wanted, IncomingState(tmp_path, layout)).run(), wanted
        )
        download = _download(wire, wanted, IncomingState(tmp_path / "again", layout))
        gc.collect()
        tracemalloc.start()
        before, _ = tracemalloc.get_traced_memory()
        fetched = await download.run()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert _is_right(fetched, wanted)
        used_bytes = peak - before
        most_bytes = (2 * 2 + 1) * piece_bytes + 2**19  # one that a thread has not let go of yet
        assert used_bytes < most_bytes, f"{used_bytes} bytes on both sides"
        server.close()

    asyncio.run(story())


def test_images_are_few_and_kept_for_a_while_after_the_last_reader(
    hub: Hub, tmp_path: Path
) -> None:
    replica = _replica(hub)
    image = make_image(replica, incarnation=0, outer_step=0, folder=tmp_path)
    assert image is not None

    def at(step: int) -> StateImage:
        meta = replace(image.snapshot.meta, outer_step=step)
        return replace(
            image, snapshot=replace(image.snapshot, meta=meta), fd=os.open(os.devnull, 0)
        )

    shelf = ImageShelf(max_images=2, keep_seconds=60.0)
    for step in (1, 2):
        assert shelf.make_room()
        shelf.put(at(step), now_seconds=float(step))
        assert shelf.borrow((0, step)) is not None
    assert not shelf.make_room(), "both have a reader"
    shelf.give_back((0, 1), now_seconds=10.0)
    shelf.drop_unused(now_seconds=69.0)
    assert shelf.oldest_step == 1, "kept, so that its reader may come back"
    shelf.drop_unused(now_seconds=71.0)
    assert (shelf.oldest_step, shelf.num_readers) == (2, 1)
    assert shelf.borrow((0, 1)) is None
    shelf.close()
    image.close()


def test_zero_pieces_and_pieces_of_an_older_state_are_not_fetched_again(tmp_path: Path) -> None:
    layout = PieceLayout((2 * 65_536, 65_536))
    first = np.arange(2 * 65_536, dtype=np.float32)
    from protos.contract.digest import vector_piece_digests

    zeros = np.zeros(65_536, dtype=np.float32)
    digests = [*vector_piece_digests(first), *vector_piece_digests(zeros)]
    incoming = IncomingState(tmp_path, layout)
    assert incoming.begin(state_pb2.SnapshotHeader(piece_digests=digests)) == [2]
    assert incoming.take(1, first[65_536:].tobytes())
    assert not incoming.take(0, first[65_536:].tobytes()), "not what its digest says"
    first[0] = -1.0  # another state, which shares a piece
    digests = [*vector_piece_digests(first), *vector_piece_digests(zeros)]
    again = IncomingState(tmp_path, layout)
    assert again.begin(state_pb2.SnapshotHeader(piece_digests=digests)) == [1, 2]
    again.close()
    incoming.close()


def test_interrupted_download_is_finished_only_if_that_is_cheaper() -> None:
    from peer.swarm.state_transfer import is_resuming_cheaper as is_cheaper

    assert is_cheaper(num_missing=30, num_pieces=93, num_steps=2, pieces_per_step=31)
    assert not is_cheaper(num_missing=30, num_pieces=93, num_steps=3, pieces_per_step=31)


def test_resumed_state_is_proven_by_the_certificate_after_it(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a valid certificate the interrupted download is left; nothing is fetched."""

    async def story() -> None:
        wire = Wire()
        replica, server = _donor(hub, wire, "a")
        layout = _layout(replica)
        newcomer = hub.add_daemon()
        other = hub.replica(newcomer)
        other.enter_incarnation(hub.record)
        half = _cutting(wire.handler_by_peer["a"], after_bytes=layout.total_bytes // 2)
        wire.handler_by_peer["a"] = half
        started = _download(wire, _proven(replica, "a"), IncomingState(other.store.folder, layout))
        started.plan.donors["a"].num_failures = 4
        assert await started.run() is None
        catch_up = CatchUp(other, wire, own_peer_id=newcomer.peer_id)  # type: ignore[arg-type]
        found = catch_up._interrupted()
        assert found is not None and found[1].outer_step == 0
        forged = state_pb2.StateInfoResponse()
        forged.certificates.add(value=b"")

        async def infos(from_outer_step: int | None = None) -> dict[str, object]:
            assert from_outer_step == 1
            return {"a": forged}

        monkeypatch.setattr(catch_up, "infos", infos)
        received_bytes = wire.received_bytes
        assert not await catch_up._resume(*found)
        assert wire.received_bytes == received_bytes
        server.close()

    asyncio.run(story())


def test_states_that_lead_nowhere_are_downloaded_ever_more_seldom() -> None:
    pause, now_seconds = DownloadPause(), 100.0
    waits = []
    for _ in range(9):
        pause.downloaded(now_seconds)
        waits.append(pause.left_seconds(now_seconds))
        now_seconds += waits[-1]
    assert waits == [0.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0]
    pause.downloaded(now_seconds)
    pause.step_made()
    assert pause.left_seconds(now_seconds) == 0.0
    pause.downloaded(now_seconds)
    assert pause.left_seconds(now_seconds) == 0.0


def test_serving_takes_few_hundredths_of_the_machine_and_half_of_the_upload() -> None:
    free = serving_bytes_per_second(num_cpus=2, upload_limit_mbit=None)
    assert free == 2 * serving_bytes_per_second(num_cpus=1, upload_limit_mbit=None)
    assert serving_bytes_per_second(num_cpus=2, upload_limit_mbit=8.0) == 500_000


def test_a_silent_holder_does_not_hold_up_the_bytes_of_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is asked once more at the end, for longer, and named each time."""
    monkeypatch.setattr(state_transfer, "_HEADER_SECONDS", 0.05)
    monkeypatch.setattr(state_transfer, "_PIECE_SECONDS", 0.1)
    wire, asked, silent = Wire(), [], []

    async def scenario() -> None:
        end = asyncio.Event()

        async def says_nothing(sender: str, stream: Stream) -> None:
            asked.append("a")
            await end.wait()

        async def refuses(sender: str, stream: Stream) -> None:
            asked.append("b")
            await stream.send_message(state_pb2.AveragedHeader(refusal_reason="not held"))

        wire.handler_by_peer = {"a": says_nothing, "b": refuses}
        found = await state_transfer.fetch_averaged(
            wire,  # type: ignore[arg-type]
            ["a", "b", "gone"],
            b"digest",
            codec_name="fp32",
            num_values=1,
            on_silent=lambda peer_id, begin_seconds, reason: silent.append(peer_id),
        )
        assert found is None
        end.set()
        await asyncio.gather(*wire.tasks)

    asyncio.run(scenario())
    assert asked == ["a", "b", "a"] and silent == ["a", "gone", "a", "gone"]
