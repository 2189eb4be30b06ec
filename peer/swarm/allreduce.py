"""Averaging of one attempt: a pipelined butterfly over p2p streams, every byte checked, the result
encoded once.

The vector is cut into the pieces of digest.py; members that can be dialled reduce a run of pieces
each. A member opens one stream to every other reducer, sends PartHeader and its pieces of that run,
and on the same stream receives ReducedHeader and the reduced pieces as soon as they are summed,
which it acknowledges. So both directions of a link are busy at once, and as many bytes are in
flight as the streams hold. A reducer checks every piece against the digest that its sender
committed to when it joined, and sums in member order (slice_sum.py). Any failure ends the attempt
whole, with a reason that names the peer.

Threads do the work, one per stream and direction: reading, hashing and summing hold no interpreter
lock, and the event loop stays free for messages. A member without work sends a header and no piece.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from peer.swarm.buffer_pool import BufferPool
from peer.swarm.bulk_stream import BulkStream, StreamError
from peer.swarm.codecs import EncodedVector, piece_bounds
from peer.swarm.part_frames import (
    Refused,
    next_summed,
    read_digests,
    read_mark,
    read_part,
    read_pieces,
    send_batch,
    send_refusal,
)
from peer.swarm.slice_sum import NotFinite, ResultBuffer, SliceSum, Stopped, batches_of
from peer.swarm.transport import PeerCallError, Stream, StreamHandler
from protos.contract.codecs_wire import Codec
from protos.contract.digest import PIECE_VALUES, digest_of_pieces
from protos.contract.errors import CorruptDataError
from protos.muster.v1 import rounds_pb2, state_pb2

logger = logging.getLogger(__name__)

PART_STREAM = "part"
_TELL_SECONDS = 1.0
"""How long a failed reduction's streams stay open, so that the reason gets through."""
MAX_TICK_SECONDS = 0.3
"""Three ticks of the shell; after a longer one we were stopped ourselves."""


class Streams(Protocol):
    """Opens and answers members' streams; Transport is one."""

    async def open_stream(self, peer_id: str, name: str) -> Stream:
        """Open a stream to a member. Raises PeerCallError."""

    async def serve_streams(self, name: str, handler: StreamHandler) -> None:
        """Answer streams that members open."""


