"""A second p2pd that speaks QUIC only, for bulk streams of pairs where that is faster.

A host that listens on both would dial QUIC always: libp2p prefers it. So the lane is a host of its
own, with a passing identity; who it belongs to is said over the authenticated connection, both
ways. It is started when the first pair wants it (about 70 MiB), and a stranger's stream is closed
unread as on the main host.
"""

import asyncio
import contextlib
import logging
import time
from typing import Any

from hivemind.p2p import P2P, PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError, P2PHandlerError
from hivemind.utils.multiaddr import Multiaddr

from peer.swarm.bulk_stream import BulkStream, StreamError
from peer.swarm.route_choice import PROBE_BYTES, PROBE_SECONDS, PairRoute, Route
from peer.swarm.transport import PeerCallError, Stream, StreamHandler, Transport
from protos.muster.v1 import state_pb2

logger = logging.getLogger(__name__)

LANE_CALL = "lane"
PROBE_STREAM = "probe"
_START_SECONDS = 15.0
_CONNECT_SECONDS = 5.0
_STEP_BYTES = 2**18
_PROBE_PATIENCE_SECONDS = 20.0


class Routes:
    """The ways of this member: one lane at most, and a choice for each other member."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._pair_by_peer: dict[str, PairRoute] = {}
        self._lane: P2P | None = None
        self._lane_starting = asyncio.Lock()
        self._lane_by_peer: dict[str, PeerID] = {}
        self._peer_by_lane: dict[str, str] = {}
        self._handlers: dict[str, StreamHandler] = {}

    async def start(self) -> None:
        """Begin to answer about the lane, and to be probed."""
        await self._transport.serve_messages(LANE_CALL, self._on_offer, state_pb2.LaneOffer)
        await self.serve_streams(PROBE_STREAM, self._on_probe)

    async def close(self) -> None:
        """End the lane's p2pd."""
        if self._lane is not None:
            await self._lane.shutdown()
            self._lane = None

    def route_of(self, peer_id: str) -> PairRoute:
        """The way to a member."""
        return self._pair_by_peer.setdefault(peer_id, PairRoute())

    # Streams ----------------------------------------------------------------------------------

    async def serve_streams(self, name: str, handler: StreamHandler) -> None:
        """Answer members' streams on whichever way they come."""
        self._handlers[name] = handler
        await self._transport.serve_streams(name, handler)
        if self._lane is not None:
            await self._serve_on_lane(self._lane, name)

    async def open_stream(self, peer_id: str, name: str) -> Stream:
        """Open a stream the way that was measured to be best. Raises PeerCallError."""
        pair = self.route_of(peer_id)
        if pair.route is Route.QUIC:
            try:
                return await self._open_on_lane(peer_id, name)
            except PeerCallError as error:
                pair.note_failure(str(error))
                logger.info("streams to %s go over TCP again: %s", peer_id, error)
        return await self._transport.open_stream(peer_id, name)

    async def _open_on_lane(self, peer_id: str, name: str) -> Stream:
        identity, lane = self._lane_by_peer.get(peer_id), self._lane
        if identity is None or lane is None:
            raise PeerCallError("no lane", is_down=False)
        protocol = self._transport.protocol(name)
        try:
            _, reader, writer = await asyncio.wait_for(
                lane.call_binary_stream_handler(identity, protocol), _CONNECT_SECONDS
            )
        except (P2PDaemonError, P2PHandlerError, OSError, TimeoutError) as error:
            raise PeerCallError(f"QUIC: {error!r}"[:200], is_down=False) from error
        return Stream(reader, writer, peer_id=peer_id, transport=self._transport)

    # The lane ---------------------------------------------------------------------------------

    async def _ensure_lane(self) -> P2P:
        async with self._lane_starting:
            if self._lane is None or self._lane._child.returncode is not None:
                lane = await self._transport.start_quic(timeout_seconds=_START_SECONDS)
                for name in self._handlers:
                    await self._serve_on_lane(lane, name)
                self._lane = lane
        return self._lane

    async def _serve_on_lane(self, lane: P2P, name: str) -> None:
        handler = self._handlers[name]

        async def guarded(
            info: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
        ) -> None:
            peer_id = self._peer_by_lane.get(str(info.peer_id.to_base58()))
            if peer_id is not None and not self._transport.is_member(peer_id):
                peer_id = None  # it has left the roster since
            await self._transport.handle_stream(peer_id, name, handler, reader, writer)

        await lane.add_binary_stream_handler(self._transport.protocol(name), guarded)

    async def _offer(self) -> state_pb2.LaneOffer:
        lane = await self._ensure_lane()
        addresses = await lane.get_visible_maddrs(latest=True)
        return state_pb2.LaneOffer(
            p2p_peer_id=lane.peer_id.to_base58(), addresses=[str(a) for a in addresses]
        )

    async def _on_offer(self, peer_id: str, offer: state_pb2.LaneOffer) -> state_pb2.LaneOffer:
        if not self._learn(peer_id, offer):
            return state_pb2.LaneOffer()
        try:
            return await self._offer()
        except (P2PDaemonError, OSError) as error:
            logger.info("no QUIC here: %s", error)
            return state_pb2.LaneOffer()

    def _learn(self, peer_id: str, offer: state_pb2.LaneOffer) -> bool:
        """Whose lane an identity is; nobody may claim another's."""
        owner = self._peer_by_lane.get(offer.p2p_peer_id, peer_id)
        if owner != peer_id or not offer.p2p_peer_id:
            return False
        try:
            identity = PeerID.from_base58(offer.p2p_peer_id)
        except ValueError:
            return False
        before = self._lane_by_peer.get(peer_id)
        if before is not None:
            self._peer_by_lane.pop(str(before.to_base58()), None)
        self._lane_by_peer[peer_id] = identity
        self._peer_by_lane[offer.p2p_peer_id] = peer_id
        return True

    async def _connect_lane(self, peer_id: str) -> None:
        """Exchange offers with a member and connect. Raises PeerCallError."""
        try:
            own = await self._offer()
        except (P2PDaemonError, OSError) as error:
            raise PeerCallError(f"no QUIC here: {error}", is_down=False) from error
        offer = await self._transport.call(
            peer_id, LANE_CALL, own, state_pb2.LaneOffer, timeout_seconds=_START_SECONDS + 5.0
        )
        if not self._learn(peer_id, offer):
            raise PeerCallError(f"{peer_id} has no lane", is_down=False)
        identity, suffix = self._lane_by_peer[peer_id], Multiaddr(f"/p2p/{offer.p2p_peer_id}")
        assert self._lane is not None
        client: Any = self._lane._client  # noqa: SLF001 (hivemind has no public door for this)
        try:
            plain = [Multiaddr(address).decapsulate(suffix) for address in offer.addresses]
            await asyncio.wait_for(client.connect(identity, plain), _CONNECT_SECONDS)
        except (P2PDaemonError, OSError, ValueError, TimeoutError) as error:
            raise PeerCallError(f"QUIC: {error!r}"[:200], is_down=False) from error

    # Choosing ---------------------------------------------------------------------------------

    async def after_round(
        self, bytes_by_peer: dict[str, int], *, seconds: float, rtt_by_peer: dict[str, float]
    ) -> None:
        """Probe the pairs whose way may be worth changing. Call while nothing is averaged."""
        for peer_id, moved in bytes_by_peer.items():
            rtt_seconds = rtt_by_peer.get(peer_id, 0.0)
            pair = self.route_of(peer_id)
            if pair.note_round(rtt_seconds=rtt_seconds, bytes_per_second=moved / seconds):
                await self._choose(peer_id, pair)

    async def _choose(self, peer_id: str, pair: PairRoute) -> None:
        quic = tcp = 0.0
        try:
            tcp = await self._probe(await self._transport.open_stream(peer_id, PROBE_STREAM))
            await self._connect_lane(peer_id)
            quic = await self._probe(await self._open_on_lane(peer_id, PROBE_STREAM))
        except (PeerCallError, StreamError, TimeoutError) as error:
            logger.debug("probe of %s: %s", peer_id, error)
        pair.note_probe(tcp_bytes_per_second=tcp, quic_bytes_per_second=quic)
        logger.info("bulk bytes to %s go over %s: %s", peer_id, pair.route, pair.reason)

    async def _probe(self, stream: Stream) -> float:
        """Bytes per second that the other side has received."""
        bulk = await stream.detach()
        try:
            return await asyncio.wait_for(
                asyncio.to_thread(_send_probe, bulk), _PROBE_PATIENCE_SECONDS
            )
        finally:
            bulk.close()

    async def _on_probe(self, peer_id: str, stream: Stream) -> None:
        bulk = await stream.detach()
        try:
            await asyncio.wait_for(asyncio.to_thread(_take_probe, bulk), _PROBE_PATIENCE_SECONDS)
        finally:
            bulk.close()


