"""A two-way stream to one member on the event loop, until it is detached for threads."""

import asyncio
from typing import Any, Protocol, TypeVar

from google.protobuf.message import DecodeError, Message

from peer.swarm.bulk_stream import MAX_HEADER_BYTES, BulkStream, StreamError
from peer.swarm.upload_pacer import UploadPacer

_WRITE_BYTES = 2**18

_M = TypeVar("_M", bound=Message)


class StreamHost(Protocol):
    """What a stream needs of its transport."""

    upload_pacer: UploadPacer

    def count(self, peer_id: str, *, sent_bytes: int = 0, received_bytes: int = 0) -> None:
        """Book bytes exchanged with a member."""

    async def bulk_stream(self, peer_id: str, stream: "Stream") -> BulkStream:
        """Make a stream one for threads."""


class Stream:
    """A two-way stream: protobuf headers, raw bytes, and an explicit acknowledgement of the end."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        peer_id: str,
        transport: StreamHost,
        is_opener: bool = False,
    ) -> None:
        self.is_opener = is_opener
        self._reader, self._writer = reader, writer
        self._peer_id, self._transport = peer_id, transport

    async def send_message(self, message: Message) -> None:
        """Send a length-prefixed message."""
        data = message.SerializeToString()
        await self.send_bytes(len(data).to_bytes(4, "big") + data)

    async def send_bytes(self, data: bytes | memoryview) -> None:
        """Send raw bytes at the pace that the owner allows."""
        view = memoryview(data).cast("B")
        try:
            pacer = self._transport.upload_pacer
            size = pacer.slice_bytes or _WRITE_BYTES
            for begin in range(0, len(view), size):
                part = view[begin : begin + size]
                await asyncio.sleep(pacer.reserve(len(part)))
                self._transport.count(self._peer_id, sent_bytes=len(part))
                self._writer.write(part)
                await self._writer.drain()
        except OSError as error:
            raise StreamError(f"stream broke while sending: {error}") from error

    async def read_message(self, message_type: type[_M]) -> _M:
        """Read a length-prefixed message."""
        length = int.from_bytes(await self.read_bytes(4), "big")
        if length > MAX_HEADER_BYTES:
            raise StreamError(f"header of {length} bytes; at most {MAX_HEADER_BYTES} are allowed")
        try:
            message: _M = message_type.FromString(await self.read_bytes(length))
        except DecodeError as error:
            raise StreamError(f"header is no {message_type.__name__}: {error}") from error
        return message

    async def read_bytes(self, num_bytes: int) -> bytes:
        """Read exactly so many bytes."""
        try:
            data = await self._reader.readexactly(num_bytes)
        except (asyncio.IncompleteReadError, OSError) as error:
            raise StreamError(f"stream ended early: {error}") from error
        self._transport.count(self._peer_id, received_bytes=num_bytes)
        return data

    async def acknowledge(self) -> None:
        """Tell the sender that everything has arrived; an end alone proves nothing."""
        await self.send_bytes(b"A")

    async def wait_acknowledged(self) -> None:
        """Wait until the other side says that it has everything."""
        if await self.read_bytes(1) != b"A":
            raise StreamError("end of stream was not acknowledged")

    async def detach(self) -> BulkStream:
        """The same stream for threads, on both sides; this object is of no use afterwards. Raises
        StreamError.
        """
        try:
            return await self._transport.bulk_stream(self._peer_id, self)
        except OSError as error:
            raise StreamError(f"stream broke: {error}") from error
        finally:
            self._writer.close()

    async def release(self) -> tuple[int, bytes]:
        """Its descriptor, to be copied, and what has been read from it already. Raises OSError."""
        flow: Any = self._writer.transport
        flow.set_write_buffer_limits(0)
        await self._writer.drain()
        flow.pause_reading()
        self._reader.feed_eof()
        head = await self._reader.read()  # what has been read already; does not wait
        fd: int = self._writer.get_extra_info("socket").fileno()
        return fd, head

    def close(self) -> None:
        """Drop the stream."""
        self._writer.close()
