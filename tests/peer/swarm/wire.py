"""Streams and calls between members of one process, for tests of state transfer."""

import asyncio
import socket
from collections.abc import Awaitable, Callable

from peer.swarm.state_server import StateServer
from peer.swarm.transport import PeerCallError, Stream, StreamError
from peer.swarm.upload_pacer import UploadPacer
from protos.muster.v1 import state_pb2

Handler = Callable[[str, Stream], Awaitable[None]]


class Wire:
    """Transport between members of one process: real streams over socket pairs, opened by name."""

    upload_pacer = UploadPacer(None)

    def __init__(self) -> None:
        self.handler_by_peer: dict[str, Handler] = {}
        self.server_by_peer: dict[str, StateServer] = {}
        self.received_bytes = 0
        self.tasks: list[asyncio.Task[None]] = []

    def count(self, peer_id: str, *, sent_bytes: int = 0, received_bytes: int = 0) -> None:
        if peer_id != "newcomer":
            self.received_bytes += received_bytes

    async def open_stream(self, peer_id: str, name: str) -> Stream:
        if peer_id not in self.handler_by_peer:
            raise PeerCallError("nobody is there", is_down=True)
        left, right = socket.socketpair()
        mine, theirs = [
            Stream(
                *await asyncio.open_connection(sock=end),
                peer_id=peer_id if end is left else "newcomer",
                transport=self,  # type: ignore[arg-type]
            )
            for end in (left, right)
        ]
        self.tasks.append(asyncio.ensure_future(self._serve(peer_id, theirs)))
        return mine

    async def call(
        self, peer_id: str, name: str, request: state_pb2.StateInfoRequest, kind: type
    ) -> state_pb2.StateInfoResponse:
        """Ask a donor what it holds."""
        if peer_id not in self.server_by_peer:
            raise PeerCallError("nobody is there", is_down=True)
        return await self.server_by_peer[peer_id]._on_state_info("newcomer", request)

    async def _serve(self, peer_id: str, stream: Stream) -> None:
        try:
            await self.handler_by_peer[peer_id]("newcomer", stream)
        except (StreamError, TimeoutError):
            pass
        finally:
            stream.close()