def _send_probe(stream: BulkStream) -> float:
    """Send for a while, then ask how fast it arrived. Raises StreamError."""
    step, begin, sent = b"\1" + bytes(_STEP_BYTES), time.monotonic(), 0
    while sent < PROBE_BYTES and time.monotonic() - begin < PROBE_SECONDS:
        stream.send(step)
        sent += _STEP_BYTES
    stream.send(b"\0")
    return float(int.from_bytes(stream.read_bytes(8), "big"))


def _take_probe(stream: BulkStream) -> None:
    """Receive a probe and say how fast it came, its first quarter left out: slow start, buffers."""
    room = bytearray(_STEP_BYTES)
    arrivals: list[float] = []
    with contextlib.suppress(StreamError):
        while bytes(stream.read_bytes(1)) == b"\1" and len(arrivals) * _STEP_BYTES < PROBE_BYTES:
            stream.read_into(memoryview(room))
            arrivals.append(time.monotonic())
        skipped = len(arrivals) // 4
        counted = arrivals[skipped:]
        seconds = counted[-1] - counted[0] if len(counted) > 1 else 0.0
        rate = (len(counted) - 1) * _STEP_BYTES / seconds if seconds > 0 else 0.0
        stream.send(int(rate).to_bytes(8, "big"))
        stream.read_bytes(1)  # the asker closes first
