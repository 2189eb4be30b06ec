"""Averaging of one attempt: a plain butterfly over p2p streams, every byte checked, the result
encoded once.

The vector is cut into the pieces of digest.py; each member that can be dialled reduces a run of
pieces. A member opens one stream to each other reducer, sends PartHeader and its pieces of that
run, and receives ReducedHeader and the reduced pieces on the same stream, which it acknowledges.
The reducer holds every piece against the digest that its sender committed to when it joined, so
nobody chooses after seeing others; it sums float32(w_i / W) * x_i in member order, each operation
rounded on its own, encodes the sum once, and everybody including the reducer decodes the same
bytes. Any failure ends the attempt whole, with a reason that names the peer. A member without work
sends a header and no piece.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import numpy as np

from peer.swarm.codecs import EncodedVector, piece_bounds, piece_byte_bounds
from peer.swarm.transport import PeerCallError, Stream, StreamError, Transport
from protos.contract.codecs_wire import Codec
from protos.contract.digest import Float32Vector, digest_of_pieces, piece_digest
from protos.contract.errors import CorruptDataError
from protos.muster.v1 import rounds_pb2, state_pb2

PART_STREAM = "part"
_EARLY_SECONDS = 15.0
"""How long a stream that arrives before the own group waits for it."""


class ReduceError(Exception):
    """The attempt cannot be averaged; `peer_id` is whose fault it looks like, `is_down` if it looks
    dead.
    """

    def __init__(self, reason: str, *, peer_id: str = "", is_down: bool = False) -> None:
        super().__init__(reason)
        self.peer_id, self.is_down = peer_id, is_down


@dataclass(frozen=True, slots=True, kw_only=True)
class AveragedVector:
    """Result of a reduction; every member holds the same bytes."""

    encoded: EncodedVector
    piece_digests: tuple[bytes, ...]
    """Of the encoded pieces."""

    @classmethod
    def from_encoded(cls, encoded: EncodedVector) -> "AveragedVector":
        """Hash the pieces."""
        return cls(encoded=encoded, piece_digests=encoded.digests())

    @property
    def averaged_digest(self) -> bytes:
        """What the value names."""
        return digest_of_pieces(self.piece_digests)


class Reduction:
    """One member's part in one attempt; made when the group is accepted, used once."""

    def __init__(
        self,
        transport: Transport,
        *,
        place: tuple[int, int, int],
        group: rounds_pb2.FormGroup,
        tokens_by_peer: dict[str, int],
        own_peer_id: str,
        codec: Codec,
        num_values: int,
        own: EncodedVector | None,
        on_exchanged: Callable[[], None] | None = None,
    ) -> None:
        """`place` = (incarnation, outer step, attempt); `own` is read while the reduction runs;
        a member without work has none.

        `on_exchanged` is called when the pieces that this member reduces are here and summed.
        """
        self._on_exchanged = on_exchanged
        self.place = place
        self._transport = transport
        self._own_peer_id = own_peer_id
        self._codec, self._num_values, self._own = codec, num_values, own
        self._members = [member.contribution.peer_id for member in group.members]
        self._join_by_peer = {member.contribution.peer_id: member for member in group.members}
        ends = list(group.reducer_piece_ends)
        begins = [0, *ends[:-1]]
        self._run_by_peer = dict(zip(self._members, zip(begins, ends, strict=True), strict=True))
        total = sum(tokens_by_peer[peer] for peer in self._members)
        self._weight_by_peer = {
            peer: np.float32(tokens_by_peer[peer] / total) for peer in self._members
        }
        working = [member for member in group.members if member.contribution.ranges]
        self._result_codec = codec.for_result(len(working))
        self._result = bytearray(self._result_codec.encoded_bytes(num_values))
        self._digests: list[bytes] = [b""] * ends[-1]
        begin, end = self._run_by_peer[own_peer_id]
        self._own_run = (begin, end)
        self._part_by_peer: dict[str, list[bytes]] = {}
        """Encoded pieces of the own run."""
        self._all_parts = asyncio.Event()
        self._reduced = asyncio.Event()
        self._failure: ReduceError | None = None
        self._failed = asyncio.Event()

    async def run(self) -> AveragedVector:
        """Average. Raises ReduceError."""
        jobs: list[Awaitable[None]] = [self._reduce_own(), self._raise_on_failure()]
        for peer_id in self._members:
            begin, end = self._run_by_peer[peer_id]
            if peer_id != self._own_peer_id and begin < end:
                jobs.append(self._exchange_with(peer_id))
        tasks = [asyncio.ensure_future(job) for job in jobs]
        watcher = tasks.pop(1)
        try:
            waiting = set(tasks)
            while waiting:
                done, _ = await asyncio.wait(
                    {*waiting, watcher}, return_when=asyncio.FIRST_COMPLETED
                )
                for task in done:
                    task.result()
                waiting -= done
        except ReduceError as error:
            self.fail(error)
            raise
        finally:
            for task in (*tasks, watcher):
                task.cancel()
            await asyncio.gather(*tasks, watcher, return_exceptions=True)
        encoded = EncodedVector(
            codec=self._result_codec,
            num_values=self._num_values,
            data=memoryview(self._result).toreadonly(),
        )
        return AveragedVector(encoded=encoded, piece_digests=tuple(self._digests))

    def fail(self, error: ReduceError) -> None:
        """End the reduction; streams that wait for it are told why."""
        if self._failure is None:
            self._failure = error
        self._failed.set()

    async def _raise_on_failure(self) -> None:
        await self._failed.wait()
        assert self._failure is not None
        raise self._failure

    # As a reducer -----------------------------------------------------------------------------

    async def serve(self, sender: str, header: state_pb2.PartHeader, stream: Stream) -> None:
        """Take a member's pieces of the own run and answer with the reduced ones."""
        join = self._join_by_peer.get(sender)
        has_work = join is not None and len(join.contribution.ranges) > 0
        begin, end = self._own_run
        wanted = (begin, end) if has_work else (begin, begin)
        if join is None or (header.begin_piece, header.end_piece) != wanted:
            found = f"pieces {header.begin_piece}-{header.end_piece}"
            await self._refuse(stream, f"{found} of {sender}; expected {wanted}")
            return
        try:
            if has_work:
                self._part_by_peer[sender] = await self._receive_part(sender, stream)
            self._check_all_parts()
        except (ReduceError, StreamError) as error:
            failure = ReduceError(f"part of {sender}: {error}", peer_id=sender)
            self.fail(failure)
            await self._refuse(stream, str(failure))
            return
        await self._wait_reduced()
        if self._failure is not None:
            await self._refuse(stream, str(self._failure))
            return
        digests = self._digests[begin:end]
        await stream.send_message(state_pb2.ReducedHeader(piece_digests=digests))
        await stream.send_bytes(self._result_run(begin, end))
        await stream.wait_acknowledged()

    def _result_run(self, begin: int, end: int) -> memoryview:
        """Encoded bytes of a run of pieces of the result."""
        first, last = piece_byte_bounds(self._result_codec, begin, end, self._num_values)
        return memoryview(self._result)[first:last]

    async def _wait_reduced(self) -> None:
        waits = [asyncio.ensure_future(e.wait()) for e in (self._reduced, self._failed)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    async def _refuse(self, stream: Stream, reason: str) -> None:
        await stream.send_message(state_pb2.ReducedHeader(refusal_reason=reason))

    async def _receive_part(self, sender: str, stream: Stream) -> list[bytes]:
        begin, end = self._own_run
        pieces = []
        for piece in range(begin, end):
            low, high = piece_byte_bounds(self._codec, piece, piece + 1, self._num_values)
            data = await stream.read_bytes(high - low)
            if piece_digest(data) != self._join_by_peer[sender].piece_digests[piece]:
                raise ReduceError(f"piece {piece} is not what {sender} committed to")
            pieces.append(data)
        return pieces

    def _check_all_parts(self) -> None:
        begin, end = self._own_run
        working = {p for p in self._members if self._join_by_peer[p].contribution.ranges}
        if begin == end or working <= {*self._part_by_peer, self._own_peer_id}:
            self._all_parts.set()

    async def _reduce_own(self) -> None:
        """Sum the own run once every working member's pieces are here; `serve` then hands it
        out.
        """
        begin, end = self._own_run
        self._check_all_parts()
        await self._all_parts.wait()
        if begin < end:
            await asyncio.to_thread(self._sum_own_run)
        self._reduced.set()
        if self._on_exchanged is not None:
            self._on_exchanged()

    def _sum_own_run(self) -> None:
        for piece in range(*self._own_run):
            low, high = piece_bounds(piece, piece + 1, self._num_values)
            total, values = np.zeros((2, high - low), dtype=np.float32)
            for peer_id in self._members:
                if self._join_by_peer[peer_id].contribution.ranges:
                    self._decode_piece(peer_id, piece, values)
                    np.multiply(values, self._weight_by_peer[peer_id], out=values)
                    np.add(total, values, out=total)
            encoded = self._result_run(piece, piece + 1)
            try:
                encoded[:] = self._result_codec.encode(total)
            except CorruptDataError as error:
                raise ReduceError(f"sum of piece {piece}: {error}") from error
            self._digests[piece] = piece_digest(encoded)

    def _decode_piece(self, peer_id: str, piece: int, out: Float32Vector) -> None:
        """Values of a working member's piece of the own run, checked."""
        if peer_id == self._own_peer_id:
            assert self._own is not None
            self._own.decode_run(piece, piece + 1, out)
            return
        try:
            self._codec.decode(self._part_by_peer[peer_id][piece - self._own_run[0]], out)
        except CorruptDataError as error:
            raise ReduceError(f"piece {piece} of {peer_id}: {error}", peer_id=peer_id) from error

    # As a sender ------------------------------------------------------------------------------

    async def _exchange_with(self, reducer: str) -> None:
        """Send the own pieces of a reducer's run and take the reduced ones."""
        stream: Stream | None = None
        try:
            stream = await self._transport.open_stream(reducer, PART_STREAM)
            await self._send_part(reducer, stream)
            await self._receive_reduced(reducer, stream)
            await stream.acknowledge()
        except PeerCallError as error:
            reason = f"{reducer} cannot be reached: {error}"
            raise ReduceError(reason, peer_id=reducer, is_down=error.is_down) from error
        except StreamError as error:
            raise ReduceError(f"stream to {reducer}: {error}", peer_id=reducer) from error
        finally:
            if stream is not None:
                stream.close()

    async def _send_part(self, reducer: str, stream: Stream) -> None:
        begin, end = self._run_by_peer[reducer]
        has_work = len(self._join_by_peer[self._own_peer_id].contribution.ranges) > 0
        incarnation, outer_step, attempt = self.place
        await stream.send_message(
            state_pb2.PartHeader(
                incarnation=incarnation,
                outer_step=outer_step,
                attempt=attempt,
                begin_piece=begin,
                end_piece=end if has_work else begin,
            )
        )
        if has_work:
            assert self._own is not None
            await stream.send_bytes(self._own.run(begin, end))

    async def _receive_reduced(self, reducer: str, stream: Stream) -> None:
        begin, end = self._run_by_peer[reducer]
        header = await stream.read_message(state_pb2.ReducedHeader)
        if header.refusal_reason:
            raise ReduceError(f"{reducer}: {header.refusal_reason}")
        if len(header.piece_digests) != end - begin:
            found = f"{len(header.piece_digests)} digests for {end - begin} pieces"
            raise ReduceError(f"{reducer} sent {found}", peer_id=reducer)
        for piece, digest in enumerate(header.piece_digests, start=begin):
            await self._receive_reduced_piece(reducer, stream, piece, digest)

    async def _receive_reduced_piece(
        self, reducer: str, stream: Stream, piece: int, digest: bytes
    ) -> None:
        first, last = piece_bounds(piece, piece + 1, self._num_values)
        encoded = self._result_run(piece, piece + 1)
        data = await stream.read_bytes(len(encoded))
        if piece_digest(data) != digest:
            raise ReduceError(f"reduced piece {piece} of {reducer} is damaged", peer_id=reducer)
        try:
            self._result_codec.decode(data, np.empty(last - first, dtype=np.float32))
        except CorruptDataError as error:
            reason = f"reduced piece {piece} of {reducer}: {error}"
            raise ReduceError(reason, peer_id=reducer) from error
        encoded[:] = data
        self._digests[piece] = digest


class ReductionDesk:
    """Hands streams of other members to the reduction that they belong to, which may begin a little
    later.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._current: Reduction | None = None
        self._changed = asyncio.Event()

    async def start(self) -> None:
        """Begin to answer part streams."""
        await self._transport.serve_streams(PART_STREAM, self._on_stream)

    def open(self, reduction: Reduction | None) -> None:
        """Make a reduction the current one."""
        self._current = reduction
        self._changed.set()
        self._changed = asyncio.Event()

    async def _on_stream(self, sender: str, stream: Stream) -> None:
        header = await stream.read_message(state_pb2.PartHeader)
        place = (header.incarnation, header.outer_step, header.attempt)
        reduction = await self._reduction_at(place)
        if reduction is None:
            reason = f"no reduction for incarnation, outer step and attempt {place}"
            await stream.send_message(state_pb2.ReducedHeader(refusal_reason=reason))
            return
        await reduction.serve(sender, header, stream)

    async def _reduction_at(self, place: tuple[int, int, int]) -> Reduction | None:
        loop = asyncio.get_running_loop()
        deadline_seconds = loop.time() + _EARLY_SECONDS
        wait: Callable[[], float] = lambda: deadline_seconds - loop.time()  # noqa: E731
        while self._current is None or self._current.place < place:
            try:
                await asyncio.wait_for(self._changed.wait(), wait())
            except TimeoutError:
                return None
        return self._current if self._current.place == place else None
