"""State between members: who holds what, averaged bytes by digest, whole snapshots piece by piece.

A laggard catches up by certificates and averaged bytes while members still hold them, else by a
snapshot of a state that a quorum of signed attestations proves. Header digests are checked against
the proven digest before a byte of the state is taken, and every piece on arrival; an interrupted
download goes on with another donor at the first missing piece. Only members are answered
(transport.py), and a snapshot is an immutable copy, so it is never torn.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from google.protobuf.message import DecodeError

from peer.swarm.allreduce import AveragedVector
from peer.swarm.codecs import EncodedVector, piece_bounds, piece_byte_bounds
from peer.swarm.replica import Replica, Snapshot
from peer.swarm.transport import PeerCallError, Stream, StreamError, Transport
from protos.contract.certificate import Tag, half_votes_by_voter
from protos.contract.codecs_wire import result_codec_of_bytes
from protos.contract.digest import (
    Float32Vector,
    StateMeta,
    digest_of_pieces,
    num_pieces,
    piece_digest,
    state_digest_of_pieces,
)
from protos.contract.errors import CorruptDataError
from protos.contract.signing import has_valid_signature
from protos.muster.v1 import common_pb2, rounds_pb2, state_pb2

logger = logging.getLogger(__name__)

STATE_INFO_CALL = "state_info"
AVERAGED_STREAM = "averaged"
SNAPSHOT_STREAM = "snapshot"
_PIECE_SECONDS = 20.0
"""Longest wait for one piece before another donor is tried."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProvenState:
    """A state that enough members have signed for."""

    incarnation: int
    outer_step: int
    state_digest: bytes
    donors: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchedState:
    """A downloaded, verified state."""

    meta: StateMeta
    vectors: tuple[Float32Vector, ...]
    directive: common_pb2.Signed
    unreported: tuple[rounds_pb2.Certificate, ...]


