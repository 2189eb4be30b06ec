"""libp2p through hivemind's p2pd: small messages as unary calls, bulk bytes on streams, strangers
kept out.

One p2pd per process, in-process on asyncio (no fork). Measured on loopback: unary call 0.9 ms,
opening a stream 1.4 ms, one stream 265 MB/s. A dead peer's address refuses at once, a stopped one
is only found by deadline. Whoever calls is known by its libp2p identity, proven in the handshake; a
caller that is not in the table of members gets an error and no byte. p2pd's unix sockets lie in a
private folder that is emptied at start, and it ends within seconds of its parent.
"""

import asyncio
import itertools
import logging
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any, Self, TypeVar

import hivemind.p2p.p2p_daemon as p2p_daemon
from google.protobuf.message import DecodeError, Message
from hivemind.p2p import P2P, PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError, P2PHandlerError
from hivemind.utils.multiaddr import Multiaddr

from peer.background import start_whole
from peer.swarm.address_book import AddressBook, AddressSource
from peer.swarm.bulk_stream import BulkStream, StreamError
from peer.swarm.dialling import DialError, Dialler, short_reason
from peer.swarm.lane_stream import LaneStream
from peer.swarm.lanes import FAR_SECONDS, NO_BUNDLE, Lanes
from peer.swarm.link_meter import LinkMeter
from peer.swarm.member_stream import Stream
from peer.swarm.open_calls import OpenCalls
from peer.swarm.socket_folder import claim_socket_folder, release_socket_folder
from peer.swarm.timeline import PairWay
from peer.swarm.upload_pacer import UploadPacer
from protos.contract.addresses import problem_of_address
from protos.contract.errors import ErrorCode, MachineError
from protos.contract.ids import PROTOCOL_VERSION
from protos.muster.v1 import state_pb2

__all__ = ["PeerCallError", "Stream", "StreamError", "StreamHandler", "Transport"]

logger = logging.getLogger(__name__)

_LEAST_DIAL_SECONDS = 0.75
_MOST_MESSAGE_BYTES = 32 * 2**20
"""A group carries 34 bytes for each piece of each member: enough for 64 with a billion values."""
_START_SECONDS = 30.0
_FRAME_BYTES = 1024
"""What p2pd's protocol adds to a message, at most."""
_P2PD_IDLE_SECONDS = 20
_LANE_CALL = "lane"
_RELAYED = "p2p-circuit"
_MOST_HOSTS = 4
"""Of a member, tried for lanes."""
_MOST_STREAMS = 16
"""Of one kind that a member may have open here; each holds a descriptor, and what it serves."""

_M = TypeVar("_M", bound=Message)


class PeerCallError(Exception):
    """A peer could not be called; `is_down` if it looks dead rather than unwilling."""

    def __init__(self, reason: str, *, is_down: bool) -> None:
        super().__init__(reason)
        self.is_down = is_down


MessageHandler = Callable[[str, Any], Awaitable[Message]]
StreamHandler = Callable[[str, Stream], Awaitable[None]]


