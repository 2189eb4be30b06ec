"""Duties: results, uploads and downloads of checkpoints."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from coordinator.api import wire
from coordinator.api.calls import Calls, caller, serialise_with
from coordinator.api.checkpoint_check import check_checkpoint
from coordinator.api.files import IncomingFile, read_parts
from coordinator.operations.common import OperationContext, load_run_data
from coordinator.operations.duties import begin_upload, find_checkpoint, finish_upload, report_duty
from coordinator.operations.requests import (
    BeginUploadRequest,
    BeginUploadResponse,
    FindCheckpointRequest,
    FinishUploadRequest,
    ReportDutyResponse,
)
from coordinator.store.base import Transaction
from protos.contract.channel import STREAM_DEADLINE_SECONDS, transfer_deadline_seconds
from protos.contract.errors import ErrorCode, RefusedError, UsageError
from protos.contract.model_shape import ModelShape
from protos.muster.v1 import duties_pb2, duties_pb2_grpc

_HEADER_BYTES = 2**21
"""Room for safetensors' header: state meta, directive, unreported certificates."""


def most_upload_bytes(
    tx: Transaction, run_id: str, /, *, context: OperationContext, now_unix_seconds: float
) -> int:
    """Largest checkpoint file of a run: its state vectors and their header. Only reads."""
    model = load_run_data(tx, context, run_id).spec.model
    return ModelShape.from_spec(model).state_bytes + _HEADER_BYTES


class DutiesServicer(duties_pb2_grpc.DutiesServicer):
    """See duties.proto."""

    def __init__(
        self, *, calls: Calls, data_dir: Path, observe_sent: Callable[[str, int], None]
    ) -> None:
        self._calls = calls
        self._data_dir = data_dir
        self._observe_sent = observe_sent

    async def ReportDuty(
        self, request: duties_pb2.ReportDutyRequest, context: Any
    ) -> duties_pb2.ReportDutyResponse:
        """Result or failure of a duty."""
        answer = await self._calls.change_once(
            report_duty,
            wire.report_duty_from_wire(request, caller()),
            request_id=request.request_id,
            method="ReportDuty",
            serialise=serialise_with(_report_response_to_wire),
        )
        response: duties_pb2.ReportDutyResponse = duties_pb2.ReportDutyResponse.FromString(answer)
        return response

    async def UploadCheckpoint(
        self, parts: AsyncIterator[duties_pb2.UploadCheckpointRequest], context: Any
    ) -> duties_pb2.UploadCheckpointResponse:
        """Header, then the file; stored only if it is the proved state."""
        async with asyncio.timeout(STREAM_DEADLINE_SECONDS):
            header = await anext(parts, None)
        if header is None or not header.HasField("header"):
            raise UsageError(
                "an upload without header", allowed="the header first", remedy="upgrade the client"
            )
        upload = wire.begin_upload_from_wire(header.header, caller())
        await self._check_size(upload)
        accepted = await self._calls.change(begin_upload, upload)
        if not accepted.is_accepted:
            return duties_pb2.UploadCheckpointResponse(is_accepted=False, reason=accepted.reason)
        async with asyncio.timeout(transfer_deadline_seconds(upload.total_bytes)):
            return await self._receive(parts, header.data, upload, accepted)

    async def _check_size(self, upload: BeginUploadRequest) -> None:
        most_bytes = await self._calls.read(most_upload_bytes, upload.run_id)
        if upload.total_bytes > most_bytes:
            raise UsageError(
                f"a checkpoint of {upload.total_bytes} bytes",
                allowed=f"at most {most_bytes} for this run's model",
                remedy="upload one state",
                code=ErrorCode.TOO_LARGE,
            )

    async def _receive(
        self,
        parts: AsyncIterator[duties_pb2.UploadCheckpointRequest],
        first_data: bytes,
        upload: BeginUploadRequest,
        accepted: BeginUploadResponse,
    ) -> duties_pb2.UploadCheckpointResponse:
        path = self._data_dir / accepted.path
        async with IncomingFile(path, total_bytes=upload.total_bytes) as file:
            await file.write(first_data)
            async for part in parts:
                await file.write(part.data)
            await file.finish()
            await asyncio.to_thread(
                check_checkpoint,
                file.path,
                incarnation=accepted.incarnation,
                outer_step=accepted.outer_step,
                state_digest=accepted.state_digest,
            )
            file.keep()
        finished = await self._calls.change(finish_upload, _finish_request(upload, accepted))
        for superseded in finished.remove_paths:
            (self._data_dir / superseded).unlink(missing_ok=True)
        return duties_pb2.UploadCheckpointResponse(
            is_accepted=finished.is_accepted, reason=finished.reason
        )

    async def FetchCheckpoint(
        self, request: duties_pb2.FetchCheckpointRequest, context: Any
    ) -> AsyncIterator[duties_pb2.FetchCheckpointResponse]:
        """The newest stored checkpoint."""
        wanted = FindCheckpointRequest(
            run_id=caller().run_id, max_outer_step=request.max_outer_step
        )
        found = await self._calls.read(find_checkpoint, wanted)
        if found.checkpoint is None:
            raise RefusedError(
                found.reason,
                allowed="steps for which there is a checkpoint",
                remedy="ask a member for its state",
                code=ErrorCode.NOT_READY,
            )
        message = wire.checkpoint_header_to_wire(found.checkpoint)
        async for part, _ in read_parts(self._data_dir / found.checkpoint.path):
            message.data = part
            yield message
            self._observe_sent("checkpoint", len(part))
            message = duties_pb2.FetchCheckpointResponse()


def _report_response_to_wire(response: ReportDutyResponse) -> duties_pb2.ReportDutyResponse:
    return duties_pb2.ReportDutyResponse(is_accepted=response.is_accepted, reason=response.reason)


def _finish_request(
    upload: BeginUploadRequest, accepted: BeginUploadResponse
) -> FinishUploadRequest:
    return FinishUploadRequest(
        run_id=upload.run_id,
        peer_id=upload.peer_id,
        duty_id=upload.duty_id,
        fence=upload.fence,
        incarnation=accepted.incarnation,
        outer_step=accepted.outer_step,
        state_digest=accepted.state_digest,
        path=accepted.path,
        total_bytes=upload.total_bytes,
    )
