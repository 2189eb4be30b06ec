"""State between members, as the asker sees it: who holds what, which state is proven, averaged
bytes by digest.

A laggard catches up by certificates and averaged bytes while members still hold them, else by a
state that a quorum of signed attestations or the certificate after it proves (state_download.py
fetches it, state_server.py serves it). Only members are answered (transport.py).
"""

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from peer.swarm.allreduce import AveragedVector
from peer.swarm.codecs import EncodedVector, piece_byte_bounds
from peer.swarm.transport import PeerCallError, Stream, StreamError, Transport
from protos.contract.certificate import Tag, half_votes_by_voter, is_quorum
from protos.contract.codecs_wire import result_codec_of_bytes
from protos.contract.digest import StateMeta, digest_of_pieces, num_pieces, piece_digest
from protos.contract.errors import CorruptDataError
from protos.contract.ids import COORDINATOR_VOTER
from protos.contract.signing import has_valid_signature
from protos.muster.v1 import common_pb2, rounds_pb2, state_pb2

logger = logging.getLogger(__name__)

STATE_INFO_CALL = "state_info"
AVERAGED_STREAM = "averaged"
SNAPSHOT_STREAM = "snapshot"
_HEADER_SECONDS = 3.0
"""Longest wait for a donor's first answer, until every other was asked."""
_MOST_ATTESTATIONS = 8
"""Of one member, whose signatures are checked; it shows those of its last states."""
_PIECE_SECONDS = 20.0
"""Longest wait for one piece before another donor is tried."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProvenState:
    """A state that enough members have signed for."""

    incarnation: int
    outer_step: int
    state_digest: bytes
    donors: tuple[str, ...]


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


@dataclass(frozen=True, slots=True, kw_only=True)
class CertifiedStep:
    """What a checked certificate says of an outer step."""

    directive: common_pb2.Directive
    """Under which it was certified."""
    has_coordinator: bool
    """The coordinator's half vote is among its votes."""


def newest_proven_state(
    infos: Mapping[str, state_pb2.StateInfoResponse],
    *,
    run_id: str,
    incarnation: int,
    directive: common_pb2.Directive,
    own_peer_id: str,
    base_outer_step: int,
    certified_by_step: Mapping[int, CertifiedStep],
) -> ProvenState | None:
    """Highest state whose equal signed attestations are more than half of the members' votes.

    The votes are those of the newest `directive`, or of the one under which that outer step was
    certified: who decides an average also knows the state that follows from it, and of a larger
    roster too many may be behind. If the coordinator's half vote certified the step it counts along
    there, when nobody contradicts: else half of the voters, who go on with it when the other half
    was lost at once, could never bring those back.

    With at most two voters the own vote counts along with the other's when nobody contradicts it:
    taking a state is agreeing to it. So one of two voters can bring the other back, but only to an
    outer step that a quorum has certified or that the incarnation's signed
    record names as its base; among more voters, the others alone must be enough.
    """
    key_by_peer = {entry.peer_id: entry.public_key for entry in directive.roster}
    backers: dict[tuple[int, bytes], set[str]] = {}
    for peer_id, info in infos.items():
        for signed in info.attestations[:_MOST_ATTESTATIONS]:
            if not has_valid_signature(
                key_by_peer.get(peer_id, b""), Tag.ATTESTATION, signed.payload, signed.signature
            ):
                continue
            try:
                attestation = common_pb2.Attestation.FromString(signed.payload)
            except DecodeError as error:
                logger.warning("%s signed a malformed attestation: %s", peer_id, error)
                continue
            place = (attestation.run_id, attestation.incarnation, attestation.peer_id)
            if place == (run_id, incarnation, peer_id):
                key = (attestation.outer_step, attestation.state_digest)
                backers.setdefault(key, set()).add(peer_id)
    num_digests = Counter(outer_step for outer_step, _ in backers)
    may_count_own = sum(entry.has_vote for entry in directive.roster) <= 2
    for (outer_step, digest), peers in sorted(backers.items(), reverse=True):
        voters = set(peers)
        is_uncontradicted = num_digests[outer_step] == 1
        certified = certified_by_step.get(outer_step)
        has_happened = certified is not None or outer_step == base_outer_step
        if may_count_own and has_happened and is_uncontradicted:
            voters.add(own_peer_id)
        backers_then = set(peers)
        if certified is not None and certified.has_coordinator and is_uncontradicted:
            backers_then.add(COORDINATOR_VOTER)
        if _have_most_votes(voters, directive) or (
            certified is not None and _have_most_votes(backers_then, certified.directive)
        ):
            return ProvenState(
                incarnation=incarnation,
                outer_step=outer_step,
                state_digest=digest,
                donors=tuple(sorted(peers)),
            )
    return None


def _have_most_votes(voters: set[str], directive: common_pb2.Directive) -> bool:
    return is_quorum(voters, half_votes_by_voter(directive.roster))


def proves_state(certificate: rounds_pb2.Certificate, meta: StateMeta, digest: bytes) -> bool:
    """True if a (valid) certificate names this state as the one before it: every voter held it."""
    value = rounds_pb2.RoundValue.FromString(certificate.value)
    place = (value.incarnation, value.outer_step)
    is_next = place == (meta.incarnation, meta.outer_step + 1)
    return bool(is_next and value.previous_state_digest == digest)


def is_resuming_cheaper(
    *, num_missing: int, num_pieces: int, num_steps: int, pieces_per_step: int
) -> bool:
    """True if the rest of an older state and the steps made since are fewer bytes than the newest
    state.
    """
    return num_missing + num_steps * pieces_per_step < num_pieces


async def fetch_averaged(
    transport: Transport,
    holders: Iterable[str],
    averaged_digest: bytes,
    *,
    codec_name: str,
    num_values: int,
    on_silent: Callable[[str, float, str], None] = lambda *_: None,
) -> AveragedVector | None:
    """Averaged bytes from any holder, every piece checked; None if nobody could give them.

    Each is given a moment to answer, then, if nobody has, longer. Calls `on_silent` with who does
    not answer at all, the monotonic seconds of when it was asked, and the reason.
    """
    turns = deque((peer, _HEADER_SECONDS) for peer in holders)
    while turns:
        peer_id, answer_seconds = turns.popleft()
        stream: Stream | None = None
        begin_seconds = time.monotonic()
        try:
            stream = await transport.open_stream(peer_id, AVERAGED_STREAM)
            request = state_pb2.AveragedRequest(averaged_digest=averaged_digest)
            await stream.send_message(request)
            return await _receive_averaged(
                stream,
                averaged_digest,
                codec_name=codec_name,
                num_values=num_values,
                answer_seconds=answer_seconds,
            )
        except (PeerCallError, StreamError, TimeoutError, CorruptDataError) as error:
            logger.info("averaged bytes from %s refused: %s", peer_id, error)
            if isinstance(error, PeerCallError) and error.is_down:
                on_silent(peer_id, begin_seconds, str(error))
                if answer_seconds < _PIECE_SECONDS:
                    turns.append((peer_id, _PIECE_SECONDS))
        finally:
            if stream is not None:
                stream.close()
    return None


async def _receive_averaged(
    stream: Stream,
    averaged_digest: bytes,
    *,
    codec_name: str,
    num_values: int,
    answer_seconds: float = _PIECE_SECONDS,
) -> AveragedVector:
    try:
        header = await asyncio.wait_for(
            stream.read_message(state_pb2.AveragedHeader), answer_seconds
        )
    except TimeoutError as error:
        raise PeerCallError(f"no answer within {answer_seconds:.0f} s", is_down=True) from error
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
