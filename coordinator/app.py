"""Composition root: what a coordinator consists of, in the order in which it starts, and how it
stops.

lock + store -> keys -> RECOVERING -> writer thread -> rendezvous child -> gRPC server -> ticker,
refit, dialler, mirror index -> web thread

Stopping goes the other way, with a deadline for calls in progress; a process that is killed instead
loses nothing that was acknowledged. `serve` and `up` use the same object.
"""

import asyncio
import ipaddress
import logging
import os
import socket
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import TypeVar

from coordinator.api.server import build_server, join_address
from coordinator.config import CoordinatorConfig, package_version
from coordinator.dial_back.dialler import Dialler
from coordinator.domain.policy import SwarmPolicy
from coordinator.identity import (
    Identity,
    RunningCoordinator,
    forget_running,
    load_identity,
    save_running,
)
from coordinator.metrics import CoordinatorMetrics
from coordinator.mirror_index import MirrorIndex
from coordinator.operations.admin import list_runs
from coordinator.operations.common import BeginRecovery, OperationContext, begin_recovery
from coordinator.operations.requests_admin import ListRunsRequest
from coordinator.operations.writer import Operation, Writer
from coordinator.ports import require_free
from coordinator.refit import Refitter
from coordinator.rendezvous import Rendezvous
from coordinator.store.sqlite import SqliteStore
from coordinator.store.sqlite_table import full_disk_is_fatal
from coordinator.ticker import Ticker
from coordinator.web.samples import RunSampler
from coordinator.web.server import WebServer, build_app
from coordinator.web.status_cache import StatusCache
from protos.contract.channel import split_address

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
        """Bring everything up, or take back what was brought up and raise what went wrong
        (MachineError mostly).
        """
        try:
            with full_disk_is_fatal():
                await self._start()
        except BaseException:
            await self._exit_stack.aclose()
            raise

    async def stop(self) -> None:
        """End in good order: no new calls, calls in progress get the deadline, then store and lock
        are given back.
        """
        await self._exit_stack.aclose()

    async def perform(
        self, operation: Operation[_Request, _Response], request: _Request
    ) -> _Response:
        """Run an operation that changes something; durable when it returns. Raises what the
        operation raises.
        """
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
        require_free(config.host, config.port, what="the coordinator", flag="--port")
        require_free(config.http_host, config.http_port, what="the page", flag="--http-port")
        await self._start_rendezvous()  # takes seconds: a port taken by somebody is said before
        cache = StatusCache(writer)
        metrics = CoordinatorMetrics()
        sampler = RunSampler(
            cache,
            package_version=package_version(),
            observe_round_interval=metrics.observe_round_interval,
        )
        metrics.add_samples(sampler.samples)
        await self._start_server(writer, identity, metrics)
        for repeating in (
            Ticker(writer, observe_commit=metrics.observe_commit),
            Refitter(writer),
            Dialler(writer),
            MirrorIndex(writer, data_dir=config.data_dir, key=identity.signing_key),
        ):
            repeating.start()
            on_stop.push_async_callback(repeating.stop)
        web = WebServer(
            build_app(cache=cache, metrics=metrics), host=config.http_host, port=config.http_port
        )
        web.start()
        on_stop.push_async_callback(asyncio.to_thread, web.stop)
        self.http_address = web.address
        save_running(config.data_dir, self._running())
        on_stop.callback(forget_running, config.data_dir)

    async def _begin_recovery(self) -> None:
        """Nothing expires for a while, so that peers of an earlier process can come back; before
        the first run, nobody can.
        """
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
            announced_address=_announced_rendezvous(config),
        )
        self._exit_stack.push_async_callback(self._rendezvous.stop)
        await self._rendezvous.start()

    async def _start_server(
        self, writer: Writer, identity: Identity, metrics: CoordinatorMetrics
    ) -> None:
        config = self.config
        bound = build_server(
            config,
            writer=writer,
            identity=identity,
            metrics=metrics,
            rendezvous_addresses=lambda: self.rendezvous_addresses,
            clock=self._clock,
        )
        await bound.server.start()
        self._exit_stack.push_async_callback(bound.server.stop, config.stop_deadline_seconds)
        local_host = _ANY_HOSTS.get(config.host, config.host)
        self.local_address = join_address(local_host, bound.port)
        advertised_host = _advertised_host(config.host)
        self.address = config.advertise or join_address(advertised_host, bound.port)

    def _running(self) -> RunningCoordinator:
        return RunningCoordinator(
            address=self.address,
            local_address=self.local_address,
            http_address=self.http_address,
            pid=os.getpid(),
            ca_fingerprint=self.ca_fingerprint,
        )


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


def _announced_rendezvous(config: CoordinatorConfig) -> str:
    """Multiaddress of the rendezvous on the advertised host; empty if either is left to chance."""
    if not config.advertise or not config.rendezvous_port:
        return ""
    host, _ = split_address(config.advertise)
    try:
        kind = f"ip{ipaddress.ip_address(host).version}"
    except ValueError:
        kind = "dns4"
    return f"/{kind}/{host}/tcp/{config.rendezvous_port}"


def _certificate_hosts(config: CoordinatorConfig) -> tuple[str, ...]:
    return tuple(
        dict.fromkeys(("localhost", "127.0.0.1", _ANY_HOSTS.get(config.host, config.host)))
    )


def _advertised_host(host: str) -> str:
    """The host itself; for "every interface" the address by which this machine reaches others."""
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
