"""Bundles of plain TCP connections to far members, beside libp2p's one: made, lent and dropped.

A connection holds at most a send buffer of bytes on their way, so it moves at most buffer / RTT,
and libp2p keeps one per pair. A pair whose quickest call took FAR_SECONDS or more gets a bundle of
lanes for each side that opens bulk streams. A bundle's name and secret travel over libp2p; the
asker dials, and if it cannot, the asked one: only hosts at the other end of their libp2p
connections, never what a member says of itself, on no system port, and seldom after failures. Until
there is a bundle, and after any failure for a while, the pair uses its p2p stream. Who connects to
the port and cannot prove to be awaited hears nothing, and is dropped after HANDSHAKE_SECONDS or
when too many are in that state. How a pair travels now, and why, is for `status` and metrics
(`way_of`); the log tells single events, at INFO.
"""

import asyncio
import logging
import os
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

from peer.swarm import lane_frames as frames
from peer.swarm.lane_stream import Bundle
from protos.muster.v1 import state_pb2

logger = logging.getLogger(__name__)

FAR_SECONDS = 0.02
"""RTT from which on a pair gets lanes."""
HANDSHAKE_SECONDS = 3.0
NO_BUNDLE = bytes(frames.ID_BYTES)
"""Says that a stream stays on its p2p stream."""
_SECONDS_PER_LANE = 0.05
_LEAST_LANES, _MOST_LANES = 2, 4
_AWAIT_SECONDS = 10.0
"""For the dialling side of a bundle."""
_MOST_OTHERS_BUNDLES = 2
"""Of one member: its last one may be in use still."""
_LOOKS, _LOOK_AGAIN_SECONDS = 10, 0.05
"""For a bundle whose last stream is just ending."""
_MOST_HALF_OPEN, _MOST_HALF_OPEN_OF_HOST = 64, 8
_NEAR_SECONDS = 600.0
"""Until it is looked again whether a near member has become a far one."""
_PAUSE_SECONDS, _MOST_PAUSE_SECONDS = 10.0, 600.0
_MOST_DOUBLINGS = 6
"""2^6 - 1 times the one is more than the other."""
_LEAST_PORT, _MOST_PORT = 1024, 65_535
_PORT_DISTANCE = 1000
"""Of the lanes' port from --listen-port; a neighbouring port may be another peer's."""


def num_lanes_for(rtt_seconds: float) -> int:
    """Connections of a bundle; a pair has two bundles."""
    return min(_MOST_LANES, max(_LEAST_LANES, round(rtt_seconds / _SECONDS_PER_LANE)))


@dataclass(slots=True)
class _Awaited:
    """A bundle whose connections are to come in."""

    secret: bytes
    num_lanes: int
    whole: "asyncio.Future[list[socket.socket]]"
    by_index: dict[int, socket.socket | None] = field(default_factory=dict)
    """None: its handshake is under way."""


@dataclass(slots=True)
class _Way:
    """What is known of lanes to one member."""

    own: Bundle | None = None
    """Asked for by us, and free."""
    lent: Bundle | None = None
    """Asked for by us, and in use."""
    others: dict[bytes, Bundle] = field(default_factory=dict)
    """Asked for by the member."""
    in_use: set[bytes] = field(default_factory=set)
    """Names of those of `others` that carry a stream."""
    num_asked: int = 0
    """Bundles that the member has asked for and that are not there yet."""
    making: "asyncio.Task[None] | None" = None
    num_vain_dials: int = 0
    """In a row, made because the member asked for them."""
    no_dial_before_seconds: float = 0.0
    num_failures: int = 0
    reason: str = ""
    """Of the last failure; "" since it has worked."""
    not_before_seconds: float = 0.0


Ask = Callable[[str, state_pb2.LaneAsk, float], Awaitable[state_pb2.LaneAnswer]]
"""Asks a member; raises OSError if it cannot be asked."""
HostsOf = Callable[[str], Awaitable[Iterable[str]]]
"""IPv4 hosts at which a member is connected to us now; raises OSError if that cannot be told."""


