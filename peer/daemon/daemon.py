"""The daemon: joins, then lets the session machine decide about everything that happens, until it
is time to leave.

Order: home and identity are there -> Challenge, clock check, Join (or the membership of the last
session, if the coordinator is away) -> running.py: children, dataset, events -> drain. The first
SIGINT or SIGTERM drains: the micro-batch is finished, leases and membership are returned, children
stopped, all within five seconds, or more if only this peer holds the newest state (parting.py). The
second ends everything at once.
"""

import asyncio
import contextlib
import logging
import signal
from typing import Any

from peer import session_events as ev
from peer.config import PeerConfig
from peer.coordinator_client import CoordinatorClient
from peer.daemon.coordinator_tasks import CallObserver
from peer.daemon.core import Core
from peer.daemon.membership import (
    Membership,
    check_can_take_part,
    installed_version,
    is_same_run,
    join_run,
    joined_event,
    load_membership,
    package_version,
    save_membership,
)
from peer.daemon.reports import Reporter, SessionNumbers
from peer.daemon.running import STATUS_SECONDS, RunningSession
from peer.home import Home
from peer.identity import Identity
from peer.metrics import PeerMetrics
from protos.contract.channel import JoinString
from protos.contract.errors import INTERRUPTED_EXIT_CODE, MachineError, UnavailableError
from protos.contract.ids import PROTOCOL_VERSION
from protos.contract.telemetry import PEER_INFO

_LOGGER = logging.getLogger(__name__)
TICK_SECONDS = 0.2
JOIN_PATIENCE_SECONDS = 45.0
"""How long a newcomer waits for its coordinator before it gives up."""
_JOIN_RETRY_SECONDS = 2.0


