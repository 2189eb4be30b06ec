"""MusterError <-> gRPC: the status says what kind, trailing metadata which one
(protos/contract/channel.py).
"""

from typing import Any, NoReturn

import grpc

from protos.contract.channel import error_metadata
from protos.contract.errors import ErrorCode, MusterError

_STATUS_BY_CODE = {
    ErrorCode.SESSION_INVALID: grpc.StatusCode.UNAUTHENTICATED,
    ErrorCode.CLOCK_SKEW: grpc.StatusCode.UNAUTHENTICATED,
    ErrorCode.RATE_LIMITED: grpc.StatusCode.RESOURCE_EXHAUSTED,
}
"""Codes whose status says more than their class does."""


def status_of(error: MusterError) -> grpc.StatusCode:
    """The gRPC status that carries this error."""
    return _STATUS_BY_CODE.get(error.code) or grpc.StatusCode[error.grpc_status_name]


async def abort(context: Any, error: MusterError) -> NoReturn:
    """End the call with this error. `context` is a grpc.aio.ServicerContext."""
    await context.abort(status_of(error), str(error), error_metadata(error))
    raise error  # context.abort always raises; this tells the type checker