class Lanes:
    """Lanes of this process to all members. Bundles come back from any thread; the rest is for the
    event loop.
    """

    def __init__(
        self,
        *,
        host: str,
        listen_port: int,
        far_seconds: float | None,
        ask: Ask,
        hosts_of: HostsOf,
        rtt_of: Callable[[str], float | None],
    ) -> None:
        """`listen_port`: of libp2p, 0 if the system chose it; `far_seconds`: None for no lanes;
        `rtt_of`: a member's quickest call in seconds.
        """
        self._host, self._listen_port, self._far_seconds = host, listen_port, far_seconds
        self._ask, self._hosts_of, self._rtt_of = ask, hosts_of, rtt_of
        self._ways: defaultdict[str, _Way] = defaultdict(_Way)
        self._members: frozenset[str] = frozenset()
        self._lock = threading.Lock()
        self._awaited: dict[bytes, _Awaited] = {}
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._half_open: dict[asyncio.Task[None], tuple[socket.socket, str]] = {}

    # Lending ----------------------------------------------------------------------------------

    async def lend(self, peer_id: str) -> Bundle | None:
        """The own bundle to a member for one stream, if it has one that is free, or comes back from
        the last stream soon; otherwise one is made in the background, if the member is far.
        """
        way = self._ways[peer_id]
        for _ in range(_LOOKS):
            with self._lock:
                bundle, way.own, lent = way.own, None, way.lent
                if bundle is not None and bundle.is_alive():
                    way.lent, bundle.is_ending = bundle, False
                    return bundle
            if bundle is not None or lent is None or not lent.is_ending:
                break
            await asyncio.sleep(_LOOK_AGAIN_SECONDS)
        if bundle is not None:
            bundle.close()
            logger.info("lanes to %s: broke while idle", peer_id)
        is_idle = way.making is None or way.making.done()
        if is_idle and way.lent is None and time.monotonic() >= way.not_before_seconds:
            rtt_seconds = self._rtt_of(peer_id)
            if self._far_seconds is not None and (rtt_seconds or 1.0) >= self._far_seconds:
                way.making = asyncio.ensure_future(self._make(peer_id, way))
        return None

    async def lent_by(self, peer_id: str, bundle_id: bytes) -> Bundle | None:
        """A member's bundle, by its name, for one stream at a time; None if it is not there, or
        does not come back from the last stream soon.
        """
        way = self._ways[peer_id]
        for _ in range(_LOOKS):
            with self._lock:
                bundle = way.others.get(bundle_id)
                if bundle is None or not bundle.is_alive():
                    return None
                if bundle_id not in way.in_use:
                    way.in_use.add(bundle_id)
                    return bundle
            await asyncio.sleep(_LOOK_AGAIN_SECONDS)
        return None

    def give_back(self, peer_id: str, bundle: Bundle, *, is_own: bool, is_clean: bool) -> None:
        """The stream is over."""
        with self._lock:
            way = self._ways.get(peer_id)
            if way is None or not (is_clean or is_own):
                bundle.close()
                return
            if not is_own:
                way.in_use.discard(bundle.bundle_id)
                return
            way.lent = None
            if is_clean:
                way.own, way.num_failures, way.reason = bundle, 0, ""
                return
        self._note_failure(peer_id, way, "the last stream over them broke off")

    def keep_members(self, peer_ids: Iterable[str]) -> None:
        """Drop the lanes, and so the keys, of everybody else."""
        self._members = frozenset(peer_ids)
        for peer_id in self._ways.keys() - self._members:
            with self._lock:
                way = self._ways.pop(peer_id)
            if way.making is not None:
                way.making.cancel()
            for bundle in (way.own, way.lent, *way.others.values()):
                if bundle is not None:
                    bundle.close()

    def way_of(self, peer_id: str) -> tuple[int, str]:
        """Connections to a member for streams that we open, and why there are none if there should
        be.
        """
        way = self._ways.get(peer_id)
        if way is None:
            return 0, ""
        with self._lock:
            bundle = way.own or way.lent
        return (0, way.reason) if bundle is None else (bundle.num_lanes, "")

    async def close(self) -> None:
        """Drop everything."""
        self.keep_members(())
        tasks = [t for t in (self._accepting, *self._half_open) if t is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._listener is not None:
            self._listener.close()

    def _note_failure(self, peer_id: str, way: _Way, reason: str) -> None:
        pause_seconds = _pause_seconds(way.num_failures)
        way.num_failures, way.reason = way.num_failures + 1, reason
        way.not_before_seconds = time.monotonic() + pause_seconds
        text = "no lanes to %s for the next %.0f s, the p2p connection is used: %s"
        logger.info(text, peer_id, pause_seconds, reason)

    # Making -----------------------------------------------------------------------------------

    async def _make(self, peer_id: str, way: _Way) -> None:
        bundle_id, secret = os.urandom(frames.ID_BYTES), os.urandom(frames.SECRET_BYTES)
        rtt_seconds = self._rtt_of(peer_id) or 0.0
        ask = state_pb2.LaneAsk(
            bundle_id=bundle_id, secret=secret, num_lanes=num_lanes_for(rtt_seconds)
        )
        try:
            answer = await self._ask(peer_id, ask, HANDSHAKE_SECONDS)
            if (self._rtt_of(peer_id) or 0.0) < (self._far_seconds or 0.0):
                way.not_before_seconds = time.monotonic() + _NEAR_SECONDS
                return
            try:
                if not _LEAST_PORT <= answer.port <= _MOST_PORT:
                    raise ConnectionError(answer.reason or "it does not listen")
                connections = await self._dial(peer_id, answer.port, ask)
            except OSError as error:
                logger.debug("lanes to %s: cannot dial: %s; it shall dial us", peer_id, error)
                connections = await self._be_dialled(peer_id, ask, str(error))
            bundle = Bundle(connections, bundle_id=ask.bundle_id, secret=secret, is_owner=True)
        except OSError as error:
            self._note_failure(peer_id, way, str(error) or type(error).__name__)
            return
        is_near = 0.0 < bundle.rtt_seconds < (self._far_seconds or 0.0)
        if is_near:  # the calls took long because somebody was busy
            way.not_before_seconds = time.monotonic() + _NEAR_SECONDS
        with self._lock:
            if is_near or self._ways.get(peer_id) is not way:  # it has left meanwhile
                bundle.close()
                return
            way.own = bundle
        logger.info("lanes to %s: %d connections", peer_id, bundle.num_lanes)

    async def _be_dialled(
        self, peer_id: str, ask: state_pb2.LaneAsk, reason: str
    ) -> list[socket.socket]:
        """Let the member dial us. Raises OSError."""
        port = self._listen()
        if not port:
            raise ConnectionError(f"{reason}; and no port here")
        ask.bundle_id, ask.port = os.urandom(frames.ID_BYTES), port
        awaited = self._await(ask)
        answer = await self._ask(peer_id, ask, _AWAIT_SECONDS)
        if not answer.is_connected:
            raise ConnectionError(f"{reason}; the other way: {answer.reason}")
        if awaited.whole.cancelled():
            raise ConnectionError(f"{reason}; the other way: too late")
        return await awaited.whole

    async def on_ask(self, peer_id: str, ask: state_pb2.LaneAsk) -> state_pb2.LaneAnswer:
        """A member wants a bundle: await its connections, or make them."""
        sizes = (len(ask.bundle_id), len(ask.secret))
        is_sane = sizes == (frames.ID_BYTES, frames.SECRET_BYTES) and ask.bundle_id != NO_BUNDLE
        is_sane = is_sane and (ask.port == 0 or _LEAST_PORT <= ask.port <= _MOST_PORT)
        if self._far_seconds is None or not is_sane or not 1 <= ask.num_lanes <= _MOST_LANES:
            return state_pb2.LaneAnswer(reason="no lanes here" if is_sane else "a bad request")
        way = self._ways[peer_id]
        if way.num_asked >= _MOST_OTHERS_BUNDLES:
            return state_pb2.LaneAnswer(reason="too many bundles asked for at once")
        if ask.port:
            if time.monotonic() < way.no_dial_before_seconds:
                return state_pb2.LaneAnswer(reason="dialled in vain a short while ago")
            way.num_asked += 1
            try:
                connections = await self._dial(peer_id, ask.port, ask)
            except OSError as error:
                pause_seconds = _pause_seconds(way.num_vain_dials)
                way.num_vain_dials += 1
                way.no_dial_before_seconds = time.monotonic() + pause_seconds
                return state_pb2.LaneAnswer(reason=str(error) or type(error).__name__)
            finally:
                way.num_asked -= 1
            way.num_vain_dials = 0
            self._take_in(peer_id, ask, connections)
            return state_pb2.LaneAnswer(is_connected=True)
        port = self._listen()
        if not port:
            return state_pb2.LaneAnswer(reason="no port here")

        def arrived(whole: "asyncio.Future[list[socket.socket]]") -> None:
            way.num_asked -= 1
            if not whole.cancelled():
                self._take_in(peer_id, ask, whole.result())

        way.num_asked += 1
        self._await(ask).whole.add_done_callback(arrived)
        return state_pb2.LaneAnswer(port=port)

    def _take_in(
        self, peer_id: str, ask: state_pb2.LaneAsk, connections: list[socket.socket]
    ) -> None:
        try:
            bundle = Bundle(connections, bundle_id=ask.bundle_id, secret=ask.secret, is_owner=False)
        except OSError as error:  # one of them is closed already
            logger.info("lanes of %s: %s", peer_id, error)
            return
        if peer_id not in self._members:  # it has left meanwhile
            bundle.close()
            return
        others = self._ways[peer_id].others
        others[ask.bundle_id] = bundle
        while len(others) > _MOST_OTHERS_BUNDLES:
            others.pop(next(iter(others))).close()

    # Dialling ---------------------------------------------------------------------------------

    async def _dial(self, peer_id: str, port: int, ask: state_pb2.LaneAsk) -> list[socket.socket]:
        """All lanes of a bundle, at the first address that has them. Raises OSError."""
        error: OSError = ConnectionError("it is not connected directly")
        for host in await self._hosts_of(peer_id):
            joining = [self._join(host, port, ask, index) for index in range(ask.num_lanes)]
            found = await asyncio.gather(*joining, return_exceptions=True)
            connections = [c for c in found if isinstance(c, socket.socket)]
            if len(connections) == ask.num_lanes:
                return connections
            for connection in connections:
                connection.close()
            for failure in found:
                if isinstance(failure, OSError):
                    error = failure
                elif not isinstance(failure, socket.socket):
                    raise failure
        raise error

    async def _join(
        self, host: str, port: int, ask: state_pb2.LaneAsk, index: int
    ) -> socket.socket:
        """One lane, proven both ways. Raises OSError."""
        loop = asyncio.get_running_loop()
        connection = socket.socket()
        connection.setblocking(False)

        async def greet() -> None:
            await loop.sock_connect(connection, (host, port))
            nonce = os.urandom(frames.NONCE_BYTES)
            greeting = frames.hello(ask.secret, bundle_id=ask.bundle_id, index=index, nonce=nonce)
            await loop.sock_sendall(connection, greeting)
            found = await _read_exactly(connection, frames.CHALLENGE_BYTES)
            if not frames.is_challenge(ask.secret, greeting, found):
                raise ConnectionError(f"{host}:{port} does not know the secret")
            await loop.sock_sendall(connection, frames.proof(ask.secret, greeting, found))
            await _read_exactly(connection, 1)  # the lane is in its place

        try:
            await asyncio.wait_for(greet(), HANDSHAKE_SECONDS)
        except BaseException:
            connection.close()
            raise
        return connection

    # Being dialled ----------------------------------------------------------------------------

    def _listen(self) -> int:
        """The port at which lanes are awaited, opened when one is first needed; 0 if it cannot."""
        if self._listener is None:
            wanted = self._listen_port + _PORT_DISTANCE if self._listen_port else 0
            is_usable = _LEAST_PORT <= wanted <= _MOST_PORT
            for port in dict.fromkeys((wanted if is_usable else 0, 0)):
                try:
                    self._listener = socket.create_server((self._host, port), backlog=128)
                    break
                except OSError as error:
                    logger.info("lanes cannot listen on %s:%d: %s", self._host, port, error)
            else:
                return 0
            self._listener.setblocking(False)
            self._accepting = asyncio.ensure_future(self._accept(self._listener))
        return int(self._listener.getsockname()[1])

    def _await(self, ask: state_pb2.LaneAsk) -> _Awaited:
        loop = asyncio.get_running_loop()
        awaited = _Awaited(ask.secret, ask.num_lanes, loop.create_future())
        bundle_id = ask.bundle_id

        def expire() -> None:
            self._awaited.pop(bundle_id, None)
            if awaited.whole.cancel():
                for connection in awaited.by_index.values():
                    if connection is not None:
                        connection.close()

        self._awaited[bundle_id] = awaited
        loop.call_later(_AWAIT_SECONDS, expire)
        return awaited

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, address = await loop.sock_accept(listener)
            except OSError as error:  # too many open files, or the connection is gone already
                logger.info("lanes: a connection was not accepted: %s", error)
                await asyncio.sleep(1.0)
                continue
            host = str(address[0])
            of_host = [t for t, (_, other) in self._half_open.items() if other == host]
            if len(of_host) >= _MOST_HALF_OPEN_OF_HOST:
                self._turn_away(of_host[0])
            elif len(self._half_open) >= _MOST_HALF_OPEN:
                self._turn_away(next(iter(self._half_open)))
            task = asyncio.ensure_future(self._welcome(connection))
            self._half_open[task] = (connection, host)
            task.add_done_callback(partial(self._welcomed, connection))
            await asyncio.sleep(0)  # a full backlog is accepted without a pause otherwise

    def _turn_away(self, task: "asyncio.Task[None]") -> None:
        del self._half_open[task]
        task.cancel()

    def _welcomed(self, connection: socket.socket, task: "asyncio.Task[None]") -> None:
        self._half_open.pop(task, None)
        if task.cancelled() or task.exception() is not None:
            connection.close()

    async def _welcome(self, connection: socket.socket) -> None:
        """Take a connection in that proves to be awaited. Raises OSError."""
        loop = asyncio.get_running_loop()
        connection.setblocking(False)

        async def greet() -> None:
            greeting = await _read_exactly(connection, frames.HELLO_BYTES)
            awaited = self._awaited.get(frames.bundle_id_of(greeting))
            if awaited is None:
                raise ConnectionError("nobody who is awaited")
            index = frames.lane_index(awaited.secret, greeting)
            if index is None or index >= awaited.num_lanes:
                raise ConnectionError("it does not know the secret")
            if index in awaited.by_index:
                raise ConnectionError("a lane that is there already")
            awaited.by_index[index] = None
            nonce = os.urandom(frames.NONCE_BYTES)
            challenged = frames.challenge(awaited.secret, greeting, nonce=nonce)
            await loop.sock_sendall(connection, challenged)
            found = await _read_exactly(connection, frames.PROOF_BYTES)
            if not frames.is_proof(awaited.secret, greeting, challenged, found):
                raise ConnectionError("a recorded hello")
            if awaited.whole.done():
                raise ConnectionError("too late")
            awaited.by_index[index] = connection
            connections = [c for _, c in sorted(awaited.by_index.items()) if c is not None]
            if len(connections) == awaited.num_lanes:
                del self._awaited[frames.bundle_id_of(greeting)]
                awaited.whole.set_result(connections)
            await loop.sock_sendall(connection, b"\1")

        await asyncio.wait_for(greet(), HANDSHAKE_SECONDS)


def _pause_seconds(num_failures: int) -> float:
    """Until the next try, after so many failures in a row before this one."""
    doublings = min(num_failures, _MOST_DOUBLINGS)
    return min(_PAUSE_SECONDS * (2.0**doublings - 1.0), _MOST_PAUSE_SECONDS)


async def _read_exactly(connection: socket.socket, num_bytes: int) -> bytes:
    """Raises OSError."""
    loop, data = asyncio.get_running_loop(), b""
    while len(data) < num_bytes:
        received = await loop.sock_recv(connection, num_bytes - len(data))
        if not received:
            raise ConnectionError("the other side hung up")
        data += received
    return data