class StateServer:
    """Answers members' questions about the state."""

    def __init__(self, replica: Replica, transport: Transport) -> None:
        self._replica, self._transport = replica, transport
        self._snapshot: Snapshot | None = None
        self._num_readers = 0

    async def start(self) -> None:
        """Begin to answer."""
        await self._transport.serve_messages(
            STATE_INFO_CALL, self._on_state_info, state_pb2.StateInfoRequest
        )
        await self._transport.serve_streams(AVERAGED_STREAM, self._on_averaged)
        await self._transport.serve_streams(SNAPSHOT_STREAM, self._on_snapshot)

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

    async def _on_snapshot(self, peer_id: str, stream: Stream) -> None:
        request = await stream.read_message(state_pb2.SnapshotRequest)
        snapshot = self._snapshot_at(request)
        if snapshot is None:
            reason = f"no state {request.incarnation}/{request.outer_step} is held"
            await stream.send_message(state_pb2.SnapshotHeader(refusal_reason=reason))
            return
        self._num_readers += 1
        try:
            await stream.send_message(
                state_pb2.SnapshotHeader(
                    state_meta=snapshot.meta.to_json(),
                    piece_digests=[d for digests in snapshot.piece_digests for d in digests],
                    total_bytes=sum(vector.nbytes for vector in snapshot.vectors),
                    unreported_certificates=self._replica.unreported,
                    directive=snapshot.directive,
                )
            )
            num_values = snapshot.vectors[0].size
            per_vector = num_pieces(num_values)
            for piece in range(request.first_piece, len(snapshot.vectors) * per_vector):
                vector = snapshot.vectors[piece // per_vector]
                low, high = piece_bounds(piece % per_vector, piece % per_vector + 1, num_values)
                await stream.send_bytes(np.ascontiguousarray(vector[low:high]).data)
            await stream.wait_acknowledged()
        finally:
            self._num_readers -= 1
            if self._num_readers == 0:
                self._snapshot = None

    def _snapshot_at(self, request: state_pb2.SnapshotRequest) -> Snapshot | None:
        kept = self._snapshot
        wanted = (request.incarnation, request.outer_step)
        if kept is None or (kept.meta.incarnation, kept.meta.outer_step) != wanted:
            kept = self._replica.snapshot(incarnation=wanted[0], outer_step=wanted[1])
            self._snapshot = kept
        return kept


async def ask_state_info(
    transport: Transport, peer_ids: Iterable[str], request: state_pb2.StateInfoRequest
) -> dict[str, state_pb2.StateInfoResponse]:
    """Ask members what they hold; those that do not answer are left out."""

    async def ask(peer_id: str) -> tuple[str, state_pb2.StateInfoResponse | None]:
        try:
            answer = await transport.call(
                peer_id, STATE_INFO_CALL, request, state_pb2.StateInfoResponse
            )
        except PeerCallError as error:
            logger.debug("%s does not say what it holds: %s", peer_id, error)
            return peer_id, None
        return peer_id, answer

    answers = await asyncio.gather(*(ask(peer_id) for peer_id in peer_ids))
    return {peer_id: answer for peer_id, answer in answers if answer is not None}


def newest_proven_state(
    infos: Mapping[str, state_pb2.StateInfoResponse],
    *,
    run_id: str,
    incarnation: int,
    directive: common_pb2.Directive,
    own_peer_id: str,
) -> ProvenState | None:
    """Highest state whose equal signed attestations are more than half of the members' votes.

    With at most two voters the own vote counts along with the other's when nobody contradicts it:
    taking a state is agreeing to it. So one of two voters can bring the other back; among more, the
    others alone must be enough.
    """
    half_votes = half_votes_by_voter(directive.roster)
    key_by_peer = {entry.peer_id: entry.public_key for entry in directive.roster}
    backers: dict[tuple[int, bytes], set[str]] = {}
    for peer_id, info in infos.items():
        for signed in info.attestations:
            if not has_valid_signature(
                key_by_peer.get(peer_id, b""), Tag.ATTESTATION, signed.payload, signed.signature
            ):
                continue
            attestation = common_pb2.Attestation.FromString(signed.payload)
            place = (attestation.run_id, attestation.incarnation, attestation.peer_id)
            if place == (run_id, incarnation, peer_id):
                key = (attestation.outer_step, attestation.state_digest)
                backers.setdefault(key, set()).add(peer_id)
    num_digests = Counter(outer_step for outer_step, _ in backers)
    needed = sum(half_votes.values()) / 2
    may_count_own = sum(entry.has_vote for entry in directive.roster) <= 2
    for (outer_step, digest), peers in sorted(backers.items(), reverse=True):
        voters = set(peers)
        if may_count_own and num_digests[outer_step] == 1:
            voters.add(own_peer_id)
        if sum(half_votes.get(voter, 0) for voter in voters) > needed:
            return ProvenState(
                incarnation=incarnation,
                outer_step=outer_step,
                state_digest=digest,
                donors=tuple(sorted(peers)),
            )
    return None


async def fetch_averaged(
    transport: Transport,
    holders: Iterable[str],
    averaged_digest: bytes,
    *,
    codec_name: str,
    num_values: int,
) -> AveragedVector | None:
    """Averaged bytes from any holder, every piece checked; None if nobody could give them."""
    for peer_id in holders:
        stream: Stream | None = None
        try:
            stream = await transport.open_stream(peer_id, AVERAGED_STREAM)
            request = state_pb2.AveragedRequest(averaged_digest=averaged_digest)
            await stream.send_message(request)
            return await _receive_averaged(
                stream, averaged_digest, codec_name=codec_name, num_values=num_values
            )
        except (PeerCallError, StreamError, TimeoutError, CorruptDataError) as error:
            logger.info("averaged bytes from %s refused: %s", peer_id, error)
        finally:
            if stream is not None:
                stream.close()
    return None


async def _receive_averaged(
    stream: Stream, averaged_digest: bytes, *, codec_name: str, num_values: int
) -> AveragedVector:
    header = await asyncio.wait_for(stream.read_message(state_pb2.AveragedHeader), _PIECE_SECONDS)
    if header.refusal_reason:
        raise StreamError(header.refusal_reason)
    digests = tuple(header.piece_digests)
    if digest_of_pieces(digests) != averaged_digest or len(digests) != num_pieces(num_values):
        raise StreamError("piece digests are not those of the value")
    codec = result_codec_of_bytes(
        codec_name, num_values=num_values, num_bytes=int(header.total_bytes)
    )
    received = bytearray(codec.encoded_bytes(num_values))
    for piece, digest in enumerate(digests):
        low, high = piece_byte_bounds(codec, piece, piece + 1, num_values)
        data = await asyncio.wait_for(stream.read_bytes(high - low), _PIECE_SECONDS)
        if piece_digest(data) != digest:
            raise StreamError(f"piece {piece} does not match its digest")
        received[low:high] = data
    encoded = EncodedVector(codec=codec, num_values=num_values, data=memoryview(received))
    await asyncio.to_thread(encoded.decoded)
    await stream.acknowledge()
    return AveragedVector(encoded=encoded, piece_digests=digests)


class StateDownload:
    """Download of one proven state, continued over donors."""

    def __init__(
        self, transport: Transport, wanted: ProvenState, *, num_values: int, num_vectors: int
    ) -> None:
        self._transport, self._wanted = transport, wanted
        self._num_values, self._num_vectors = num_values, num_vectors
        self._vectors: tuple[Float32Vector, ...] = ()
        self._next_piece = 0

    async def run(self) -> FetchedState | None:
        """Try every donor in turn; None if none of them could finish it."""
        for peer_id in self._wanted.donors:
            stream: Stream | None = None
            try:
                stream = await self._transport.open_stream(peer_id, SNAPSHOT_STREAM)
                return await self._receive(stream)
            except (PeerCallError, StreamError, TimeoutError, ValueError, DecodeError) as error:
                logger.info("state from %s: %s", peer_id, error)
            finally:
                if stream is not None:
                    stream.close()
        return None

    async def _receive(self, stream: Stream) -> FetchedState:
        wanted = self._wanted
        await stream.send_message(
            state_pb2.SnapshotRequest(
                incarnation=wanted.incarnation,
                outer_step=wanted.outer_step,
                first_piece=self._next_piece,
            )
        )
        header = await asyncio.wait_for(
            stream.read_message(state_pb2.SnapshotHeader), 3 * _PIECE_SECONDS
        )
        if header.refusal_reason:
            raise StreamError(header.refusal_reason)
        meta = StateMeta.from_json(header.state_meta)
        digests, per_vector = list(header.piece_digests), num_pieces(self._num_values)
        if len(digests) != self._num_vectors * per_vector:
            raise StreamError(f"{len(digests)} pieces for {self._num_vectors * per_vector}")
        by_vector = [
            digests[v * per_vector : (v + 1) * per_vector] for v in range(self._num_vectors)
        ]
        if state_digest_of_pieces(meta, by_vector) != wanted.state_digest:
            raise StreamError("the snapshot is not the state that was proven")
        if not self._vectors:
            self._vectors = tuple(
                np.empty(self._num_values, dtype=np.float32) for _ in range(self._num_vectors)
            )
        while self._next_piece < len(digests):
            await self._receive_piece(stream, digests[self._next_piece], per_vector)
        await stream.acknowledge()
        return FetchedState(
            meta=meta,
            vectors=self._vectors,
            directive=header.directive,
            unreported=tuple(header.unreported_certificates),
        )

    async def _receive_piece(self, stream: Stream, digest: bytes, per_vector: int) -> None:
        vector = self._vectors[self._next_piece // per_vector]
        index = self._next_piece % per_vector
        low, high = piece_bounds(index, index + 1, self._num_values)
        data = await asyncio.wait_for(stream.read_bytes(4 * (high - low)), _PIECE_SECONDS)
        if piece_digest(data) != digest:
            raise StreamError(f"piece {self._next_piece} does not match its digest")
        vector[low:high] = np.frombuffer(data, dtype="<f4")
        self._next_piece += 1
