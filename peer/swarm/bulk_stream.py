"""A stream for many bytes, used from threads: no event loop, no copies, no buffer of its own.

asyncio costs two or three copies and one wake-up of the interpreter per 32 KiB that p2pd passes on;
a blocking read with MSG_WAITALL costs one call per piece and fills the caller's memory.
`Stream.detach` makes one.
"""

import contextlib
import os
import socket
import struct
import time
from collections.abc import Callable
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from peer.swarm.upload_pacer import UploadPacer

MAX_HEADER_BYTES = 16 * 2**20
_WRITE_BYTES = 2**20
_READ_BYTES = 2**18
LOOK_SECONDS = 0.2
"""A read returns at least so often what has come, so that progress is seen on a slow link."""
_SOCKET_BYTES = 2**20
LINGER_SECONDS = 5.0

_M = TypeVar("_M", bound=Message)


class StreamError(Exception):
    """A stream ended early or carried something else than agreed."""


class BulkStream:
    """Blocking two-way stream to one member; one thread may send while another receives."""

    def __init__(
        self,
        fd: int,
        *,
        head: bytes,
        upload_pacer: UploadPacer,
        count: Callable[[int, int], None],
    ) -> None:
        """Takes over a copy of `fd`; `head` are bytes that were read from it already.

        `upload_pacer` keeps the owner's limit; `count(sent_bytes, received_bytes)` books traffic.
        """
        self._socket = socket.socket(fileno=os.dup(fd))
        self._socket.setblocking(True)
        look = struct.pack("ll", 0, int(1e6 * LOOK_SECONDS))
        with contextlib.suppress(OSError):
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BYTES)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, look)
        self._head = memoryview(head)
        self._upload_pacer, self._count = upload_pacer, count
        self._is_closed = False
        self.progress_seconds = time.monotonic()
        """When bytes last came in, on the monotonic clock."""
        self.longest_wait_seconds = 0.0
        """For the next bytes that were asked for."""

    def send(self, data: bytes | memoryview) -> None:
        """Send raw bytes at the pace that the owner allows. Raises StreamError."""
        view = memoryview(data).cast("B")
        try:
            size = self._upload_pacer.slice_bytes or _WRITE_BYTES
            for begin in range(0, len(view), size):
                part = view[begin : begin + size]
                wait_seconds = self._upload_pacer.reserve(len(part))
                if wait_seconds > 0:
                    time.sleep(wait_seconds)
                self._write(part)
                self._count(len(part), 0)
        except OSError as error:
            raise StreamError(f"stream broke while sending: {error}") from error

    def read_into(self, target: memoryview) -> None:
        """Fill `target` exactly. Raises StreamError."""
        begin, end = self._take_head(target), len(target)
        try:
            asked_seconds = time.monotonic()
            while begin < end:
                part = target[begin : begin + _READ_BYTES]
                try:
                    received = self._receive(part)
                except BlockingIOError:  # nothing has come meanwhile
                    continue
                if received == 0:
                    raise StreamError(f"stream ended early: {begin} of {end} bytes arrived")
                begin += received
                self._count(0, received)
                self.progress_seconds = now = time.monotonic()
                self.longest_wait_seconds = max(self.longest_wait_seconds, now - asked_seconds)
                asked_seconds = now
        except OSError as error:
            raise StreamError(f"stream broke while receiving: {error}") from error

    def _write(self, part: memoryview) -> None:
        self._socket.sendall(part)

    def _receive(self, target: memoryview) -> int:
        """Bytes put into `target`; 0 at the end. BlockingIOError: nothing has come of late."""
        return self._socket.recv_into(target, len(target), socket.MSG_WAITALL)

    def _take_head(self, target: memoryview) -> int:
        taken = min(len(self._head), len(target))
        target[:taken] = self._head[:taken]
        self._head = self._head[taken:]
        if taken:
            self._count(0, taken)
        return taken

    def read_bytes(self, num_bytes: int) -> bytearray:
        """Read exactly so many bytes."""
        data = bytearray(num_bytes)
        self.read_into(memoryview(data))
        return data

    def send_message(self, message: Message) -> None:
        """Send a length-prefixed message."""
        data = message.SerializeToString()
        self.send(len(data).to_bytes(4, "big") + data)

    def read_message(self, message_type: type[_M]) -> _M:
        """Read a length-prefixed message."""
        length = int.from_bytes(self.read_bytes(4), "big")
        if length > MAX_HEADER_BYTES:
            raise StreamError(f"header of {length} bytes; at most {MAX_HEADER_BYTES} are allowed")
        try:
            message: _M = message_type.FromString(bytes(self.read_bytes(length)))
        except DecodeError as error:
            raise StreamError(f"header is no {message_type.__name__}: {error}") from error
        return message

    def acknowledge(self) -> None:
        """Tell the sender that everything has arrived; an end alone proves nothing."""
        self.send(b"A")

    def linger(self) -> None:
        """Wait a moment for the other side to close first, then close.

        Over QUIC a last message was seen to be lost when its sender closed at once.
        """
        with contextlib.suppress(OSError):
            self._socket.settimeout(LINGER_SECONDS)
            self._socket.recv(1)
        self.close()

    def wait_acknowledged(self) -> None:
        """Wait until the other side says that it has everything."""
        if bytes(self.read_bytes(1)) != b"A":
            raise StreamError("end of stream was not acknowledged")

    def close(self) -> None:
        """Drop the stream; whoever waits on it gets a StreamError."""
        if not self._is_closed:
            self._is_closed = True
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def __del__(self) -> None:
        self._socket.close()
