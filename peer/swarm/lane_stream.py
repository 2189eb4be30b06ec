"""A stream over several TCP connections of one pair of members, a bundle of lanes.

The sender seals chunks and gives each to the lane that can take it first; at most a little waits
unsent in a lane (TCP_NOTSENT_LOWAT), so that a slow one holds up no more than that. The receiver
takes the chunk that is next; a lane that is ahead is not read any further, so memory is bounded by
one chunk per lane. Every chunk travels on one lane in the order of numbers, so the next one is at
the head of some lane, or lost. One stream at a time uses a bundle, and the next one finds its
connections warm.
"""

import contextlib
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from peer.swarm.bulk_stream import LINGER_SECONDS, LOOK_SECONDS, BulkStream
from peer.swarm.lane_frames import (
    CHUNK_BYTES,
    DATA,
    END,
    HEADER_BYTES,
    TAG_BYTES,
    ChunkHeader,
    LaneError,
    Sealer,
    Unsealer,
)

_UNSENT_BYTES = 2 * CHUNK_BYTES
_TCP_NOTSENT_LOWAT = 25
_LEAST_RTT = struct.Struct("=148xI")
"""Of the kernel's struct tcp_info, in microseconds."""
_KEEP_ALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}
"""Routers forget idle connections within minutes; the kernel notices a lost one in a minute."""
_LAST_WORDS_SECONDS = 2.0
"""For what is still on its way over the lanes when the p2p stream has ended."""


class _Lane:
    """One connection."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        with contextlib.suppress(OSError):  # not every kernel has them
            connection.setsockopt(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, _UNSENT_BYTES)
            for name, seconds in _KEEP_ALIVE.items():
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), seconds)
        self.unsent = memoryview(b"")
        self.is_ended = False
        self._frame = memoryview(bytearray(HEADER_BYTES + CHUNK_BYTES + TAG_BYTES))
        self._filled, self._wanted = 0, HEADER_BYTES
        self.header: ChunkHeader | None = None

    def flush(self) -> None:
        """Send what the connection takes now. Raises OSError."""
        with contextlib.suppress(BlockingIOError):
            self.unsent = self.unsent[self.socket.send(self.unsent) :]

    def read(self) -> None:
        """Take what has come of the frame at the head; notes the end. Raises LaneError."""
        try:
            while self._filled < self._wanted:
                received = self.socket.recv_into(self._frame[self._filled : self._wanted])
                if received == 0:
                    self.is_ended = True
                    return
                self._filled += received
                if self.header is None and self._filled == HEADER_BYTES:
                    self.header = ChunkHeader.parse(self._frame[:HEADER_BYTES])
                    self._wanted = HEADER_BYTES + self.header.num_bytes + TAG_BYTES
        except BlockingIOError:
            pass
        except OSError:  # reset, or timed out
            self.is_ended = True

    @property
    def rtt_seconds(self) -> float:
        """Least that the kernel has seen; 0 if it does not tell."""
        try:
            info = self.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _LEAST_RTT.size)
            return float(_LEAST_RTT.unpack(info)[0]) / 1e6
        except (OSError, struct.error):
            return 0.0

    @property
    def is_whole(self) -> bool:
        """True if a frame is at the head; nothing is read before it is taken."""
        return self._filled == self._wanted

    def take(self) -> memoryview:
        """The frame at the head; valid until the next read."""
        frame = self._frame[: self._filled]
        self._filled, self._wanted, self.header = 0, HEADER_BYTES, None
        return frame


class Bundle:
    """Lanes between two members and their keys; one thread may send while another receives."""

    def __init__(
        self,
        connections: Iterable[socket.socket],
        *,
        bundle_id: bytes,
        secret: bytes,
        is_owner: bool,
    ) -> None:
        """Takes over the sockets; `is_owner` on the side that asked for the bundle."""
        self.bundle_id = bundle_id
        self._lanes = [_Lane(connection) for connection in connections]
        self._sealer = Sealer(secret, is_owner=is_owner)
        self._unsealer = Unsealer(secret, is_owner=not is_owner)
        self._plain = memoryview(b"")
        self._sending, self._receiving = threading.Lock(), threading.Lock()
        self._is_closed = False
        self.is_ending = False
        """True while its last stream only waits for the other side's end."""

    @property
    def num_lanes(self) -> int:
        """Connections."""
        return len(self._lanes)

    def is_alive(self) -> bool:
        """True if it may carry another stream: no lane has ended."""
        for lane in self._lanes:
            try:
                if not lane.socket.recv(1, socket.MSG_PEEK):
                    return False
            except BlockingIOError:
                continue
            except OSError:
                return False
        return not self._is_closed

    def close(self) -> None:
        """Drop all lanes; whoever waits on one is woken."""
        self._is_closed = True
        for lane in self._lanes:
            with contextlib.suppress(OSError):
                lane.socket.shutdown(socket.SHUT_RDWR)

    @property
    def rtt_seconds(self) -> float:
        """Least that the kernel has seen; 0 if it does not tell."""
        return min(lane.rtt_seconds for lane in self._lanes)

    # Sending ----------------------------------------------------------------------------------

    def send(self, data: memoryview) -> None:
        """Give the bytes to the lanes; returns when they have all of them. Raises OSError."""
        with self._sending:
            begin = 0
            while begin < len(data) or any(lane.unsent for lane in self._lanes):
                is_more = begin < len(data)
                waiting = [lane for lane in self._lanes if is_more or lane.unsent]
                for lane in _ready(waiting, select.POLLOUT):
                    if not lane.unsent and begin < len(data):
                        sealed = self._sealer.seal(DATA, data[begin : begin + CHUNK_BYTES])
                        lane.unsent = memoryview(sealed)
                        begin += CHUNK_BYTES
                    lane.flush()

    def send_end(self) -> bool:
        """Say that this side is done with the stream, unless that would have to wait or it is not
        so; True if it is said.
        """
        if not self._sending.acquire(blocking=False):
            return False
        try:
            if not self._receiving.acquire(blocking=False):
                return False
            try:
                if self._is_closed or self._plain or any(lane.unsent for lane in self._lanes):
                    return False
                ready = _ready(self._lanes, select.POLLOUT, seconds=0.0)
                if not ready:
                    return False
                taken = self._unsealer.number.to_bytes(8, "big")
                ready[0].unsent = memoryview(self._sealer.seal(END, taken))
                ready[0].flush()
                return not ready[0].unsent
            finally:
                self._receiving.release()
        except OSError:
            return False
        finally:
            self._sending.release()

    # Receiving --------------------------------------------------------------------------------

    def receive(self, target: memoryview, seconds: float) -> int:
        """Put bytes of the stream into `target`; returns how many, 0 at the stream's end.

        Raises BlockingIOError if nothing came in time, LaneError, and OSError if a lane has ended.
        """
        with self._receiving:
            if not self._plain:
                kind, data = self._next_chunk(seconds)
                if kind == END:
                    return 0
                self._plain = memoryview(data)
            taken = min(len(self._plain), len(target))
            target[:taken] = self._plain[:taken]
            self._plain = self._plain[taken:]
            return taken

    def receive_end(self, seconds: float) -> bool:
        """Wait for the other side's end; True if it has taken all that was sent, and said nothing
        else before.
        """
        with self._receiving, contextlib.suppress(LaneError, OSError):
            if self._plain:
                return False
            kind, data = self._next_chunk(seconds)
            return kind == END and int.from_bytes(data, "big") == self._sealer.number
        return False

    def _next_chunk(self, seconds: float) -> tuple[int, bytes]:
        deadline_seconds = time.monotonic() + seconds
        while True:
            for lane in self._lanes:
                is_next = lane.header is not None and lane.header.number <= self._unsealer.number
                if is_next and lane.is_whole:
                    return self._unsealer.unseal(lane.take())
            has_ended = any(lane.is_ended for lane in self._lanes)
            waiting = [lane for lane in self._lanes if not (lane.is_whole or lane.is_ended)]
            left_seconds = 0.0 if has_ended else max(deadline_seconds - time.monotonic(), 0.0)
            ready = _ready(waiting, select.POLLIN, seconds=left_seconds) if waiting else []
            for lane in ready:
                lane.read()
            if ready:
                continue
            if has_ended:
                raise ConnectionError("a lane has ended")
            if not waiting:
                raise LaneError(f"chunk {self._unsealer.number} is missing: all lanes are past it")
            raise BlockingIOError("nothing came")


