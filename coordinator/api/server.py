"""The gRPC server: which services there are, what stands before them, on which port.

Limits come from protos/contract/channel.py (sizes, pings) and from the configuration (calls in
progress, rates); a taken port is an error and never shared with another process.
"""

from collections.abc import Callable
from dataclasses import dataclass

import grpc

from coordinator.api.admin_servicer import AdminServicer
from coordinator.api.auth import Authenticator, NonceBook
from coordinator.api.calls import Calls
from coordinator.api.corpus_servicer import CorpusServicer
from coordinator.api.duties_servicer import DutiesServicer
from coordinator.api.interceptor import BorderInterceptor
from coordinator.api.leases_servicer import LeasesServicer
from coordinator.api.membership_servicer import MembershipServicer
from coordinator.api.rate_limit import RateLimiter
from coordinator.api.rounds_servicer import RoundsServicer
from coordinator.config import CoordinatorConfig
from coordinator.identity import Identity
from coordinator.metrics import CoordinatorMetrics
from coordinator.operations.membership import find_session
from coordinator.operations.requests import FindSessionRequest, FindSessionResponse
from coordinator.operations.writer import Writer
from coordinator.ports import require_free
from protos.contract.channel import server_credentials, server_options
from protos.contract.errors import ErrorCode, MachineError
from protos.muster.v1 import (
    corpus_pb2_grpc,
    duties_pb2_grpc,
    leases_pb2_grpc,
    membership_pb2_grpc,
    rounds_pb2_grpc,
    runs_pb2_grpc,
)

MEMBER_BURST_FACTOR = 4
STRANGER_BURST_FACTOR = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundServer:
    """A server that has its port and serves after `start`."""

    server: grpc.aio.Server
    port: int


def build_server(
    config: CoordinatorConfig,
    *,
    writer: Writer,
    identity: Identity,
    metrics: CoordinatorMetrics,
    rendezvous_addresses: Callable[[], tuple[str, ...]],
    clock: Callable[[], float],
) -> BoundServer:
    """Make the server and take its port. Call inside the event loop. Raises MachineError
    (PORT_IN_USE).
    """

    def read_session(peer_id: str) -> FindSessionResponse:
        return writer.read(find_session, FindSessionRequest(peer_id=peer_id))

    authenticator = Authenticator(
        admin_key=identity.admin_key, find_session=read_session, clock=clock
    )
    interceptor = BorderInterceptor(
        authenticator=authenticator,
        member_limiter=_limiter(config.peer_calls_per_second, MEMBER_BURST_FACTOR),
        stranger_limiter=_limiter(config.join_calls_per_second, STRANGER_BURST_FACTOR),
        observe_call=metrics.observe_call,
    )
    server = grpc.aio.server(
        interceptors=[interceptor],
        options=server_options(),
        maximum_concurrent_rpcs=config.max_concurrent_rpcs,
    )
    calls = Calls(writer)
    membership = MembershipServicer(
        calls=calls,
        authenticator=authenticator,
        nonces=NonceBook(clock=clock),
        rendezvous_addresses=rendezvous_addresses,
        checkpoint_mirrors=config.checkpoint_mirrors,
        clock=clock,
    )
    duties = DutiesServicer(
        calls=calls, data_dir=config.data_dir, observe_sent=metrics.observe_sent
    )
    corpus = CorpusServicer(calls=calls, observe_sent=metrics.observe_sent)
    admin = AdminServicer(calls=calls, authenticator=authenticator)
    membership_pb2_grpc.add_MembershipServicer_to_server(membership, server)
    leases_pb2_grpc.add_LeasesServicer_to_server(LeasesServicer(calls=calls), server)
    rounds_pb2_grpc.add_RoundsServicer_to_server(RoundsServicer(calls=calls), server)
    corpus_pb2_grpc.add_CorpusServicer_to_server(corpus, server)
    duties_pb2_grpc.add_DutiesServicer_to_server(duties, server)
    runs_pb2_grpc.add_AdminServicer_to_server(admin, server)
    return BoundServer(server=server, port=_bind(server, config, identity))


def join_address(host: str, port: int) -> str:
    """HOST:PORT, brackets around an IPv6 host."""
    return f"[{host.strip('[]')}]:{port}" if ":" in host else f"{host}:{port}"


def _limiter(calls_per_second: float, burst_factor: float) -> RateLimiter:
    return RateLimiter(
        calls_per_second=calls_per_second, burst_calls=burst_factor * calls_per_second
    )


def _bind(server: grpc.aio.Server, config: CoordinatorConfig, identity: Identity) -> int:
    require_free(config.host, config.port, what="the coordinator", flag="--port")
    address = join_address(config.host, config.port)
    credentials = server_credentials(identity.cert_pem, identity.key_pem)
    try:
        port: int = server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise MachineError(
            f"cannot listen on {address}",
            allowed="a free port on an interface of this machine",
            remedy="pass --port PORT (0 lets the system choose) or stop what holds the port",
            code=ErrorCode.PORT_IN_USE,
        ) from error
    return port
