"""Messages between the daemon and its children over inherited socket pairs: small, local, never
bulk.

Bulk data lives in shared memory (shared_vectors.py). A message is a JSON object with a "kind";
bytes travel as {"$bytes": base64}. Frames are a 4-byte big-endian length and the JSON. A socket
pair has no name, so nothing is left behind when a process is killed, and a closed end tells the
other that its partner is gone.
"""

import asyncio
import base64
import json
import socket
import threading
from typing import Any

Message = dict[str, Any]

MAX_MESSAGE_BYTES = 64 * 2**20


class ChannelClosed(Exception):
    """The other end is gone."""


def _encode_special(value: object) -> object:
    if isinstance(value, bytes):
        return {"$bytes": base64.b64encode(value).decode()}
    raise TypeError(f"{type(value).__name__} cannot be sent; use plain data and bytes")


def _decode_special(plain: dict[str, Any]) -> Any:
    return base64.b64decode(plain["$bytes"]) if "$bytes" in plain else plain


def encode(message: Message) -> bytes:
    """One frame."""
    body = json.dumps(message, default=_encode_special).encode()
    return len(body).to_bytes(4, "big") + body


def decode(body: bytes) -> Message:
    """Message of one frame's body."""
    message: Message = json.loads(body, object_hook=_decode_special)
    return message


class Channel:
    """Blocking end, for the trainer. `send` may be called from several threads, `receive` from
    one.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._send_lock = threading.Lock()

    @classmethod
    def from_fd(cls, fd: int) -> "Channel":
        """Take over an inherited file descriptor."""
        return cls(socket.socket(fileno=fd))

    def send(self, kind: str, **fields: Any) -> None:
        """Send a message. Raises ChannelClosed."""
        try:
            with self._send_lock:
                self._socket.sendall(encode({"kind": kind, **fields}))
        except OSError as error:
            raise ChannelClosed(str(error)) from error

    def receive(self) -> Message:
        """Wait for the next message. Raises ChannelClosed."""
        length = int.from_bytes(self._read_exactly(4), "big")
        return decode(self._read_exactly(length))

    def _read_exactly(self, num_bytes: int) -> bytes:
        data = bytearray()
        while len(data) < num_bytes:
            try:
                part = self._socket.recv(num_bytes - len(data))
            except OSError as error:
                raise ChannelClosed(str(error)) from error
            if not part:
                raise ChannelClosed("the other end closed")
            data += part
        return bytes(data)

    def close(self) -> None:
        """Close this end; a blocked `receive` in another thread ends with ChannelClosed."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self._socket.close()


class AsyncChannel:
    """asyncio end, for the daemon and the swarm process."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def from_socket(cls, sock: socket.socket) -> "AsyncChannel":
        """Take over a connected socket."""
        sock.setblocking(False)
        reader, writer = await asyncio.open_connection(sock=sock, limit=2 * MAX_MESSAGE_BYTES)
        return cls(reader, writer)

    def send(self, kind: str, **fields: Any) -> None:
        """Queue a message. Raises ChannelClosed when the other end is known to be gone."""
        if self._writer.is_closing():
            raise ChannelClosed("the other end closed")
        self._writer.write(encode({"kind": kind, **fields}))

    async def receive(self) -> Message:
        """Wait for the next message. Raises ChannelClosed."""
        try:
            length = int.from_bytes(await self._reader.readexactly(4), "big")
            return decode(await self._reader.readexactly(length))
        except (asyncio.IncompleteReadError, OSError) as error:
            raise ChannelClosed(str(error)) from error

    async def close(self) -> None:
        """Flush what is queued and close."""
        self._writer.close()
        try:
            await self._writer.wait_closed()
        except OSError:
            pass
