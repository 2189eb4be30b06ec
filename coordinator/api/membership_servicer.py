"""Membership: join, heartbeat, leave."""

from collections.abc import Callable
from typing import Any

from coordinator.api import wire
from coordinator.api.auth import Authenticator, NonceBook
from coordinator.api.calls import Calls, caller
from coordinator.operations.join import join
from coordinator.operations.membership import heartbeat, leave
from protos.muster.v1 import membership_pb2, membership_pb2_grpc


class MembershipServicer(membership_pb2_grpc.MembershipServicer):
    """See membership.proto."""

    def __init__(
        self,
        *,
        calls: Calls,
        authenticator: Authenticator,
        nonces: NonceBook,
        rendezvous_addresses: Callable[[], tuple[str, ...]],
        checkpoint_mirrors: tuple[str, ...],
        clock: Callable[[], float],
    ) -> None:
        self._calls = calls
        self._authenticator = authenticator
        self._nonces = nonces
        self._rendezvous_addresses = rendezvous_addresses
        self._checkpoint_mirrors = checkpoint_mirrors
        self._clock = clock

    async def Challenge(
        self, request: membership_pb2.ChallengeRequest, context: Any
    ) -> membership_pb2.ChallengeResponse:
        """A fresh nonce."""
        nonce, now_time = self._nonces.issue(), wire.timestamp(self._clock())
        return membership_pb2.ChallengeResponse(nonce=nonce, now_time=now_time)

    async def Join(
        self, request: membership_pb2.JoinRequest, context: Any
    ) -> membership_pb2.JoinResponse:
        """Token or known key in, session out."""
        self._nonces.use(request.nonce)
        response = await self._calls.change(join, wire.join_request_from_wire(request))
        self._authenticator.forget(response.peer_id)
        return wire.join_response_to_wire(
            response,
            rendezvous=self._rendezvous_addresses(),
            checkpoint_mirrors=self._checkpoint_mirrors,
        )

    async def Heartbeat(
        self, request: membership_pb2.HeartbeatRequest, context: Any
    ) -> membership_pb2.HeartbeatResponse:
        """Claims up, decisions down; repeating one is harmless, so its answer is not kept."""
        response = await self._calls.change(
            heartbeat, wire.heartbeat_request_from_wire(request, caller())
        )
        return wire.heartbeat_response_to_wire(response, rendezvous=self._rendezvous_addresses())

    async def Leave(
        self, request: membership_pb2.LeaveRequest, context: Any
    ) -> membership_pb2.LeaveResponse:
        """The end in good order; the session stays valid until it expires, so a repeated Leave is
        answered.
        """
        response = await self._calls.change(leave, wire.leave_request_from_wire(request, caller()))
        return membership_pb2.LeaveResponse(num_released_leases=response.num_released_leases)
