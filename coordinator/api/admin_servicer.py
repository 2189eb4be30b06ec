"""Admin: the operator's operations by name, arguments and results as JSON."""

import json
from typing import Any

from coordinator.api.auth import Authenticator
from coordinator.api.calls import Calls
from coordinator.operations import admin, duties, membership, status, studies, tokens
from coordinator.operations.catalogue import OPERATIONS, Operation
from coordinator.operations.plain import from_plain, plain_from_response
from protos.contract.digest import canonical_json
from protos.contract.errors import ErrorCode, UsageError
from protos.muster.v1 import runs_pb2, runs_pb2_grpc

ADMIN_OPERATIONS: dict[str, Operation] = {item.name: item for item in OPERATIONS if item.is_admin}
ADMIN_FUNCTIONS: dict[str, Any] = {
    "peer_exited": membership.peer_exited,
    "create_run": admin.create_run,
    "list_runs": admin.list_runs,
    "pause_run": admin.pause_run,
    "resume_run": admin.resume_run,
    "stop_run": admin.stop_run,
    "evict_peer": admin.evict_peer,
    "create_token": tokens.create_token,
    "list_tokens": tokens.list_tokens,
    "revoke_token": tokens.revoke_token,
    "find_checkpoint": duties.find_checkpoint,
    "create_study": studies.create_study,
    "study_status": studies.study_status,
    "status": status.status,
    "peers": status.peers,
    "events": status.events,
    "series": status.series,
}
"""What the catalogue's admin operations are; a test compares the two."""
_NOT_REMEMBERED = frozenset({"create_token"})
"""Its answer holds a secret, of which the store keeps the digest only."""


def admin_operation(name: str) -> Operation:
    """Entry of the catalogue. Raises UsageError (UNKNOWN_OPERATION)."""
    operation = ADMIN_OPERATIONS.get(name)
    if operation is None:
        raise UsageError(
            f"operation {name!r}",
            allowed=", ".join(ADMIN_OPERATIONS),
            remedy="use the muster-coordinator of the same version",
            code=ErrorCode.UNKNOWN_OPERATION,
        )
    return operation


class AdminServicer(runs_pb2_grpc.AdminServicer):
    """See runs.proto; the interceptor lets only the admin key come here."""

    def __init__(self, *, calls: Calls, authenticator: Authenticator) -> None:
        self._calls = calls
        self._authenticator = authenticator

    async def Perform(
        self, request: runs_pb2.PerformRequest, context: Any
    ) -> runs_pb2.PerformResponse:
        """One operation."""
        operation = admin_operation(request.operation)
        function = ADMIN_FUNCTIONS[operation.name]
        arguments: Any = from_plain(operation.request, _parse(request.arguments_json))
        if operation.is_read_only:
            answer = _to_json(await self._calls.read(function, arguments))
        else:
            request_id = "" if operation.name in _NOT_REMEMBERED else request.request_id
            answer = await self._calls.change_once(
                function,
                arguments,
                request_id=request_id,
                method=operation.name,
                serialise=_to_json,
            )
            self._authenticator.forget_all()  # an evicted peer's session ends now
        return runs_pb2.PerformResponse(result_json=answer.decode())


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UsageError(
            f"arguments are not JSON: {error}",
            allowed="what this version's client sends",
            remedy="upgrade the client",
        ) from error


def _to_json(response: Any) -> bytes:
    return canonical_json(plain_from_response(response))