class Transport:
    """Calls members and answers members; everything is by peer_id, addresses are its own
    business.
    """

    def __init__(
        self,
        p2p: P2P,
        *,
        prefix: str,
        upload_limit_mbit: float | None,
        host: str = "127.0.0.1",
        listen_port: int = 0,
        lanes_from_seconds: float | None = FAR_SECONDS,
    ) -> None:
        """`lanes_from_seconds`: RTT from which on a pair gets lanes; None: no lanes."""
        self.p2p = p2p
        self._dialler = Dialler(p2p)
        self._rtt_by_peer: dict[str, float] = {}
        self._moved_by_peer: dict[str, tuple[int, int]] = {}
        self.link_meter = LinkMeter()
        self._lock = threading.Lock()
        self._prefix = prefix
        self.upload_pacer = UploadPacer(upload_limit_mbit)
        self._peer_by_p2p: dict[str, str] = {}
        self._p2p_by_peer: dict[str, PeerID] = {}
        self._addresses = AddressBook()
        self._connected: set[str] = set()
        self._num_open: Counter[tuple[str, str]] = Counter()
        """(peer_id, name) -> streams that the member has opened."""
        self.lanes = Lanes(
            host=host,
            listen_port=listen_port,
            far_seconds=lanes_from_seconds,
            ask=self._ask_lanes,
            hosts_of=self._hosts_of,
            rtt_of=self._rtt_by_peer.get,
        )

    @classmethod
    async def create(
        cls,
        *,
        home: Path,
        identity_path: Path,
        prefix: str,
        host: str,
        listen_port: int,
        announce: Iterable[str] = (),
        relays: Iterable[str] = (),
        upload_limit_mbit: float | None = None,
        is_relay: bool = False,
        lanes_from_seconds: float | None = FAR_SECONDS,
    ) -> Self:
        """Start p2pd. Raises MachineError if it does not come up (port taken, no binary)."""
        p2p_daemon.loglevel = "CRITICAL"
        logging.getLogger("hivemind").setLevel(logging.CRITICAL)
        folder = claim_socket_folder(home)
        private: Any = type("PrivateP2P", (P2P,), {"_UNIX_SOCKET_PREFIX": f"/unix{folder}/"})
        is_public = host != "127.0.0.1"
        relay_addresses = [Multiaddr(address) for address in relays] if is_public else []
        try:
            starting = private.create(
                host_maddrs=[f"/ip4/{host}/tcp/{listen_port}"],
                announce_maddrs=list(announce) or None,
                identity_path=str(identity_path),
                idle_timeout=_P2PD_IDLE_SECONDS,
                persistent_conn_max_msg_size=_MOST_MESSAGE_BYTES,
                startup_timeout=_START_SECONDS,
                check_if_identity_free=False,
                nat_port_map=is_public,
                auto_nat=is_public,
                use_relay=is_public or is_relay,
                use_auto_relay=bool(relay_addresses),
                trusted_relays=(relay_addresses or None)
                if is_public
                else None,  # p2pd: auto relay only
            )
            p2p = await start_whole(starting, undo=P2P.shutdown)
            p2p._client.control._pending_calls = OpenCalls()  # hivemind's own let it go deaf
        except (P2PDaemonError, OSError) as error:
            raise MachineError(
                f"the p2p daemon did not start on {host}:{listen_port}: {error}",
                allowed="a free port and hivemind's p2pd binary",
                remedy="choose another --listen-port",
                code=ErrorCode.PORT_IN_USE,
            ) from error
        transport = cls(
            p2p,
            prefix=prefix,
            upload_limit_mbit=upload_limit_mbit,
            host=host,
            listen_port=listen_port,
            lanes_from_seconds=lanes_from_seconds,
        )
        await transport.serve_messages(_LANE_CALL, transport.lanes.on_ask, state_pb2.LaneAsk)
        return transport

    @property
    def p2p_peer_id(self) -> str:
        """Own libp2p identity, base58."""
        return str(self.p2p.peer_id.to_base58())

    async def addresses(self) -> list[str]:
        """Own multiaddresses, with the identity at the end; of kinds that members dial."""
        found = [str(address) for address in await self.p2p.get_visible_maddrs(latest=True)]
        return [address for address in found if not problem_of_address(address)]

    async def wait_died(self) -> str:
        """Wait until p2pd has ended, whoever ended it; returns how."""
        child: asyncio.subprocess.Process = self.p2p._child
        code = await child.wait()
        return f"signal {-code}" if code < 0 else f"exit status {code}"

    async def close(self) -> None:
        """Stop p2pd and remove its sockets, with their folder."""
        await self.lanes.close()
        folder = Path(self.p2p.daemon_listen_maddr["unix"]).parent
        await self.p2p.shutdown()
        release_socket_folder(folder)

    # Traffic ----------------------------------------------------------------------------------

    def count(self, peer_id: str, *, sent_bytes: int = 0, received_bytes: int = 0) -> None:
        """Book bytes exchanged with a member; from any thread."""
        with self._lock:
            sent, received = self._moved_by_peer.get(peer_id, (0, 0))
            self._moved_by_peer[peer_id] = (sent + sent_bytes, received + received_bytes)
            self.link_meter.add(
                time.monotonic(), sent_bytes=sent_bytes, received_bytes=received_bytes
            )

    def moved_by_peer(self) -> dict[str, tuple[int, int]]:
        """peer_id -> (sent, received) bytes since the start."""
        return dict(self._moved_by_peer)

    @property
    def sent_bytes(self) -> int:
        """Bytes sent to members since the start."""
        return sum(sent for sent, _ in self._moved_by_peer.values())

    @property
    def received_bytes(self) -> int:
        """Bytes received from members since the start."""
        return sum(received for _, received in self._moved_by_peer.values())

    def ways(self) -> dict[str, PairWay]:
        """peer_id -> how bulk bytes to that member travel now."""
        found = {peer_id: self.lanes.way_of(peer_id) for peer_id in self._p2p_by_peer}
        return {
            peer_id: PairWay(
                num_lanes=num_lanes,
                rtt_seconds=self._rtt_by_peer.get(peer_id, 0.0),
                reason=reason,
            )
            for peer_id, (num_lanes, reason) in found.items()
        }

    # Members ----------------------------------------------------------------------------------

    def set_members(self, p2p_by_peer: dict[str, str]) -> None:
        """Replace the table of members: whom we answer, and under which identity we call them."""
        self._peer_by_p2p = {p2p: peer for peer, p2p in p2p_by_peer.items()}
        self._p2p_by_peer = {
            peer: PeerID.from_base58(p2p) for peer, p2p in p2p_by_peer.items() if p2p
        }
        for peer_id in self._rtt_by_peer.keys() - p2p_by_peer.keys():
            del self._rtt_by_peer[peer_id]
        self.lanes.keep_members(self._p2p_by_peer)

    def is_member(self, peer_id: str) -> bool:
        """True if this peer is answered."""
        return peer_id in self._p2p_by_peer

    def add_addresses(
        self,
        peer_id: str,
        addresses: Iterable[str],
        *,
        source: AddressSource = AddressSource.ROSTER,
    ) -> None:
        """Remember where a member may be reached, in place of what the source said before."""
        self._addresses.note(peer_id, addresses, source=source)

    async def connect_address(self, address: str, *, timeout_seconds: float = 5.0) -> str:
        """Connect to a full multiaddress of anybody; returns its libp2p identity. Raises
        PeerCallError.
        """
        try:
            maddr = Multiaddr(address)
            identity = PeerID.from_base58(maddr["p2p"])
        except (ValueError, LookupError) as error:
            raise PeerCallError(
                f"{address[:80]!r}: {short_reason(error)}", is_down=False
            ) from error
        try:
            await self._dialler.connect(identity, [maddr], timeout_seconds=timeout_seconds)
        except DialError as error:
            raise PeerCallError(str(error), is_down=True) from error
        return str(identity.to_base58())

    def is_connected(self, peer_id: str) -> bool:
        """True if the next call to a member need not dial, as far as we know."""
        return peer_id in self._connected

    async def _ensure_connected(
        self, peer_id: str, *, patience_seconds: float | None = None
    ) -> PeerID:
        identity = self._p2p_by_peer.get(peer_id)
        if identity is None:
            raise PeerCallError(f"{peer_id} is not a known member", is_down=False)
        if peer_id not in self._connected:
            addresses = self._addresses.addresses_of(peer_id)
            if addresses:
                maddrs = [Multiaddr(address) for address in addresses]
                try:
                    await self._dialler.meet(
                        identity, maddrs, timeout_seconds=5.0, patience_seconds=patience_seconds
                    )
                except DialError as error:
                    raise PeerCallError(str(error), is_down=True) from error
            self._connected.add(peer_id)
        return identity

    async def meet_members(self) -> None:
        """Connect to the members that are ours to dial, so that no round has to begin with it."""
        own = [p for p, i in self._p2p_by_peer.items() if self._dialler.is_first(i)]
        meeting = [self._ensure_connected(peer_id) for peer_id in own]
        for found in await asyncio.gather(*meeting, return_exceptions=True):
            if isinstance(found, BaseException) and not isinstance(found, PeerCallError):
                raise found

    # Messages ---------------------------------------------------------------------------------

    async def serve_messages(
        self, name: str, handler: MessageHandler, message_type: type[Message]
    ) -> None:
        """Answer unary calls of members."""

        async def guarded(message: Message, context: Any) -> Message:
            peer_id = self._peer_by_p2p.get(str(context.remote_id.to_base58()))
            if peer_id is None:
                raise PermissionError("you are not a member of this run")
            self._connected.add(peer_id)
            self.count(peer_id, received_bytes=message.ByteSize())
            return await handler(peer_id, message)

        await self.p2p.add_protobuf_handler(self.protocol(name), guarded, message_type)

    async def call(
        self,
        peer_id: str,
        name: str,
        message: Message,
        answer_type: type[_M],
        *,
        timeout_seconds: float = 5.0,
    ) -> _M:
        """Call a member. Raises PeerCallError.

        One that has answered before is dialled for half as long again as it may take to answer:
        a killed one was seen to refuse no connection for 5 s.
        """
        is_known = peer_id in self._rtt_by_peer
        patience_seconds = max(_LEAST_DIAL_SECONDS, 1.5 * timeout_seconds) if is_known else None
        if (num_bytes := message.ByteSize()) > _MOST_MESSAGE_BYTES - _FRAME_BYTES:
            reason = f"a message of {num_bytes} bytes; at most {_MOST_MESSAGE_BYTES} can be sent"
            raise PeerCallError(reason, is_down=False)
        identity = await self._ensure_connected(peer_id, patience_seconds=patience_seconds)
        begin_seconds = time.monotonic()
        try:
            answer: _M = await asyncio.wait_for(
                self.p2p.call_protobuf_handler(identity, self.protocol(name), message, answer_type),
                timeout_seconds,
            )
        except (P2PHandlerError, DecodeError) as error:
            raise PeerCallError(
                f"{peer_id} refused: {short_reason(error)}", is_down=False
            ) from error
        except TimeoutError as error:  # an OSError too, so it comes first
            self._connected.discard(peer_id)
            reason = f"no answer within {timeout_seconds:.1f} s"
            raise PeerCallError(reason, is_down=True) from error
        except (P2PDaemonError, OSError) as error:
            self._connected.discard(peer_id)
            self._dialler.note_failure(identity, str(error))
            raise PeerCallError(short_reason(error), is_down=True) from error
        self.count(peer_id, sent_bytes=num_bytes, received_bytes=answer.ByteSize())
        seconds = time.monotonic() - begin_seconds
        self._rtt_by_peer[peer_id] = min(seconds, self._rtt_by_peer.get(peer_id, seconds))
        return answer

    def rtt_by_peer(self) -> dict[str, float]:
        """Seconds of the quickest call to each member so far."""
        return dict(self._rtt_by_peer)

    # Streams ----------------------------------------------------------------------------------

    async def serve_streams(
        self, name: str, handler: StreamHandler, *, most_streams: int = _MOST_STREAMS
    ) -> None:
        """Answer streams that members open, `most_streams` of each at once; those beyond, and a
        stranger's, are closed unread.
        """

        async def guarded(
            info: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
        ) -> None:
            peer_id = self._peer_by_p2p.get(str(info.peer_id.to_base58()))
            await self.handle_stream(
                peer_id, name, handler, reader, writer, most_streams=most_streams
            )

        await self.p2p.add_binary_stream_handler(self.protocol(name), guarded)

    def protocol(self, name: str) -> str:
        """A name as it is on the wire: the prefix is the run's secret. Who speaks another version
        does not know it.
        """
        return f"{self._prefix}.{PROTOCOL_VERSION}.{name}"

    async def handle_stream(
        self,
        peer_id: str | None,
        name: str,
        handler: StreamHandler,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        most_streams: int = _MOST_STREAMS,
    ) -> None:
        """Answer a member's stream and close it; None is a stranger."""
        kind = (peer_id or "", name)
        self._num_open[kind] += 1
        try:
            if peer_id is not None and self._num_open[kind] <= most_streams:
                await handler(peer_id, Stream(reader, writer, peer_id=peer_id, transport=self))
        except (StreamError, TimeoutError, OSError) as error:
            logger.debug("stream %s of %s failed: %s", name, peer_id, error)
        finally:
            writer.close()
            self._num_open[kind] -= 1

    async def open_stream(self, peer_id: str, name: str, *, timeout_seconds: float = 5.0) -> Stream:
        """Open a stream to a member. Raises PeerCallError."""
        identity = await self._ensure_connected(peer_id)
        try:
            _, reader, writer = await asyncio.wait_for(
                self.p2p.call_binary_stream_handler(identity, self.protocol(name)),
                timeout_seconds,
            )
        except TimeoutError as error:
            self._connected.discard(peer_id)
            reason = f"no stream within {timeout_seconds:.1f} s"
            raise PeerCallError(reason, is_down=True) from error
        except (P2PDaemonError, P2PHandlerError, OSError) as error:
            self._connected.discard(peer_id)
            self._dialler.note_failure(identity, str(error))
            raise PeerCallError(short_reason(error), is_down=True) from error
        return Stream(reader, writer, peer_id=peer_id, transport=self, is_opener=True)

    async def bulk_stream(self, peer_id: str, stream: Stream) -> BulkStream:
        """The same stream to a member for threads, over lanes if its opener has a bundle of them:
        it names that as the last bytes of the p2p stream. Raises StreamError.
        """
        bundle = None
        try:
            if stream.is_opener:
                bundle = await self.lanes.lend(peer_id)
                await stream.send_bytes(NO_BUNDLE if bundle is None else bundle.bundle_id)
            else:
                bundle_id = await stream.read_bytes(len(NO_BUNDLE))
                bundle = await self.lanes.lent_by(peer_id, bundle_id)
                if bundle is None and bundle_id != NO_BUNDLE:
                    raise StreamError("it is to go on over lanes that are not there, or in use")
            fd, head = await stream.release()
        except BaseException:
            if bundle is not None:
                bundle.close()
                is_own = stream.is_opener
                self.lanes.give_back(peer_id, bundle, is_own=is_own, is_clean=False)
            raise
        count = lambda sent, received: self.count(  # noqa: E731
            peer_id, sent_bytes=sent, received_bytes=received
        )
        if bundle is None:
            return BulkStream(fd, head=head, upload_pacer=self.upload_pacer, count=count)
        return LaneStream(
            fd,
            bundle=bundle,
            is_opener=stream.is_opener,
            on_end=lambda bundle, is_clean: self.lanes.give_back(
                peer_id, bundle, is_own=stream.is_opener, is_clean=is_clean
            ),
            upload_pacer=self.upload_pacer,
            count=count,
        )

    async def _ask_lanes(
        self, peer_id: str, ask: state_pb2.LaneAsk, timeout_seconds: float
    ) -> state_pb2.LaneAnswer:
        kind = state_pb2.LaneAnswer
        try:
            return await self.call(peer_id, _LANE_CALL, ask, kind, timeout_seconds=timeout_seconds)
        except PeerCallError as error:
            raise ConnectionError(str(error)) from error

    async def _hosts_of(self, peer_id: str) -> list[str]:
        """IPv4 hosts at the other end of the direct connections to a member. Raises OSError."""
        try:
            peers = await self.p2p.list_peers()
        except (P2PDaemonError, EOFError) as error:
            raise ConnectionError(short_reason(error)) from error
        identity = self._p2p_by_peer.get(peer_id)
        addresses = [str(a) for peer in peers if peer.peer_id == identity for a in peer.addrs]
        hosts = [a.split("/")[2] for a in addresses if a.startswith("/ip4/") and _RELAYED not in a]
        return list(itertools.islice(dict.fromkeys(hosts), _MOST_HOSTS))
