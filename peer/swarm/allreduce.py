"""The reduce of one attempt: an unpipelined butterfly over member streams, encoded once, checked at every receipt.

Each reducer owns a run of whole pieces. Every member sends a reducer its pieces of that run on one stream, and gets the reduced
pieces back on the same stream. A reducer hashes every piece on arrival against what the member committed to when it joined
the group, refuses values that are not finite, and adds up in member order with one fp32 weight per member:
`sum_i float32(w_i / W) * x_i`, each operation rounded separately, so the result does not depend on arrival. It encodes the
result once; everybody, itself included, takes those bytes. Wire bytes per member: 2 (n-1)/n of the vector, each way.

Any failure ends the attempt with a reason that names the peer; nothing of the state has been touched.
"""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from peer.swarm.transport import PeerUnreachable, Stream, Transport
from protos.contract.digest import PIECE_VALUES, Float32Vector, digest_of_pieces, vector_piece_digests
from protos.muster.v1 import state_pb2

_LOGGER = logging.getLogger(__name__)
_OPEN_SECONDS = 5.0
_KNOWN_GROUP_SECONDS = 10.0
"""A stream may arrive before the group that it belongs to; it waits this long for it."""


class ReduceFailed(Exception):
    """The attempt cannot be completed; the message names the peer and the cause."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReduceMember:
    """One member of the group, in member order (by peer_id)."""

    peer_id: str
    p2p_peer_id: str
    weight_tokens: int
    """0 for a member without work."""
    piece_digests: tuple[bytes, ...]
    """Commitment; empty without work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReduceGroup:
    """Everything that is fixed for one attempt's reduce."""

    incarnation: int
    outer_step: int
    attempt: int
    num_values: int
    own_index: int
    members: tuple[ReduceMember, ...]
    reducer_piece_ends: tuple[int, ...]
    """End of the piece range that each member reduces."""

    @property
    def key(self) -> tuple[int, int, int]:
        """What a stream's header names."""
        return self.incarnation, self.outer_step, self.attempt

    def piece_range(self, index: int) -> tuple[int, int]:
        """Half-open range of pieces that a member reduces."""
        return (self.reducer_piece_ends[index - 1] if index else 0), self.reducer_piece_ends[index]

    def value_range(self, index: int) -> tuple[int, int]:
        """The same in values."""
        begin, end = self.piece_range(index)
        return min(begin * PIECE_VALUES, self.num_values), min(end * PIECE_VALUES, self.num_values)

    def coefficients(self) -> list[np.float32]:
        """Weight of each member, rounded once to fp32; 0 without work."""
        total = sum(member.weight_tokens for member in self.members)
        return [np.float32(member.weight_tokens / total) for member in self.members]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReduceResult:
    """The average on this member."""

    averaged: Float32Vector
    piece_digests: tuple[bytes, ...]
    averaged_digest: bytes
    sent_bytes: int
    received_bytes: int


def weighted_sum(vectors: Sequence[Float32Vector], coefficients: Sequence[np.float32]) -> Float32Vector:
    """Sum in the given order, every multiplication and addition rounded to fp32 on its own."""
    total = vectors[0] * coefficients[0]
    scaled = np.empty_like(total)
    for vector, coefficient in zip(vectors[1:], coefficients[1:], strict=True):
        np.multiply(vector, coefficient, out=scaled)
        np.add(total, scaled, out=total)
    return total


@dataclass(eq=False, slots=True)
class _OwnSlice:
    """What this member reduces in one attempt."""

    group: ReduceGroup
    parts: dict[int, Float32Vector] = field(default_factory=dict)
    reduced: asyncio.Future[tuple[Float32Vector, list[bytes]]] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )

    async def add(self, index: int, part: Float32Vector) -> None:
        """Take one member's checked part; the last one triggers the sum."""
        self.parts[index] = part
        wanted = [i for i, member in enumerate(self.group.members) if member.weight_tokens]
        if self.reduced.done() or any(i not in self.parts for i in wanted):
            return
        coefficients = self.group.coefficients()
        vectors = [self.parts[i] for i in wanted]
        total = await asyncio.to_thread(weighted_sum, vectors, [coefficients[i] for i in wanted])
        digests = await asyncio.to_thread(vector_piece_digests, total)
        if not self.reduced.done():
            self.reduced.set_result((total, digests))

    def fail(self, reason: str) -> None:
        """End the reduce for everybody who waits."""
        if not self.reduced.done():
            self.reduced.set_exception(ReduceFailed(reason))
            self.reduced.exception()  # seen, even if nobody waits


