"""Composition root: what a coordinator consists of, in the order in which it starts, and how it stops.

    lock + store -> keys -> RECOVERING -> writer thread -> rendezvous child -> gRPC server -> ticker -> web thread

Stopping goes the other way, with a deadline for calls in progress; a process that is killed instead loses nothing that was
acknowledged. `serve` and `up` use the same object.
"""

import asyncio
import importlib.metadata
import logging
import os
import socket
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any, TypeVar

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
from coordinator.domain.policy import SwarmPolicy
from coordinator.identity import (
    Identity,
    RunningCoordinator,
    forget_running,
    load_identity,
    save_running,
)
from coordinator.metrics import CoordinatorMetrics
from coordinator.operations.admin import list_runs
from coordinator.operations.common import BeginRecovery, OperationContext, begin_recovery
from coordinator.operations.membership import find_session
from coordinator.operations.requests import FindSessionRequest, FindSessionResponse
from coordinator.operations.requests_admin import ListRunsRequest
from coordinator.operations.writer import Operation, Writer
from coordinator.rendezvous import Rendezvous
from coordinator.store.sqlite import SqliteStore
from coordinator.ticker import Ticker
from coordinator.web.samples import RunSampler
from coordinator.web.server import WebServer, build_app
from coordinator.web.status_cache import StatusCache
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

_LOGGER = logging.getLogger(__name__)
_Request = TypeVar("_Request")
_Response = TypeVar("_Response")
_ANY_HOSTS = {"0.0.0.0": "127.0.0.1", "::": "::1", "[::]": "::1"}


