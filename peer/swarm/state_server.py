"""The donor's side of state transfer: answers members about the state, and serves it and averaged
bytes.

A whole state is served from an immutable image (state_image.py), piece by piece, so that a reader
costs one piece of memory and no round waits for it. All readers together are paced to a few
hundredths of this machine's processor time, and to half of the owner's upload limit, so that
training and rounds keep their speed.
"""

import asyncio
import logging
import os

from peer.swarm.replica import Replica
from peer.swarm.state_image import ImageShelf, StateImage, make_image
from peer.swarm.state_transfer import AVERAGED_STREAM, SNAPSHOT_STREAM, STATE_INFO_CALL
from peer.swarm.transport import Stream, StreamError, Transport
from protos.muster.v1 import state_pb2

logger = logging.getLogger(__name__)

MAX_READERS = 8
_CPU_SECONDS_PER_BYTE = 5e-9
"""Of this process and p2pd together for a served byte, by ops/bench/donor: 4.9 ns on a Xeon of
2.6 GHz; processors differ by less than the room that is left up to 5 %.
"""
_CPU_RATIO = 0.04
"""Part of the machine's processor time that serving may take."""
_UPLOAD_RATIO = 0.5
"""Part of the owner's upload limit; the rest is left to rounds."""
_REQUEST_SECONDS = 60.0
"""A reader that asks for nothing for so long, or does not take a piece, is let go."""
_MOST_AVERAGED, _MOST_SNAPSHOTS = 4, 2
"""Streams of one member at once: what it reads slowly, or not at all, is kept for it so long."""
_SWEEP_SECONDS = 15.0


class Pace:
    """Keeps the sum of all senders at a rate."""

    def __init__(self, bytes_per_second: float) -> None:
        self._bytes_per_second = bytes_per_second
        self._next_seconds = 0.0

    async def wait(self, num_bytes: int) -> None:
        """Wait for the turn of so many bytes."""
        now = asyncio.get_running_loop().time()
        self._next_seconds = max(self._next_seconds, now)
        wait_seconds = self._next_seconds - now
        self._next_seconds += num_bytes / self._bytes_per_second
        if wait_seconds > 0:
            await asyncio.sleep(wait_seconds)


def serving_bytes_per_second(*, num_cpus: int, upload_limit_mbit: float | None) -> float:
    """Rate at which a donor serves all its readers together."""
    rate = _CPU_RATIO * num_cpus / _CPU_SECONDS_PER_BYTE
    if upload_limit_mbit:
        rate = min(rate, _UPLOAD_RATIO * upload_limit_mbit * 125_000)
    return rate


