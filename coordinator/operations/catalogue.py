"""Every operation of membership, runs, tokens, duties, tick and status, by name; leases and rounds
are the ledger's.
"""

from dataclasses import dataclass

from coordinator.operations.requests import (
    BeginUploadRequest,
    BeginUploadResponse,
    FindCheckpointRequest,
    FindCheckpointResponse,
    FindSessionRequest,
    FindSessionResponse,
    FinishUploadRequest,
    FinishUploadResponse,
    HeartbeatRequest,
    HeartbeatResponse,
    JoinRequest,
    JoinResponse,
    LeaveRequest,
    LeaveResponse,
    PeerExitedRequest,
    ReportDutyRequest,
    ReportDutyResponse,
    TickRequest,
    TickResponse,
)
from coordinator.operations.requests_admin import (
    CreateRunRequest,
    CreateRunResponse,
    CreateTokenRequest,
    CreateTokenResponse,
    EventsRequest,
    EventsResponse,
    EvictPeerRequest,
    EvictPeerResponse,
    ListRunsRequest,
    ListRunsResponse,
    ListTokensRequest,
    ListTokensResponse,
    PeersRequest,
    PeersResponse,
    RevokeTokenRequest,
    RevokeTokenResponse,
    RunRequest,
    RunSummary,
    SeriesRequest,
    SeriesResponse,
    StatusRequest,
    StatusResponse,
)
from coordinator.operations.requests_studies import (
    CreateStudyRequest,
    CreateStudyResponse,
    StudyRequest,
    StudyStatus,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One operation: a function (ctx, request) in a module of coordinator/operations, run on the
    writer thread.
    """

    name: str
    """Also the function's name, and `operation` of Admin.Perform where is_admin."""
    module: str
    request: type
    response: type
    is_admin: bool = False
    """True if the operator's command line may ask for it."""
    is_read_only: bool = False


OPERATIONS: tuple[Operation, ...] = (
    Operation(name="join", module="join", request=JoinRequest, response=JoinResponse),
    Operation(
        name="find_session",
        module="membership",
        request=FindSessionRequest,
        response=FindSessionResponse,
        is_read_only=True,
    ),
    Operation(
        name="heartbeat", module="membership", request=HeartbeatRequest, response=HeartbeatResponse
    ),
    Operation(name="leave", module="membership", request=LeaveRequest, response=LeaveResponse),
    Operation(
        name="peer_exited",
        module="membership",
        request=PeerExitedRequest,
        response=LeaveResponse,
        is_admin=True,
    ),
    Operation(
        name="create_run",
        module="admin",
        request=CreateRunRequest,
        response=CreateRunResponse,
        is_admin=True,
    ),
    Operation(
        name="list_runs",
        module="admin",
        request=ListRunsRequest,
        response=ListRunsResponse,
        is_admin=True,
        is_read_only=True,
    ),
    Operation(
        name="pause_run", module="admin", request=RunRequest, response=RunSummary, is_admin=True
    ),
    Operation(
        name="resume_run", module="admin", request=RunRequest, response=RunSummary, is_admin=True
    ),
    Operation(
        name="stop_run", module="admin", request=RunRequest, response=RunSummary, is_admin=True
    ),
    Operation(
        name="evict_peer",
        module="admin",
        request=EvictPeerRequest,
        response=EvictPeerResponse,
        is_admin=True,
    ),
    Operation(
        name="create_token",
        module="tokens",
        request=CreateTokenRequest,
        response=CreateTokenResponse,
        is_admin=True,
    ),
    Operation(
        name="list_tokens",
        module="tokens",
        request=ListTokensRequest,
        response=ListTokensResponse,
        is_admin=True,
        is_read_only=True,
    ),
    Operation(
        name="revoke_token",
        module="tokens",
        request=RevokeTokenRequest,
        response=RevokeTokenResponse,
        is_admin=True,
    ),
    Operation(
        name="report_duty", module="duties", request=ReportDutyRequest, response=ReportDutyResponse
    ),
    Operation(
        name="begin_upload",
        module="duties",
        request=BeginUploadRequest,
        response=BeginUploadResponse,
    ),
    Operation(
        name="finish_upload",
        module="duties",
        request=FinishUploadRequest,
        response=FinishUploadResponse,
    ),
    Operation(
        name="find_checkpoint",
        module="duties",
        request=FindCheckpointRequest,
        response=FindCheckpointResponse,
        is_admin=True,
        is_read_only=True,
    ),
    Operation(
        name="create_study",
        module="studies",
        request=CreateStudyRequest,
        response=CreateStudyResponse,
        is_admin=True,
    ),
    Operation(
        name="study_status",
        module="studies",
        request=StudyRequest,
        response=StudyStatus,
        is_admin=True,
        is_read_only=True,
    ),
    Operation(name="tick", module="tick", request=TickRequest, response=TickResponse),
    Operation(
        name="status",
        module="status",
        request=StatusRequest,
        response=StatusResponse,
        is_admin=True,
        is_read_only=True,
    ),
    Operation(
        name="peers",
        module="status",
        request=PeersRequest,
        response=PeersResponse,
        is_admin=True,
        is_read_only=True,
    ),
    Operation(
        name="events",
        module="status",
        request=EventsRequest,
        response=EventsResponse,
        is_admin=True,
        is_read_only=True,
    ),
    Operation(
        name="series",
        module="status",
        request=SeriesRequest,
        response=SeriesResponse,
        is_admin=True,
        is_read_only=True,
    ),
)
"""Every operation of membership, admin, tokens, duties, tick and status; leases and rounds are the
ledger's.
"""