class ReduceError(Exception):
    """The attempt cannot be averaged; `peer_id` is whose fault it looks like, `is_down` if it looks
    dead, `is_invalid` if what it sent breaks the rules; `told_by` has given up before us.
    """

    def __init__(
        self,
        reason: str,
        *,
        peer_id: str = "",
        told_by: str = "",
        is_down: bool = False,
        is_invalid: bool = False,
    ) -> None:
        super().__init__(reason)
        self.peer_id, self.told_by = peer_id, told_by
        self.is_down, self.is_invalid = is_down, is_invalid


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
        streams: Streams,
        *,
        place: tuple[int, int, int],
        group: rounds_pb2.FormGroup,
        tokens_by_peer: dict[str, int],
        own_peer_id: str,
        codec: Codec,
        num_values: int,
        own: EncodedVector | None,
        on_exchanged: Callable[[], None] | None = None,
        buffers: BufferPool | None = None,
    ) -> None:
        """`place` = (incarnation, outer step, attempt); `own` is read while the reduction runs, and
        None for a member without work.

        `on_exchanged` is called when all own pieces have left and the pieces that this member
        reduces are summed. `buffers` keeps memory from one reduction to the next.
        """
        buffers = buffers or BufferPool()
        buffers.begin_round()
        self.place = place
        self._streams = streams
        self._own_peer_id, self._own = own_peer_id, own
        self._codec, self._num_values = codec, num_values
        self._on_exchanged = on_exchanged
        self._members = [member.contribution.peer_id for member in group.members]
        self._join_by_peer = {member.contribution.peer_id: member for member in group.members}
        ends = list(group.reducer_piece_ends)
        begins = [0, *ends[:-1]]
        self._run_by_peer = dict(zip(self._members, zip(begins, ends, strict=True), strict=True))
        working = [peer for peer in self._members if self._has_work(peer)]
        self._result = ResultBuffer(codec.for_result(len(working)), num_values, buffers)
        total = sum(tokens_by_peer[peer] for peer in self._members)
        self._sum = SliceSum(
            run=self._run_by_peer[own_peer_id],
            members=working,
            weight_by_peer={p: np.float32(tokens_by_peer[p] / total) for p in self._members},
            own_peer_id=own_peer_id,
            own=own if self._has_work(own_peer_id) else None,
            result=self._result,
            buffers=buffers,
        )
        reducers = [p for p in self._members if p != own_peer_id and self._has_run(p)]
        senders = [p for p in self._members if p != own_peer_id and self._has_run(own_peer_id)]
        self._reducers = reducers
        self._summed_by_peer = {peer: self._sum.follow() for peer in senders}
        self._served: set[str] = set()
        self._outgoing: list[BulkStream] = []
        self._incoming: list[BulkStream] = []
        self._awaited: dict[tuple[str, bool], tuple[BulkStream | None, float]] = {}
        """(peer_id, whether reduced pieces) -> stream, if open, and since when bytes are due."""
        self._sent_to: set[str] = set()
        self._waiting: set[str] = set()
        """Reducers that said last that they wait for somebody."""
        self.late_seconds_by_peer: defaultdict[str, float] = defaultdict(float)
        self.waiting_seconds_by_peer: defaultdict[str, float] = defaultdict(float)
        self.tokens_by_peer = tokens_by_peer
        self.num_moved = 0
        """Pieces that have come in or left, of anybody: unchanged as long as nothing moves."""
        self.begin_seconds = time.monotonic()
        self._tick_seconds = self._heed_seconds = self.begin_seconds
        """When `tick` was called last, and since when others' silence counts."""
        self._lock = threading.Lock()
        self._exchange_left = len(reducers) + 1
        self._failure: ReduceError | None = None
        self._failed = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def _has_work(self, peer_id: str) -> bool:
        return len(self._join_by_peer[peer_id].contribution.ranges) > 0

    def _has_run(self, peer_id: str) -> bool:
        begin, end = self._run_by_peer[peer_id]
        return bool(begin < end)

    # Life -------------------------------------------------------------------------------------

    async def run(self) -> AveragedVector:
        """Average. Raises ReduceError. Other members may still be served after it has returned."""
        senders = self._sum.slots if self._has_run(self._own_peer_id) else ()
        awaited = [(peer, False) for peer in senders] + [(peer, True) for peer in self._reducers]
        for key in awaited:
            self._awaited.setdefault(key, (None, time.monotonic()))
        tasks = [asyncio.ensure_future(self._exchange_with(peer)) for peer in self._reducers]
        tasks.append(asyncio.ensure_future(self._in_thread(self._sum_own)))
        failing = asyncio.ensure_future(self._failed.wait())
        try:
            waiting = set(tasks)
            while waiting and self._failure is None:
                done, _ = await asyncio.wait(
                    {*waiting, failing}, return_when=asyncio.FIRST_COMPLETED
                )
                waiting -= done
                for task in done & set(tasks):
                    if not task.cancelled() and (error := task.exception()) is not None:
                        self.fail(_unexpected(error))
        except asyncio.CancelledError:
            self.fail(ReduceError("averaging was given up"))
            raise
        finally:
            for task in (*tasks, failing):
                task.cancel()
            await asyncio.gather(*tasks, failing, return_exceptions=True)
        if self._failure is None and not all(self._result.digests):
            num_missing = self._result.digests.count(b"")
            self.fail(ReduceError(f"{num_missing} averaged pieces are missing"))
        if self._failure is not None:
            raise self._failure
        return AveragedVector(
            encoded=self._result.encoded, piece_digests=tuple(self._result.digests)
        )

    def fail(self, error: ReduceError) -> None:
        """End the reduction; only the first reason counts.

        Streams stay open for a moment: members that we serve are still told the reason, and the
        others hear it as a message before a broken stream could make them suspect us.
        """
        if self._failure is None:
            self._failure = error
            self._failed.set()
            self._sum.stop()
            self._loop.call_later(_TELL_SECONDS, self.close)

    @property
    def has_failed(self) -> bool:
        """True once it has ended without a result; it closes its streams by itself."""
        return self._failure is not None

    def close(self) -> None:
        """Drop every stream, also those that still serve others."""
        for stream in (*self._outgoing, *self._incoming):
            stream.close()

    def silent_peer(self, stall_seconds: float) -> tuple[str, float]:
        """The member for whose bytes we have waited longest, and how long; ("", 0.0) if nobody is
        that late.

        Whoever owes us pieces of its own is blamed first; a reducer that only waits itself says so,
        and is not silent. Nobody is, as long as we have been stopped ourselves.
        """
        now = time.monotonic()
        if now - self._tick_seconds > MAX_TICK_SECONDS:
            return "", 0.0
        parts: list[tuple[float, str]] = []
        reduced: list[tuple[float, str]] = []
        for (peer_id, is_reduced), (stream, since_seconds) in list(self._awaited.items()):
            last_seconds = stream.progress_seconds if stream is not None else 0.0
            late_seconds = now - max(since_seconds, last_seconds, self._heed_seconds)
            (reduced if is_reduced else parts).append((late_seconds, peer_id))
        for late in (parts, reduced):
            seconds, peer_id = max(late, default=(0.0, ""))
            if seconds >= stall_seconds:
                return peer_id, seconds
        return "", 0.0

    def tick(self) -> None:
        """Time has passed: book it on whoever is awaited while at least as many others have
        delivered: others' pieces first, then reduced ones, unless their reducer waits itself.

        Call it often. After a long tick this process was stopped, or the machine slept: that says
        nothing of others, so only a part of it is booked and their silence counts from now.
        """
        now = time.monotonic()
        seconds, self._tick_seconds = now - self._tick_seconds, now
        if seconds > MAX_TICK_SECONDS:
            seconds, self._heed_seconds = MAX_TICK_SECONDS, now
        awaited = list(self._awaited)
        late = {peer for peer, is_reduced in awaited if not is_reduced}
        num_done = len(self._sum.slots.keys() - late)
        if not late:
            open_reducers = {peer for peer, is_reduced in awaited if is_reduced}
            late = open_reducers - self._waiting
            num_done = len(set(self._reducers) - open_reducers)
            if len(open_reducers) == 1 and not late:  # to the end it says that it waits itself
                self.waiting_seconds_by_peer[min(open_reducers)] += seconds
        num_done += len(self._sent_to) == len(self._reducers)
        if num_done >= len(late):
            for peer_id in late:
                self.late_seconds_by_peer[peer_id] += seconds

    def _note_moved(self) -> None:
        self.num_moved += 1

    def _note_waiting(self, reducer: str, is_waiting: bool) -> None:
        (self._waiting.add if is_waiting else self._waiting.discard)(reducer)

    @property
    def longest_wait_seconds(self) -> float:
        """For the next bytes of any member."""
        streams = (*self._outgoing, *self._incoming)
        return max((stream.longest_wait_seconds for stream in streams), default=0.0)

    def _in_thread(self, job: Callable[[], None]) -> "asyncio.Future[None]":
        """Run in a thread of its own; a failure there fails the reduction."""
        future: asyncio.Future[None] = self._loop.create_future()

        def finish(error: ReduceError | None) -> None:
            if error is not None:
                self.fail(error)
            if not future.done():
                future.set_result(None)

        def work() -> None:
            error: ReduceError | None = None
            try:
                job()
            except Stopped:
                pass
            except ReduceError as found:
                error = found
            except Exception as found:  # whatever it is, the attempt must not count as averaged
                error = _unexpected(found)
            with contextlib.suppress(RuntimeError):  # the loop may be gone as the process ends
                self._loop.call_soon_threadsafe(finish, error)

        threading.Thread(target=work, daemon=True, name="reduction").start()
        return future

    def _one_exchanged(self) -> None:
        with self._lock:
            self._exchange_left -= 1
            is_last = self._exchange_left == 0
        if is_last and self._on_exchanged is not None:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._on_exchanged)

    # As a reducer -----------------------------------------------------------------------------

    def _sum_own(self) -> None:
        try:
            self._sum.run()
        except NotFinite as error:
            culprit = error.peer_id
            is_foreign = culprit not in ("", self._own_peer_id)
            reason = f"part of {culprit}: {error}" if culprit else f"sum of all parts: {error}"
            raise ReduceError(reason, peer_id=culprit, is_invalid=is_foreign) from error
        self._one_exchanged()

    async def serve(self, sender: str, header: state_pb2.PartHeader, stream: Stream) -> None:
        """Take a member's pieces of the own run and answer with the reduced ones."""
        begin, end = self._run_by_peer[self._own_peer_id]
        is_expected = sender in self._summed_by_peer and sender not in self._served
        wanted = (begin, end if is_expected and self._has_work(sender) else begin)
        found = (header.begin_piece, header.end_piece)
        if not is_expected or found != wanted or self._failure is not None:
            reason = f"part of {sender}: pieces {found}; expected {wanted}, once"
            if is_expected:
                self.fail(ReduceError(reason, peer_id=sender, is_invalid=True))
            await refuse_stream(stream, str(self._failure or reason))
            return
        self._served.add(sender)
        bulk = await stream.detach()
        self._incoming.append(bulk)
        jobs = [self._in_thread(lambda: self._send_reduced(sender, bulk))]
        if self._has_work(sender):
            jobs.append(self._in_thread(lambda: self._receive_part(sender, bulk)))
        await asyncio.gather(*jobs)
        bulk.close()

    def _receive_part(self, sender: str, stream: BulkStream) -> None:
        slots, committed = self._sum.slots[sender], self._join_by_peer[sender].piece_digests
        try:
            for batch in self._sum.batches:
                self._awaited.pop((sender, False), None)
                values = slots.take_free()
                self._awaited[sender, False] = (stream, time.monotonic())
                low, high = piece_bounds(batch.begin_piece, batch.end_piece, self._num_values)
                digests = committed[batch.begin_piece : batch.end_piece]
                values_here = values[: high - low]
                read_part(
                    stream, self._codec, batch, digests, values_here, on_moved=self._note_moved
                )
                slots.put_filled(values)
            self._awaited.pop((sender, False), None)
        except (Refused, ValueError, CorruptDataError) as error:
            reason = f"part of {sender}: {error}"
            raise ReduceError(reason, peer_id=sender, is_invalid=True) from error
        except StreamError as error:
            raise ReduceError(f"part of {sender}: {error}", peer_id=sender) from error

    def _send_reduced(self, receiver: str, stream: BulkStream) -> None:
        """Hand out what is summed. A receiver that breaks off is not our failure: we hold the
        result.
        """
        summed = self._summed_by_peer[receiver]
        try:
            stream.send_message(state_pb2.ReducedHeader())
            for _ in self._sum.batches:
                batch = next_summed(summed, stream)
                if batch is None:
                    send_refusal(stream, str(self._failure or "averaging was given up"))
                    return
                digests = self._result.digests[batch.begin_piece : batch.end_piece]
                send_batch(stream, self._result.encoded, batch, digests, on_moved=self._note_moved)
            stream.wait_acknowledged()
        except StreamError as error:
            logger.debug("reduced pieces to %s: %s", receiver, error)

    # As a sender ------------------------------------------------------------------------------

    async def _exchange_with(self, reducer: str) -> None:
        """Send the own pieces of a reducer's run and take the reduced ones."""
        try:
            stream = await self._streams.open_stream(reducer, PART_STREAM)
            await stream.send_message(self._part_header(reducer))
            bulk = await stream.detach()
        except PeerCallError as error:
            reason = f"{reducer} cannot be reached: {error}"
            self.fail(ReduceError(reason, peer_id=reducer, is_down=error.is_down))
            return
        except StreamError as error:
            self.fail(ReduceError(f"stream to {reducer}: {error}", peer_id=reducer))
            return
        self._outgoing.append(bulk)
        await asyncio.gather(
            self._in_thread(lambda: self._send_part(reducer, bulk)),
            self._in_thread(lambda: self._receive_reduced(reducer, bulk)),
        )
        self._in_thread(bulk.linger)

    def _part_header(self, reducer: str) -> state_pb2.PartHeader:
        begin, end = self._run_by_peer[reducer]
        incarnation, outer_step, attempt = self.place
        return state_pb2.PartHeader(
            incarnation=incarnation,
            outer_step=outer_step,
            attempt=attempt,
            begin_piece=begin,
            end_piece=end if self._has_work(self._own_peer_id) else begin,
        )

    def _send_part(self, reducer: str, stream: BulkStream) -> None:
        header = self._part_header(reducer)
        try:
            for batch in batches_of(header.begin_piece, header.end_piece):
                if self._failure is not None:
                    return
                assert self._own is not None
                send_batch(stream, self._own, batch, on_moved=self._note_moved)
        except StreamError as error:
            # The reducer says why on the other direction, if it still can.
            logger.debug("own part to %s: %s", reducer, error)
            return
        self._sent_to.add(reducer)
        self._one_exchanged()

    def _receive_reduced(self, reducer: str, stream: BulkStream) -> None:
        result, scratch = self._result, np.empty(PIECE_VALUES, dtype=np.float32)
        try:
            self._awaited[reducer, True] = (stream, time.monotonic())
            refusal = stream.read_message(state_pb2.ReducedHeader).refusal_reason
            if refusal:
                raise Refused(refusal)
            for batch in batches_of(*self._run_by_peer[reducer]):
                pieces = range(batch.begin_piece, batch.end_piece)
                read_mark(stream, lambda is_waiting: self._note_waiting(reducer, is_waiting))
                digests = read_digests(stream, batch)
                views = [result.encoded.run(piece, piece + 1) for piece in pieces]
                read_pieces(stream, batch, digests, views, on_moved=self._note_moved)
                for piece in pieces:
                    result.check(piece, scratch)
                result.digests[batch.begin_piece : batch.end_piece] = digests
            stream.acknowledge()
        except Refused as error:
            raise ReduceError(f"{reducer}: {error}", told_by=reducer) from error
        except (ValueError, CorruptDataError) as error:
            reason = f"reduced pieces of {reducer}: {error}"
            raise ReduceError(reason, peer_id=reducer, is_invalid=True) from error
        except StreamError as error:
            reason = f"reduced pieces of {reducer}: {error}"
            raise ReduceError(reason, peer_id=reducer) from error
        finally:
            self._awaited.pop((reducer, True), None)


def _unexpected(error: BaseException) -> ReduceError:
    """A failure that nobody foresaw: said in full where it happened, in short to the others."""
    logger.error("averaging failed", exc_info=error)
    return ReduceError(f"averaging failed: {type(error).__name__}: {error}")


async def refuse_stream(stream: Stream, reason: str) -> None:
    """Tell a sender why its stream is of no use."""
    bulk = await stream.detach()
    header = state_pb2.ReducedHeader(refusal_reason=reason)
    await asyncio.to_thread(bulk.send_message, header)
    bulk.close()
