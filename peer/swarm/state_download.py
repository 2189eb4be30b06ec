"""The newcomer's side of state transfer: one proven state from several members at once, every piece
checked on arrival.

Each donor shows its list of pieces first; a list whose digest is not the proven one is refused
before a byte of the state is taken, so donors are checked against the certificates and thereby
against one another. piece_plan.py decides who is asked for what; this file moves the bytes: at most
two pieces per donor are in memory, the rest is on disk (incoming_state.py) and survives restarts. A
donor that dies, stalls or lies costs its open pieces; only lying is final.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from peer.swarm.incoming_state import IncomingState
from peer.swarm.piece_plan import PiecePlan
from peer.swarm.state_transfer import SNAPSHOT_STREAM, ProvenState
from peer.swarm.transport import PeerCallError, Stream, StreamError, Transport
from protos.contract.digest import Float32Vector, StateMeta, state_digest_of_pieces
from protos.muster.v1 import common_pb2, rounds_pb2, state_pb2

logger = logging.getLogger(__name__)

_HEADER_SECONDS = 60.0
"""A donor writes an image of its state before it answers."""
_WAKE_SECONDS = 0.1


class LyingDonorError(StreamError):
    """A donor sent what is not of the proven state; it is never asked again."""


class RefusedError(StreamError):
    """A donor does not hold the state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchedState:
    """A downloaded, verified state; its vectors are mapped from the file of the download."""

    meta: StateMeta
    vectors: tuple[Float32Vector, ...]
    directive: common_pb2.Signed
    unreported: tuple[rounds_pb2.Certificate, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a download is."""

    num_held: int
    num_pieces: int
    num_donors: int
    bytes_per_second: float


class StateDownload:
    """Download of one proven state; used once."""

    def __init__(
        self,
        transport: Transport,
        wanted: ProvenState,
        *,
        incoming: IncomingState,
        check: Callable[[StateMeta, common_pb2.Signed], str],
        stop: asyncio.Event,
        on_progress: Callable[[Progress], None],
    ) -> None:
        """`check` says what is wrong with a directive for a state; `stop` ends early, what is there
        is kept.
        """
        self._transport, self._wanted, self._incoming = transport, wanted, incoming
        self._check, self._stop, self._on_progress = check, stop, on_progress
        self.plan = PiecePlan(num_pieces=incoming.layout.num_pieces, donors=wanted.donors)
        self._header: state_pb2.SnapshotHeader | None = None
        self._meta: StateMeta | None = None
        self._beginning = asyncio.Lock()
        self._changed = asyncio.Event()
        self._received_bytes = 0
        self._began_seconds = self._now()

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()

    async def run(self) -> FetchedState | None:
        """Fetch; None if no donor could bring the rest, or `stop` was set. Raises MachineError
        (disk full).
        """
        tasks: set[asyncio.Task[None]] = set()
        try:
            while not (self.plan.is_complete or self.plan.is_hopeless or self._stop.is_set()):
                for peer_id in self.plan.donors_to_open(self._now()):
                    tasks.add(asyncio.ensure_future(self._take_from(peer_id)))
                self._changed.clear()
                waiting = asyncio.ensure_future(self._changed.wait())
                await asyncio.wait(
                    {*tasks, waiting},
                    timeout=_WAKE_SECONDS,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                waiting.cancel()
                for task in [task for task in tasks if task.done()]:
                    tasks.discard(task)
                    task.result()
                self._tell_progress()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._incoming.close()
        return self._result()

    def _result(self) -> FetchedState | None:
        header, meta = self._header, self._meta
        wanted = self._wanted
        shares = ", ".join(
            f"{donor.peer_id} {donor.num_received}{'' if donor.is_open else f' ({donor.reason})'}"
            for donor in self.plan.donors.values()
        )
        place = f"state {wanted.incarnation}/{wanted.outer_step}"
        took_seconds = self._now() - self._began_seconds
        if not self.plan.is_complete or header is None or meta is None:
            num_missing = self.plan.num_pieces - self.plan.num_held
            logger.info("%s: %d pieces missing; pieces by donor: %s", place, num_missing, shares)
            return None
        logger.info("%s in %.2f s; pieces by donor: %s", place, took_seconds, shares)
        return FetchedState(
            meta=meta,
            vectors=self._incoming.vectors(),
            directive=header.directive,
            unreported=tuple(header.unreported_certificates),
        )

    def _tell_progress(self) -> None:
        if not self.plan.num_open:
            return
        passed_seconds = max(self._now() - self._began_seconds, 1e-3)
        self._on_progress(
            Progress(
                num_held=self.plan.num_held,
                num_pieces=self.plan.num_pieces,
                num_donors=self.plan.num_open,
                bytes_per_second=self._received_bytes / passed_seconds,
            )
        )

    # One donor --------------------------------------------------------------------------------

    async def _take_from(self, peer_id: str) -> None:
        """Take pieces from one donor until nothing is left for it or it fails."""
        stream: Stream | None = None
        reason, is_final = "", False
        try:
            stream = await self._transport.open_stream(peer_id, SNAPSHOT_STREAM)
            await self._open(stream)
            self.plan.opened(peer_id, self._now())
            await self._take_pieces(peer_id, stream)
        except (LyingDonorError, RefusedError) as error:
            reason, is_final = str(error), True
        except TimeoutError:
            reason = "silent for too long"
        except (PeerCallError, StreamError) as error:
            reason = str(error)
        finally:
            if stream is not None:
                stream.close()
            self._changed.set()
        if reason:
            logger.info("state from %s: %s", peer_id, reason)
            self.plan.failed(peer_id, self._now(), reason, is_final=is_final)

    async def _open(self, stream: Stream) -> None:
        wanted = self._wanted
        await stream.send_message(
            state_pb2.SnapshotRequest(incarnation=wanted.incarnation, outer_step=wanted.outer_step)
        )
        header = await asyncio.wait_for(
            stream.read_message(state_pb2.SnapshotHeader), _HEADER_SECONDS
        )
        if header.refusal_reason:
            kind = StreamError if header.is_busy else RefusedError
            raise kind(header.refusal_reason)
        layout, digests = self._incoming.layout, list(header.piece_digests)
        if len(digests) != layout.num_pieces:
            raise LyingDonorError(f"a list of {len(digests)} pieces for {layout.num_pieces}")
        try:
            meta = StateMeta.from_json(header.state_meta)
        except ValueError as error:
            raise LyingDonorError(str(error)) from error
        if state_digest_of_pieces(meta, layout.by_vector(digests)) != wanted.state_digest:
            raise LyingDonorError("its list of pieces is not that of the proven state")
        if problem := self._check(meta, header.directive):
            raise LyingDonorError(problem)
        async with self._beginning:
            if self._header is None:
                held = await asyncio.to_thread(self._incoming.begin, header)
                self.plan.begin(held)
                self._header, self._meta = header, meta

    async def _take_pieces(self, peer_id: str, stream: Stream) -> None:
        plan, owed = self.plan, self.plan.donors[peer_id].owed
        while not plan.is_complete:
            while (order := plan.next_order(peer_id, self._now())) is not None:
                await stream.send_message(
                    state_pb2.PieceRequest(begin_piece=order.begin_piece, end_piece=order.end_piece)
                )
            if not owed:  # others hold the rest; one of them may fail yet
                await asyncio.sleep(_WAKE_SECONDS)
                continue
            piece = owed[0]
            _, length = self._incoming.layout.bytes_of(piece)
            data = await asyncio.wait_for(stream.read_bytes(length), plan.patience_seconds(peer_id))
            self._received_bytes += length
            if not self._incoming.take(piece, data):
                raise LyingDonorError(f"piece {piece} does not match the proven digest")
            plan.received(peer_id, piece, self._now())
        await stream.send_message(state_pb2.PieceRequest())