class AllReduce:
    """Serves parts of running attempts and runs own ones; one object per swarm process."""

    def __init__(self, transport: Transport, *, stream_name: str) -> None:
        self._transport = transport
        self._stream_name = stream_name
        self._slices: dict[tuple[int, int, int], _OwnSlice] = {}
        self._changed = asyncio.Condition()

    async def run(self, group: ReduceGroup, contribution: Float32Vector | None, *, deadline_seconds: float) -> ReduceResult:
        """Reduce with the group. `contribution` is None without work. Raises ReduceFailed."""
        own = _OwnSlice(group)
        async with self._changed:
            self._slices[group.key] = own
            self._changed.notify_all()
        tasks: list[asyncio.Task[object]] = []
        try:
            async with asyncio.timeout(deadline_seconds):
                averaged = np.empty(group.num_values, dtype=np.float32)
                if contribution is not None:
                    begin, end = group.value_range(group.own_index)
                    await own.add(group.own_index, contribution[begin:end].copy())
                exchanges = [
                    asyncio.ensure_future(self._exchange(group, index, contribution, averaged))
                    for index in range(len(group.members))
                    if index != group.own_index and _has_pieces(group, index)
                ]
                tasks += exchanges  # type: ignore[arg-type]
                digests: dict[int, list[bytes]] = {}
                if _has_pieces(group, group.own_index):
                    total, digests[group.own_index] = await _first_failure(own.reduced, exchanges)
                    begin, end = group.value_range(group.own_index)
                    averaged[begin:end] = total
                sent = received = 0
                for index, got, stream in await asyncio.gather(*exchanges):
                    digests[index] = got
                    sent, received = sent + stream.sent_bytes, received + stream.received_bytes
        except TimeoutError as error:
            missing = [m.peer_id[:8] for i, m in enumerate(group.members) if m.weight_tokens and i not in own.parts]
            reason = f"not done within {deadline_seconds:.1f} s; parts missing from {missing or 'nobody'}"
            own.fail(reason)
            raise ReduceFailed(reason) from error
        except ReduceFailed as error:
            own.fail(str(error))
            raise
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        ordered = [digest for index in sorted(digests) for digest in digests[index]]
        return ReduceResult(
            averaged=averaged,
            piece_digests=tuple(ordered),
            averaged_digest=digest_of_pieces(ordered),
            sent_bytes=sent,
            received_bytes=received,
        )

    def forget(self, before_outer_step: int) -> None:
        """Drop what older steps keep for late streams."""
        for key in [key for key in self._slices if key[1] < before_outer_step]:
            self._slices.pop(key).fail("the outer step is over")

    async def _exchange(
        self, group: ReduceGroup, index: int, contribution: Float32Vector | None, averaged: Float32Vector
    ) -> tuple[int, list[bytes], Stream]:
        """Send one reducer its part and take its reduced pieces into `averaged`."""
        member = group.members[index]
        (begin_piece, end_piece), (begin, end) = group.piece_range(index), group.value_range(index)
        stream: Stream | None = None
        try:
            stream = await self._transport.open_stream(
                member.p2p_peer_id, self._stream_name, deadline_seconds=_OPEN_SECONDS
            )
            await stream.send_message(
                state_pb2.PartHeader(
                    incarnation=group.incarnation,
                    outer_step=group.outer_step,
                    attempt=group.attempt,
                    begin_piece=begin_piece,
                    end_piece=begin_piece if contribution is None else end_piece,
                )
            )
            if contribution is not None:
                await stream.send_bytes(memoryview(contribution[begin:end]))
            header = await stream.receive_message(state_pb2.ReducedHeader)
            if header.refusal_reason:
                raise ReduceFailed(f"reducer {member.peer_id[:8]}: {header.refusal_reason}")
            data = await stream.receive_bytes((end - begin) * 4)
            reduced = np.frombuffer(data, dtype="<f4")
            digests = await asyncio.to_thread(vector_piece_digests, reduced)
            if digests != list(header.piece_digests):
                raise ReduceFailed(f"reducer {member.peer_id[:8]} sent bytes that differ from their digests")
            if not np.isfinite(reduced).all():
                raise ReduceFailed(f"reducer {member.peer_id[:8]} sent values that are not finite")
            averaged[begin:end] = reduced
            await stream.acknowledge()
            return index, digests, stream
        except PeerUnreachable as error:
            raise ReduceFailed(f"reducer {member.peer_id[:8]} {error}") from error
        finally:
            if stream is not None:
                self._transport.count(stream)
                stream.close()

    async def serve(self, stream: Stream, remote_id: str) -> None:
        """Stream handler: take a member's part, answer with the reduced pieces."""
        header = await stream.receive_message(state_pb2.PartHeader)
        key = (header.incarnation, header.outer_step, header.attempt)
        own = await self._known_slice(key)
        if own is None:
            await stream.send_message(state_pb2.ReducedHeader(refusal_reason=f"no reduce {key} here"))
            return
        try:
            index, part = await self._receive_part(own.group, stream, header, remote_id)
            if part is not None:
                await own.add(index, part)
            total, digests = await asyncio.shield(own.reduced)
        except PeerUnreachable as error:
            own.fail(f"member {remote_id[-8:]} {error}")
            raise
        except ReduceFailed as error:
            own.fail(str(error))
            await stream.send_message(state_pb2.ReducedHeader(refusal_reason=str(error)))
            return
        await stream.send_message(state_pb2.ReducedHeader(piece_digests=digests))
        await stream.send_bytes(memoryview(total))
        await stream.receive_acknowledgement()

    async def _known_slice(self, key: tuple[int, int, int]) -> _OwnSlice | None:
        try:
            async with asyncio.timeout(_KNOWN_GROUP_SECONDS), self._changed:
                await self._changed.wait_for(lambda: key in self._slices)
        except TimeoutError:
            return None
        return self._slices.get(key)

    async def _receive_part(
        self, group: ReduceGroup, stream: Stream, header: state_pb2.PartHeader, remote_id: str
    ) -> tuple[int, Float32Vector | None]:
        """One member's part, checked against its commitment. Raises ReduceFailed that names the member."""
        found = [i for i, member in enumerate(group.members) if member.p2p_peer_id == remote_id]
        if not found:
            raise ReduceFailed(f"{remote_id[-8:]} is not in the group")
        index = found[0]
        member = group.members[index]
        (begin_piece, end_piece), (begin, end) = (
            group.piece_range(group.own_index),
            group.value_range(group.own_index),
        )
        wanted_end = end_piece if member.weight_tokens else begin_piece
        if (header.begin_piece, header.end_piece) != (begin_piece, wanted_end):
            raise ReduceFailed(
                f"member {member.peer_id[:8]} sends pieces {header.begin_piece}-{header.end_piece}, "
                f"not {begin_piece}-{wanted_end}"
            )
        if not member.weight_tokens:
            return index, None
        part = np.frombuffer(await stream.receive_bytes((end - begin) * 4), dtype="<f4")
        digests = await asyncio.to_thread(vector_piece_digests, part)
        if digests != list(member.piece_digests[begin_piece:end_piece]):
            raise ReduceFailed(f"member {member.peer_id[:8]} sent bytes that differ from its commitment")
        if not np.isfinite(part).all():
            raise ReduceFailed(f"member {member.peer_id[:8]} sent values that are not finite")
        return index, part


def _has_pieces(group: ReduceGroup, index: int) -> bool:
    begin, end = group.piece_range(index)
    return end > begin


async def _first_failure(
    reduced: asyncio.Future[tuple[Float32Vector, list[bytes]]], exchanges: Sequence[asyncio.Future[object]]
) -> tuple[Float32Vector, list[bytes]]:
    """Wait for the own slice, but not past the first exchange that fails."""
    pending: set[asyncio.Future[object]] = {reduced, *exchanges}  # type: ignore[arg-type]
    while not reduced.done():
        done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        for future in done:
            if future is not reduced:
                future.result()
    return reduced.result()
