"""Rounds: the coordinator as a half voter and as the keeper of certificates."""

from typing import Any

from coordinator.api import wire
from coordinator.api.calls import Calls, caller
from coordinator.operations.requests_ledger import ReportCertificatesRequest
from coordinator.operations.rounds import (
    exchange,
    fetch_certificates,
    report_certificates,
    submit_votes,
)
from protos.muster.v1 import rounds_pb2, rounds_pb2_grpc


class RoundsServicer(rounds_pb2_grpc.RoundsServicer):
    """See rounds.proto; everything here is idempotent by itself."""

    def __init__(self, *, calls: Calls) -> None:
        self._calls = calls

    async def Exchange(
        self, request: rounds_pb2.CoordinatorExchangeRequest, context: Any
    ) -> rounds_pb2.CoordinatorExchangeResponse:
        """A durable promise and the highest vote."""
        response = await self._calls.change(exchange, wire.exchange_from_wire(request, caller()))
        return wire.exchange_response_to_wire(response)

    async def SubmitVotes(
        self, request: rounds_pb2.SubmitVotesRequest, context: Any
    ) -> rounds_pb2.SubmitVotesResponse:
        """Adds the coordinator's half if that completes a quorum."""
        response = await self._calls.change(
            submit_votes, wire.submit_votes_from_wire(request, caller())
        )
        return rounds_pb2.SubmitVotesResponse(
            certificate=response.certificate, reason=response.reason
        )

    async def ReportCertificates(
        self, request: rounds_pb2.ReportCertificatesRequest, context: Any
    ) -> rounds_pb2.ReportCertificatesResponse:
        """Stores and credits."""
        certificates = wire.checked_length(
            list(request.certificates), name="certificates", most=wire.MAX_CERTIFICATES
        )
        report = ReportCertificatesRequest(run_id=caller().run_id, certificates=tuple(certificates))
        response = await self._calls.change(report_certificates, report)
        return rounds_pb2.ReportCertificatesResponse(
            receipts=[wire.receipt_to_wire(receipt) for receipt in response.receipts],
            directive=response.directive,
        )

    async def FetchCertificates(
        self, request: rounds_pb2.FetchCertificatesRequest, context: Any
    ) -> rounds_pb2.FetchCertificatesResponse:
        """Stored certificates in order."""
        wanted = wire.fetch_certificates_from_wire(request, caller())
        response = await self._calls.read(fetch_certificates, wanted)
        return rounds_pb2.FetchCertificatesResponse(
            certificates=[wire.certificate_from_bytes(data) for data in response.certificates]
        )