def _ready(lanes: list[_Lane], events: int, seconds: float | None = None) -> list[_Lane]:
    """Lanes that can go on, or have ended."""
    poller = select.poll()
    lane_by_fd = {lane.socket.fileno(): lane for lane in lanes}
    for fd in lane_by_fd:
        poller.register(fd, events)
    found = poller.poll(None if seconds is None else 1000.0 * seconds)
    return [lane_by_fd[fd] for fd, _ in found]


class LaneStream(BulkStream):
    """A stream over a bundle; the p2p stream by which it was agreed on ends with it, and it with
    that one.
    """

    def __init__(
        self,
        fd: int,
        *,
        bundle: Bundle,
        is_opener: bool,
        on_end: Callable[[Bundle, bool], None],
        **pace: Any,
    ) -> None:
        """`fd`, `pace`: as BulkStream has them; `on_end(bundle, is_clean)` gets the bundle back, to
        be used again if clean.
        """
        super().__init__(fd, head=b"", **pace)
        self._bundle, self._is_opener, self._on_end = bundle, is_opener, on_end
        self._ended_seconds: float | None = None
        """When the p2p stream was seen to have ended, on the monotonic clock."""
        self._ending = threading.Lock()
        self._is_lingering = False

    def _write(self, part: memoryview) -> None:
        if self._is_closed:
            raise ConnectionError("the stream is closed")
        self._bundle.send(part)

    def _receive(self, target: memoryview) -> int:
        if self._is_closed:
            return 0
        try:
            return self._bundle.receive(target, LOOK_SECONDS)
        except BlockingIOError:
            self._check_p2p_stream()
            raise
        except LaneError as error:
            self._finish(is_clean=False)
            raise ConnectionError(str(error)) from error

    def _check_p2p_stream(self) -> None:
        now = time.monotonic()
        if self._ended_seconds is None:
            poller = select.poll()
            poller.register(self._socket, select.POLLIN)
            if poller.poll(0):
                self._ended_seconds = now
        elif now - self._ended_seconds > _LAST_WORDS_SECONDS:
            raise ConnectionError("the other side has left the stream")

    def linger(self) -> None:
        """Wait a moment until the other side is done with the stream, then close."""
        self._is_lingering = self._bundle.is_ending = True
        self._finish(is_clean=self._bundle.receive_end(LINGER_SECONDS))

    def close(self) -> None:
        """Leave the stream, unless it lingers and ends by itself; who waits gets a StreamError."""
        if not self._is_closed and not self._is_lingering:
            self._finish(is_clean=not self._is_opener and self._bundle.send_end())

    def _finish(self, *, is_clean: bool) -> None:
        with self._ending:
            if self._is_closed:
                return
            super().close()
        if not is_clean:
            self._bundle.close()
        self._on_end(self._bundle, is_clean)

    def __del__(self) -> None:
        self.close()
        super().__del__()