class Daemon:
    """One session of one peer, from Join to Leave."""

    def __init__(
        self,
        *,
        config: PeerConfig,
        home: Home,
        identity: Identity,
        join_string: JoinString,
        report: Reporter,
    ) -> None:
        """Call it inside the event loop that `run` will use."""
        self._config, self._home, self._identity = config, home, identity
        self._join_string = join_string
        self._metrics = PeerMetrics()
        numbers = SessionNumbers(
            peer_id=identity.peer_id,
            name=config.name,
            run_id=join_string.run_id,
            address=join_string.address,
        )
        self._core = Core(
            numbers=numbers, metrics=self._metrics, report=report, on_drain=self._on_drain
        )
        self._status_path = home.run / "status.json"
        self._client: CoordinatorClient | None = None
        self._end: asyncio.Future[ev.BeginDrain] = asyncio.get_running_loop().create_future()
        self._now = asyncio.Event()
        """Set by the second signal."""

    async def run(self) -> int:
        """The whole session; returns the exit code. Raises MusterError if it cannot begin."""
        numbers = self._core.numbers
        if self._config.metrics_port is not None:
            numbers.metrics_port = self._metrics.serve(port=self._config.metrics_port)
        versions = {"version": package_version(), "torch_version": installed_version("torch")}
        self._metrics.set(PEER_INFO, 1, versions | {"device": self._config.device})
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal, signal.Signals(number).name)
        numbers.save(self._status_path)
        try:
            membership = await self._join_or_end()
            if membership is None:
                return self._end.result().exit_code
            return await self._run_session(membership)
        finally:
            if self._client is not None:
                await self._client.close()
            self._metrics.close()
            with contextlib.suppress(MachineError):
                numbers.save(self._status_path)

    async def _join_or_end(self) -> Membership | None:
        """Join; None if the owner ends it first."""
        joining = asyncio.create_task(self._join())
        waiting: set[asyncio.Future[Any]] = {joining, self._end}
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if joining.done():
            return joining.result()
        joining.cancel()
        await asyncio.gather(joining, return_exceptions=True)
        return None

    async def _join(self) -> Membership:
        """Join, or go on with what the last session remembers. Raises MusterError."""
        numbers, loop = self._core.numbers, asyncio.get_running_loop()
        saved = load_membership(self._home.path)
        if saved is not None and not is_same_run(saved.join_string, self._join_string):
            saved = None
        if saved is not None and saved.protocol_version != PROTOCOL_VERSION:
            self._core.note(
                f"the last membership is of another protocol version, this peer speaks "
                f"{PROTOCOL_VERSION}: it joins anew, for which the coordinator is needed"
            )
            saved = None
        if saved is not None:
            check_can_take_part(saved, self._config)
        give_up_seconds = loop.time() + JOIN_PATIENCE_SECONDS
        self._core.feed(ev.JoinBegun(reason=f"run {numbers.run_id} at {numbers.address}"))
        while True:
            try:
                client = await self._open_client(saved)
                membership, clock = await join_run(
                    client,
                    join_string=self._join_string,
                    identity=self._identity,
                    config=self._config,
                )
                numbers.clock_offset_seconds = clock.offset_seconds
                save_membership(self._home.path, membership)
                self._core.feed(joined_event(membership, has_lost_leases=False))
                return membership
            except UnavailableError as error:
                if saved is not None and self._client is not None:
                    self._core.note(f"going on with the last membership: {error.found}")
                    self._client.use_session(saved.response.session_key)
                    self._core.feed(joined_event(saved, has_lost_leases=False))
                    self._core.feed(ev.CoordinatorReachable(is_reachable=False, reason=error.found))
                    return saved
                if loop.time() >= give_up_seconds:
                    raise
                self._core.feed(ev.JoinBegun(reason=f"{error.found}; trying again"))
                numbers.save(self._status_path)
                await asyncio.sleep(_JOIN_RETRY_SECONDS)

    async def _open_client(self, saved: Membership | None) -> CoordinatorClient:
        if self._client is None:
            self._client = await CoordinatorClient.open(
                self._join_string,
                peer_id=self._identity.peer_id,
                certificate_pem=saved.certificate_pem if saved is not None else b"",
                observe=CallObserver(self._metrics, self._core.feed),
            )
        return self._client

    async def _run_session(self, membership: Membership) -> int:
        assert self._client is not None
        session = RunningSession(
            config=self._config,
            home=self._home,
            identity=self._identity,
            client=self._client,
            membership=membership,
            core=self._core,
            on_failure=self._on_failure,
        )
        try:
            await session.start()
            while not self._end.done():
                try:
                    session.tick()
                except MachineError as error:  # a full disk: no reason to go without a word
                    self._on_failure(error)
                await asyncio.wait({self._end}, timeout=TICK_SECONDS)
            end = self._end.result()
            is_interrupted = await self._drain(session, end.reason)
        finally:
            await session.close()
        self._core.feed(ev.Left(reason=end.reason))
        return INTERRUPTED_EXIT_CODE if is_interrupted else end.exit_code

    async def _drain(self, session: RunningSession, reason: str) -> bool:
        """Drain until done or until the second signal, status.json kept up to date; True for the
        latter.
        """
        draining = asyncio.create_task(session.drain(reason))
        interrupted = asyncio.create_task(self._now.wait())
        done: set[asyncio.Task[Any]] = set()
        while not done:
            with contextlib.suppress(MachineError):
                self._core.numbers.save(self._status_path)
            done, _ = await asyncio.wait(
                {draining, interrupted},
                timeout=STATUS_SECONDS,
                return_when=asyncio.FIRST_COMPLETED,
            )
        is_interrupted = not draining.done()
        for task in (draining, interrupted):
            task.cancel()
        results = await asyncio.gather(draining, interrupted, return_exceptions=True)
        if isinstance(results[0], Exception):
            raise results[0]
        return is_interrupted

    def _on_drain(self, action: ev.BeginDrain) -> None:
        if not self._end.done():
            self._end.set_result(action)

    def _on_signal(self, name: str) -> None:
        if self._end.done():
            self._now.set()
        self._core.feed(ev.StopRequested(reason=f"{name} received", exit_code=0))

    def _on_failure(self, error: BaseException) -> None:
        """Of a task: what is wrong with the machine ends the session in good order."""
        if isinstance(error, MachineError):
            self._core.feed(ev.StopRequested(reason=str(error), exit_code=error.exit_code))
            return
        _LOGGER.error("a task of the daemon failed", exc_info=error)
        if not self._end.done():
            self._end.set_exception(error)