class Coordinator:
    """One running coordinator; use `start` and `stop` from one event loop."""

    def __init__(
        self, config: CoordinatorConfig, *, clock: Callable[[], float] = time.time
    ) -> None:
        """`clock` returns unix seconds."""
        self.config = config
        self._clock = clock
        self._exit_stack = AsyncExitStack()
        self._rendezvous: Rendezvous | None = None
        self._writer: Writer | None = None
        self._identity: Identity | None = None
        self.address = ""
        """HOST:PORT that join strings name."""
        self.local_address = ""
        """HOST:PORT for this machine."""
        self.http_address = ""
        """Base address of the page."""

    @property
    def ca_fingerprint(self) -> str:
        """Hex SHA-256 of the certificate, once started."""
        assert self._identity is not None
        return self._identity.ca_fingerprint

    @property
    def rendezvous_addresses(self) -> tuple[str, ...]:
        """Multiaddresses that joiners are told first."""
        return self.config.rendezvous if self._rendezvous is None else self._rendezvous.addresses

    async def start(self) -> None:
        """Bring everything up, or take back what was brought up and raise what went wrong (MachineError mostly)."""
        try:
            await self._start()
        except BaseException:
            await self._exit_stack.aclose()
            raise

    async def stop(self) -> None:
        """End in good order: no new calls, calls in progress get the deadline, then store and lock are given back."""
        await self._exit_stack.aclose()

    async def perform(
        self, operation: Operation[_Request, _Response], request: _Request
    ) -> _Response:
        """Run an operation that changes something; durable when it returns. Raises what the operation raises."""
        assert self._writer is not None
        return await asyncio.wrap_future(self._writer.submit(operation, request))

    async def look(self, operation: Operation[_Request, _Response], request: _Request) -> _Response:
        """Run an operation that only reads."""
        assert self._writer is not None
        return await asyncio.to_thread(self._writer.read, operation, request)

    async def _start(self) -> None:
        config, on_stop = self.config, self._exit_stack
        store = SqliteStore.open(config.data_dir)
        on_stop.callback(store.close)
        identity = self._identity = load_identity(config.data_dir, hosts=_certificate_hosts(config))
        context = OperationContext(
            signing_key=identity.signing_key,
            data_dir=config.data_dir,
            heartbeat_interval_seconds=config.heartbeat_interval_seconds,
            lease_ttl_seconds=config.lease_ttl_seconds,
            policy=_policy(config),
        )
        writer = self._writer = Writer(store, context=context, clock=self._clock).start()
        on_stop.callback(writer.stop)
        await self._begin_recovery()
        await self._start_rendezvous()
        cache = StatusCache(writer)
        metrics = CoordinatorMetrics()
        sampler = RunSampler(
            cache,
            package_version=package_version(),
            observe_round_interval=metrics.observe_round_interval,
        )
        metrics.add_samples(sampler.samples)
        await self._start_server(writer, identity, metrics)
        ticker = Ticker(writer, observe_commit=metrics.observe_commit)
        ticker.start()
        on_stop.push_async_callback(ticker.stop)
        web = WebServer(
            build_app(cache=cache, metrics=metrics), host=config.http_host, port=config.http_port
        )
        web.start()
        on_stop.push_async_callback(asyncio.to_thread, web.stop)
        self.http_address = web.address
        save_running(config.data_dir, self._running())
        on_stop.callback(forget_running, config.data_dir)

    async def _begin_recovery(self) -> None:
        """Nothing expires for a while, so that peers of an earlier process can come back; before the first run, nobody can."""
        config = self.config
        if not (await self.look(list_runs, ListRunsRequest())).runs:
            return
        seconds = max(3 * config.heartbeat_interval_seconds, config.recovering_seconds)
        await self.perform(begin_recovery, BeginRecovery(seconds=seconds))

    async def _start_rendezvous(self) -> None:
        config = self.config
        if config.rendezvous or not config.has_rendezvous:
            return
        self._rendezvous = Rendezvous(
            home=config.data_dir / "rendezvous",
            host=config.rendezvous_host or config.host,
            port=config.rendezvous_port,
        )
        await self._rendezvous.start()
        self._exit_stack.push_async_callback(self._rendezvous.stop)

    async def _start_server(
        self, writer: Writer, identity: Identity, metrics: CoordinatorMetrics
    ) -> None:
        config, calls = self.config, Calls(writer)

        def read_session(peer_id: str) -> FindSessionResponse:
            return writer.read(find_session, FindSessionRequest(peer_id=peer_id))

        authenticator = Authenticator(
            admin_key=identity.admin_key, find_session=read_session, clock=self._clock
        )
        interceptor = BorderInterceptor(
            authenticator=authenticator,
            member_limiter=_limiter(config.peer_calls_per_second, burst_factor=4),
            stranger_limiter=_limiter(config.join_calls_per_second, burst_factor=10),
            observe_call=metrics.observe_call,
        )
        server = grpc.aio.server(
            interceptors=[interceptor],
            options=server_options(),
            maximum_concurrent_rpcs=config.max_concurrent_rpcs,
        )
        membership = MembershipServicer(
            calls=calls,
            authenticator=authenticator,
            nonces=NonceBook(clock=self._clock),
            rendezvous_addresses=lambda: self.rendezvous_addresses,
            clock=self._clock,
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
        port = _bind(server, config, identity)
        await server.start()
        self._exit_stack.push_async_callback(server.stop, config.stop_deadline_seconds)
        local_host = _ANY_HOSTS.get(config.host, config.host)
        self.local_address = _join_address(local_host, port)
        self.address = config.advertise or _join_address(_advertised_host(config.host), port)

    def _running(self) -> RunningCoordinator:
        return RunningCoordinator(
            address=self.address,
            local_address=self.local_address,
            http_address=self.http_address,
            pid=os.getpid(),
            ca_fingerprint=self.ca_fingerprint,
        )


def package_version() -> str:
    """Version of the installed package; "source" when run from a checkout."""
    try:
        return importlib.metadata.version("muster")
    except importlib.metadata.PackageNotFoundError:
        return "source"


def _policy(config: CoordinatorConfig) -> SwarmPolicy:
    return SwarmPolicy(
        peer_ttl_seconds=config.lease_ttl_seconds,
        quorum_grace_seconds=config.quorum_grace_seconds,
        start_grace_seconds=config.start_grace_seconds,
        settle_seconds=config.settle_seconds,
        session_seconds=config.session_seconds,
        checkpoint_interval_seconds=config.checkpoint_interval_seconds,
        num_kept_checkpoints=config.num_kept_checkpoints,
        num_evaluations=config.num_evaluations,
        duty_ttl_seconds=config.duty_ttl_seconds,
        max_peers=config.max_peers,
    )


def _limiter(calls_per_second: float, *, burst_factor: float) -> RateLimiter:
    return RateLimiter(
        calls_per_second=calls_per_second, burst_calls=burst_factor * calls_per_second
    )


def _bind(server: Any, config: CoordinatorConfig, identity: Identity) -> int:
    address = _join_address(config.host, config.port)
    try:
        port: int = server.add_secure_port(
            address, server_credentials(identity.cert_pem, identity.key_pem)
        )
    except RuntimeError as error:
        raise MachineError(
            f"cannot listen on {address}",
            allowed="a free port on an interface of this machine",
            remedy="pass --port PORT (0 lets the system choose) or stop what holds the port",
            code=ErrorCode.PORT_IN_USE,
        ) from error
    return port


def _certificate_hosts(config: CoordinatorConfig) -> tuple[str, ...]:
    return tuple(
        dict.fromkeys(("localhost", "127.0.0.1", _ANY_HOSTS.get(config.host, config.host)))
    )


def _join_address(host: str, port: int) -> str:
    return f"[{host.strip('[]')}]:{port}" if ":" in host else f"{host}:{port}"


def _advertised_host(host: str) -> str:
    """The host itself, or for "every interface" the address from which this machine reaches others."""
    if host not in _ANY_HOSTS:
        return host
    is_v6 = ":" in host
    probe = socket.socket(socket.AF_INET6 if is_v6 else socket.AF_INET, socket.SOCK_DGRAM)
    with probe:
        try:
            probe.connect(
                ("2001:db8::1" if is_v6 else "192.0.2.1", 9)
            )  # sends nothing: asks for a route
            return str(probe.getsockname()[0])
        except OSError:
            _LOGGER.warning(
                "no route to other machines found; join strings will name this machine only"
            )
            return _ANY_HOSTS[host]
