"""Round messages on their way to members, and what their answers say of who is there."""

import asyncio
import logging
import time

from peer.swarm import round_types as rt
from peer.swarm.contacts import Contacts
from peer.swarm.coordinator_questions import Post
from peer.swarm.pace import FIRST_CALL_SECONDS
from peer.swarm.transport import PeerCallError, Transport
from protos.muster.v1 import rounds_pb2

logger = logging.getLogger(__name__)

ROUND_CALL = "round"
_NUM_CALLS = 2
_AGAIN_SECONDS = 0.2
"""From a call that failed to the next, at least."""
_SMALL_BYTES, _LEAST_BYTES_PER_SECOND = 16_384, 250_000
"""A larger message may take longer: those that form a group carry a digest for every piece."""


class Delivery:
    """Calls members; what comes of it is an event of the message's step."""

    def __init__(self, transport: Transport, contacts: Contacts, post: Post) -> None:
        self._transport, self._contacts, self._post = transport, contacts, post
        self._awaited: set[str] = set()
        """Members that a last, patient call is under way to."""
        self._told: set[str] = set()

    async def deliver(self, peer_id: str, message: rounds_pb2.RoundMessage) -> None:
        """Call a member, and once more without success: after a refusal a moment later, after
        silence at once.

        If it counts as gone then, one more call waits as long as any may take, so that a member
        that is only slow is heard again.
        """
        place = (message.incarnation, message.outer_step)
        for number in range(_NUM_CALLS):
            begin_seconds = time.monotonic()
            timeout_seconds = self._contacts.patience_seconds(peer_id) + _way_seconds(message)
            has_dialled = not self._transport.is_connected(peer_id)
            error = await self._call(peer_id, message, timeout_seconds)
            if error is None or not error.is_down:
                return
            spent_seconds = time.monotonic() - begin_seconds
            if self._contacts.failed(
                peer_id,
                begin_seconds=begin_seconds,
                now_seconds=begin_seconds + spent_seconds,
                timeout_seconds=timeout_seconds,
                has_dialled=has_dialled,
            ):
                self._post(place, rt.PeerUnreachable(peer_id, str(error)))
                if spent_seconds >= timeout_seconds and peer_id not in self._awaited:
                    await self._call_patiently(peer_id, message)
                return
            if number + 1 < _NUM_CALLS:
                await asyncio.sleep(max(0.0, _AGAIN_SECONDS - spent_seconds))

    async def tell(self, peer_id: str, message: rounds_pb2.RoundMessage) -> None:
        """Call a member once, whatever comes of it; not while it is still being told something, so
        that nobody has us send much to it by asking often.
        """
        if peer_id in self._told:
            return
        self._told.add(peer_id)
        try:
            await self._transport.call(peer_id, ROUND_CALL, message, rounds_pb2.RoundAck)
        except PeerCallError as error:
            logger.debug("message to %s: %s", peer_id, error)
        finally:
            self._told.discard(peer_id)

    async def _call_patiently(self, peer_id: str, message: rounds_pb2.RoundMessage) -> None:
        self._awaited.add(peer_id)
        try:
            await self._call(peer_id, message, FIRST_CALL_SECONDS + _way_seconds(message))
        finally:
            self._awaited.discard(peer_id)

    async def _call(
        self, peer_id: str, message: rounds_pb2.RoundMessage, timeout_seconds: float
    ) -> PeerCallError | None:
        has_dialled = not self._transport.is_connected(peer_id)
        begin_seconds = time.monotonic()
        try:
            ack = await self._transport.call(
                peer_id,
                ROUND_CALL,
                message,
                rounds_pb2.RoundAck,
                timeout_seconds=timeout_seconds,
            )
        except PeerCallError as error:
            logger.debug("message to %s: %s", peer_id, error)
            return error
        now = time.monotonic()
        self._contacts.answered(
            peer_id, begin_seconds=begin_seconds, now_seconds=now, has_dialled=has_dialled
        )
        self._post((message.incarnation, message.outer_step), rt.Acked(peer_id, ack))
        return None


def _way_seconds(message: rounds_pb2.RoundMessage) -> float:
    """What the bytes of a large message take on a slow link."""
    num_bytes: int = message.ByteSize()
    return max(0, num_bytes - _SMALL_BYTES) / _LEAST_BYTES_PER_SECOND
