"""The command line's side of Admin.Perform: one call to the running coordinator, with the data
directory's admin key.
"""

import asyncio
import json
import secrets
import time
from pathlib import Path
from typing import Any

import grpc

from coordinator.identity import load_admin_key, load_certificate, load_running
from coordinator.operations.plain import plain_from_response
from protos.contract.channel import (
    ADMIN_PEER,
    UNARY_DEADLINE_SECONDS,
    auth_metadata,
    error_from_rpc,
    open_aio_channel,
)
from protos.contract.digest import canonical_json
from protos.muster.v1 import runs_pb2, runs_pb2_grpc

_METHOD = "/muster.v1.Admin/Perform"


def perform_remotely(
    data_dir: Path,
    operation: str,
    request: Any,
    *,
    deadline_seconds: float = UNARY_DEADLINE_SECONDS,
) -> Any:
    """Ask the coordinator that runs on `data_dir`; returns the operation's answer as plain data.

    Raises UnavailableError when none answers, and whatever the operation raised there.
    """
    running = load_running(data_dir)
    admin_key, cert_pem = load_admin_key(data_dir), load_certificate(data_dir)
    message = runs_pb2.PerformRequest(
        request_id=secrets.token_hex(16),
        operation=operation,
        arguments_json=canonical_json(plain_from_response(request)).decode(),
    )
    return asyncio.run(
        _perform(running.local_address, cert_pem, admin_key, message, deadline_seconds)
    )


async def _perform(
    address: str,
    cert_pem: bytes,
    admin_key: bytes,
    message: runs_pb2.PerformRequest,
    deadline_seconds: float,
) -> Any:
    async with open_aio_channel(address, cert_pem) as channel:
        metadata = auth_metadata(
            admin_key, method=_METHOD, peer_id=ADMIN_PEER, now_unix_seconds=time.time()
        )
        call = runs_pb2_grpc.AdminStub(channel).Perform
        try:
            response = await call(message, metadata=metadata, timeout=deadline_seconds)
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error
    return json.loads(response.result_json)
