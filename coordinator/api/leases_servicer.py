"""Leases: grant and return."""

from typing import Any

from coordinator.api import wire
from coordinator.api.calls import Calls, caller
from coordinator.operations.leases import acquire_leases, release_leases
from protos.muster.v1 import leases_pb2, leases_pb2_grpc


class LeasesServicer(leases_pb2_grpc.LeasesServicer):
    """See leases.proto."""

    def __init__(self, *, calls: Calls) -> None:
        self._calls = calls

    async def AcquireLeases(
        self, request: leases_pb2.AcquireLeasesRequest, context: Any
    ) -> leases_pb2.AcquireLeasesResponse:
        """Signed leases, durable before this returns; the same request id gives the same ones."""
        response = await self._calls.change(
            acquire_leases, wire.acquire_leases_from_wire(request, caller())
        )
        return leases_pb2.AcquireLeasesResponse(
            leases=response.leases,
            reason=response.reason,
            is_budget_exhausted=response.is_budget_exhausted,
        )

    async def ReleaseLeases(
        self, request: leases_pb2.ReleaseLeasesRequest, context: Any
    ) -> leases_pb2.ReleaseLeasesResponse:
        """Leases given back; repeating it releases nothing more."""
        response = await self._calls.change(
            release_leases, wire.release_leases_from_wire(request, caller())
        )
        return leases_pb2.ReleaseLeasesResponse(num_released_leases=response.num_released_leases)