class StateServer:
    """Answers members' questions about the state."""

    def __init__(
        self, replica: Replica, transport: Transport, *, upload_limit_mbit: float | None
    ) -> None:
        """Images are nameless files on the disk of the replica's checkpoints."""
        self._replica, self._transport = replica, transport
        rate = serving_bytes_per_second(
            num_cpus=len(os.sched_getaffinity(0)), upload_limit_mbit=upload_limit_mbit
        )
        self._pace = Pace(rate)
        self._shelf = ImageShelf()
        self._making = asyncio.Lock()

    async def start(self) -> None:
        """Begin to answer."""
        await self._transport.serve_messages(
            STATE_INFO_CALL, self._on_state_info, state_pb2.StateInfoRequest
        )
        for name, handler, most in (
            (AVERAGED_STREAM, self._on_averaged, _MOST_AVERAGED),
            (SNAPSHOT_STREAM, self._on_snapshot, _MOST_SNAPSHOTS),
        ):
            await self._transport.serve_streams(name, handler, most_streams=most)

    async def sweep(self) -> None:
        """Give back the space of images that nobody reads, for ever."""
        while True:
            await asyncio.sleep(_SWEEP_SECONDS)
            self._shelf.drop_unused(asyncio.get_running_loop().time())
            self._replica.averages.is_serving = self._shelf.oldest_step is not None

    def close(self) -> None:
        """Drop all images."""
        self._shelf.close()

    async def _on_state_info(
        self, peer_id: str, request: state_pb2.StateInfoRequest
    ) -> state_pb2.StateInfoResponse:
        replica = self._replica
        response = state_pb2.StateInfoResponse(
            incarnation_record=replica.record, directive=replica.directive
        )
        if not replica.is_current:
            response.reason = "no state of the current incarnation is held yet"
            return response
        first = request.from_outer_step if request.incarnation == replica.incarnation else 0
        attestations, certificates, directives = replica.state_info(from_outer_step=first)
        response.attestations.extend(attestations)
        response.certificates.extend(certificates)
        response.directives.extend(directives)
        response.directives.extend(replica.recent_directives)
        newest = next(reversed(replica.certificate_by_step.values()), None)
        if newest is not None:
            response.newest_certificate.CopyFrom(newest)
        return response

    async def _on_averaged(self, peer_id: str, stream: Stream) -> None:
        request = await stream.read_message(state_pb2.AveragedRequest)
        averaged = self._replica.averaged(request.averaged_digest)
        if averaged is None:
            reason = "these averaged bytes are not held"
            await stream.send_message(state_pb2.AveragedHeader(refusal_reason=reason))
            return
        await stream.send_message(
            state_pb2.AveragedHeader(
                piece_digests=averaged.piece_digests, total_bytes=len(averaged.encoded.data)
            )
        )
        await stream.send_bytes(averaged.encoded.data)
        await stream.wait_acknowledged()

    # Whole states -----------------------------------------------------------------------------

    async def _on_snapshot(self, peer_id: str, stream: Stream) -> None:
        request = await stream.read_message(state_pb2.SnapshotRequest)
        place = (request.incarnation, request.outer_step)
        image, refusal = await self._borrow(place)
        if image is None:
            await stream.send_message(refusal)
            return
        try:
            await stream.send_message(
                state_pb2.SnapshotHeader(
                    state_meta=image.snapshot.meta.to_json(),
                    piece_digests=[d for digests in image.snapshot.piece_digests for d in digests],
                    total_bytes=image.layout.total_bytes,
                    unreported_certificates=self._replica.carried_certificates(),
                    directive=image.snapshot.directive,
                )
            )
            while await self._serve_run(image, stream):
                pass
        finally:
            self._shelf.give_back(place, asyncio.get_running_loop().time())

    async def _serve_run(self, image: StateImage, stream: Stream) -> bool:
        """Serve one run of pieces; False when the reader wants no more."""
        wanted = await asyncio.wait_for(
            stream.read_message(state_pb2.PieceRequest), _REQUEST_SECONDS
        )
        if not 0 <= wanted.begin_piece <= wanted.end_piece <= image.layout.num_pieces:
            raise StreamError(f"asked for pieces {wanted.begin_piece} to {wanted.end_piece}")
        for piece in range(wanted.begin_piece, wanted.end_piece):
            data = await asyncio.to_thread(image.read_piece, piece)
            await self._pace.wait(len(data))
            await asyncio.wait_for(stream.send_bytes(data), _REQUEST_SECONDS)
        return bool(wanted.begin_piece < wanted.end_piece)

    async def _borrow(
        self, place: tuple[int, int]
    ) -> tuple[StateImage | None, state_pb2.SnapshotHeader]:
        """An image for one more reader, or the refusal."""
        busy = state_pb2.SnapshotHeader(is_busy=True)
        if self._shelf.num_readers >= MAX_READERS:
            busy.refusal_reason = f"{MAX_READERS} members are being served"
            return None, busy
        async with self._making:
            image = self._shelf.borrow(place)
            if image is not None:
                return image, busy
            if not self._shelf.make_room():
                busy.refusal_reason = "other states are being served"
                return None, busy
            try:
                made = await asyncio.to_thread(
                    make_image,
                    self._replica,
                    incarnation=place[0],
                    outer_step=place[1],
                    folder=self._replica.store.folder,
                )
            except OSError as error:
                logger.warning("cannot serve a state: %s", error)
                return None, state_pb2.SnapshotHeader(refusal_reason=f"no image: {error.strerror}")
            if made is None:
                reason = f"state {place[0]}/{place[1]} is not held any more"
                return None, state_pb2.SnapshotHeader(refusal_reason=reason)
            self._shelf.put(made, asyncio.get_running_loop().time())
            self._replica.averages.is_serving = True
            return self._shelf.borrow(place), busy
