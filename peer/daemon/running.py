"""A session after Join: children, dataset and calls at work, carrying out what the session machine
decides.

Every action is either a message to a child or a task whose end is an event again, so nothing here
waits and nothing decides. What has been signed travels as it came; chunks are fetched in the order
of their leases.
"""

import asyncio
import logging
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peer import session_events as ev
from peer.background import BackgroundTasks
from peer.config import PeerConfig, child_environment, format_bytes
from peer.coordinator_client import CoordinatorClient
from peer.daemon.child_watch import ChildWatch, start_seconds
from peer.daemon.children import ChildFailure, Children, swarm_settings, trainer_settings
from peer.daemon.coordinator_tasks import CoordinatorTasks, Hooks
from peer.daemon.core import Core
from peer.daemon.dataset import Dataset
from peer.daemon.duties import Duties
from peer.daemon.lease_chunks import LeaseChunks
from peer.daemon.membership import (
    Membership,
    check_can_honour,
    join_run,
    joined_event,
    save_membership,
)
from peer.daemon.messages import MessageDesk
from peer.daemon.mirrors import fetch_from_mirrors
from peer.daemon.outbox import CertificateKey, Outbox
from peer.daemon.parting import hand_over
from peer.daemon.reports import Report
from peer.daemon.trainer_limits import TrainerLimits
from peer.daemon.trials import Trials
from peer.home import Home
from peer.identity import Identity
from peer.ipc import Message
from peer.session_events import ChildName
from peer.shared_vectors import SharedVectors
from peer.supervisor import Supervisor
from protos.contract import telemetry
from protos.contract.checkpoint_index import CheckpointIndex
from protos.contract.errors import MachineError, MusterError, UnavailableError
from protos.contract.telemetry import SessionState
from protos.muster.v1 import common_pb2, membership_pb2

_LOGGER = logging.getLogger(__name__)
STATUS_SECONDS = 1.0
PROGRESS_SECONDS = 5.0
MEMORY_SECONDS = 5.0
_PROGRESS_STATES = frozenset(
    {SessionState.TRAINING.value, SessionState.AVERAGING.value, SessionState.ON_DUTY.value}
)
_RETRY_SECONDS = 2.0
_TRAINER_STOP_SECONDS = 3.0
_SWARM_STOP_SECONDS = 1.0
"""Least time that the swarm process gets to save its state and leave."""
_DRAIN_SECONDS = 4.0
"""What a drain may take as a whole, before the swarm process is pressed."""
_LEAVE_SECONDS = 1.0


class RunningSession:
    """One membership at work."""

    def __init__(
        self,
        *,
        config: PeerConfig,
        home: Home,
        identity: Identity,
        client: CoordinatorClient,
        membership: Membership,
        core: Core,
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self._config, self._home, self._identity = config, home, identity
        self._client, self._core, self._membership = client, core, membership
        self._tasks = BackgroundTasks(on_failure)
        self._supervisor = Supervisor(
            logs=home.logs,
            environment=child_environment(config) | home.owner_mark,
            record_children=home.record_children,
        )
        shape = check_can_honour(membership.spec, config)
        self._vectors = SharedVectors.create(
            shape.num_parameters, membership.spec.strategy.state_vectors
        )
        self._children = Children(
            self._supervisor,
            self._vectors,
            tasks=self._tasks,
            on_message=self._take_message,
            on_death=self._on_death,
        )
        self._watches = {child: ChildWatch() for child in ChildName}
        self._start_seconds = start_seconds(shape.vector_bytes)
        self._limits, self._outbox = TrainerLimits(), Outbox()
        self._calls = CoordinatorTasks(
            client,
            numbers=core.numbers,
            outbox=self._outbox,
            hooks=Hooks(
                feed=core.feed,
                keep_membership=self._keep_membership,
                pass_certificates=self._pass_certificates,
                pass_directive=self._pass_directive,
                acknowledge=self._acknowledge,
                note=core.note,
                keep_trial=lambda *named: self._duties.keep_trial(*named),
            ),
        )
        self._dataset = Dataset(
            home.cache,
            spec=membership.spec,
            limit_bytes=config.disk_limit_bytes,
            fetch_file=lambda file, index: client.fetch_file(file, chunk_index=index),
        )
        self._duties = Duties(
            client,
            tmp=home.tmp,
            send=self._children.send,
            metrics=core.metrics,
            feed=core.feed,
            run_trial=Trials(self._supervisor, self._dataset, home.tmp, config.threads).run,
            mirrors=self._fetch_mirrored,
        )
        self._desk = MessageDesk(
            core,
            outbox=self._outbox,
            coordinator=self._calls,
            duties=self._duties,
            send=self._children.send,
            start_task=self._serve_swarm,
            note_failure=self._children.note_failure,
            watches=self._watches,
        )
        self._is_dataset_ready = asyncio.Event()
        self._chunks = LeaseChunks(
            core,
            dataset=self._dataset,
            lease_by_number=self._calls.lease_by_number,
            is_dataset_ready=self._is_dataset_ready,
        )
        self._next_by_chore = dict.fromkeys(("status", "progress", "memory"), 0.0)

    async def start(self) -> None:
        """Start both children, then let the machine act. Raises MachineError."""
        await self._children.start(ChildName.SWARM)
        self._configure_swarm()
        await self._children.start(ChildName.TRAINER)
        self._tasks.start(self._prepare_dataset(), name="dataset")
        self._tasks.start(self._calls.report_for_ever(), name="certificates")
        self._core.begin_performing(self._perform)

    def tick(self) -> None:
        """Time has passed: feed it to the machine, and do the chores that are due."""
        core = self._core
        core.feed(ev.Tick(jitter_ratio=random.random()))
        core.show_leases()
        for child, watch in self._watches.items():
            if stalled := watch.tick(time.monotonic()):
                watch.forget()
                self._children.kill(child, stalled)
        if self._is_due("status", STATUS_SECONDS):
            self._chunks.forget_ended()
            core.numbers.save(self._home.run / "status.json")
        if core.numbers.state in _PROGRESS_STATES and self._is_due("progress", PROGRESS_SECONDS):
            core.report(Report(kind="progress", text=core.numbers.progress_text()))
        if self._is_due("memory", MEMORY_SECONDS):
            self._check_memory()
            self._supervisor.trim_logs()

    async def drain(self, reason: str) -> None:
        """End in good order: micro-batch, certificates, membership, children. About a second, five
        at most, unless nobody else holds the newest state or the coordinator cannot be asked.
        """
        began_seconds = time.monotonic()
        for watch in self._watches.values():
            watch.forget()
        await self._children.stop(ChildName.TRAINER, grace_seconds=_TRAINER_STOP_SECONDS)
        try:
            async with asyncio.timeout(_LEAVE_SECONDS):
                while self._outbox.num_certificates and await self._calls.report_once():
                    pass
        except TimeoutError:
            _LOGGER.info("left with unreported certificates; they lie in the local checkpoint")
        handed_over_seconds = 0.0
        if self._core.numbers.outer_step > 0:  # everybody can build the state before the first
            handed_over_seconds = await hand_over(
                calls=self._calls,
                duties=self._duties,
                membership=self._membership,
                note=self._core.note,
            )
        attestations = self._outbox.attestations()
        request = membership_pb2.LeaveRequest(reason=reason[:500], attestations=attestations)
        try:
            await self._client.leave(request, deadline_seconds=_LEAVE_SECONDS)
        except MusterError as error:
            _LOGGER.info("left without the coordinator's answer: %s", error.found)
        spent_seconds = time.monotonic() - began_seconds - handed_over_seconds
        grace_seconds = max(_SWARM_STOP_SECONDS, _DRAIN_SECONDS - spent_seconds)
        await self._children.stop(ChildName.SWARM, grace_seconds=grace_seconds, reason=reason)
        _LOGGER.info("drained in %.1f s", time.monotonic() - began_seconds)

    async def close(self) -> None:
        """End at once whatever is left."""
        await self._tasks.cancel_all()
        await self._dataset.close()
        await self._supervisor.close()
        await self._client.close()
        self._vectors.close()

    # Actions.

    def _perform(self, action: ev.Action) -> None:
        if not self._perform_on_trainer(action) and not self._perform_on_swarm(action):
            self._perform_task(action)

    def _perform_on_trainer(self, action: ev.Action) -> bool:
        match action:
            case ev.SendLeases():
                self._tell_trainer("leases", leases=self._chunks.entries(action.parts))
            case ev.TellLostLeases():
                self._tell_trainer("lost_leases", lease_numbers=list(action.lease_numbers))
            case ev.TellNoMoreLeases():
                self._tell_trainer("no_more_leases", is_exhausted=action.is_exhausted)
            case ev.TellStateReady():
                self._tell_trainer(
                    "state_ready",
                    incarnation=action.incarnation,
                    outer_step=action.outer_step,
                    round_tokens=action.round_tokens,
                )
            case ev.TellRoundOutcome():
                self._tell_trainer(
                    "round_outcome",
                    outcome=action.outcome.value,
                    incarnation=action.incarnation,
                    outer_step=action.outer_step,
                    round_tokens=action.round_tokens,
                    reason=action.reason,
                    offer_number=action.offer_number,
                )
            case ev.TellPause():
                self._tell_trainer("pause", is_paused=action.is_paused)
            case _:
                return False
        return True

    def _perform_on_swarm(self, action: ev.Action) -> bool:
        match action:
            case ev.PassContribution():
                self._desk.pass_contribution()
            case ev.TellSwarmIdle():
                self._tell_swarm("idle", is_idle=action.is_idle)
            case ev.TellSwarmCoordinator():
                self._core.numbers.is_coordinator_reachable = action.is_reachable
                self._tell_swarm("coordinator_state", is_reachable=action.is_reachable)
            case _:
                return False
        return True

    def _perform_task(self, action: ev.Action) -> None:
        start = self._tasks.start
        match action:
            case ev.SendHeartbeat():
                start(self._calls.heartbeat(action, lambda: self._membership), name="heartbeat")
            case ev.AcquireLeases():
                start(self._calls.acquire_leases(action, self._membership), name="acquire")
            case ev.ReleaseLeases():
                start(self._calls.release_leases(action), name="release")
            case ev.FetchChunks():
                start(self._chunks.fetch(action.lease_numbers), name="chunks")
            case ev.Respawn():
                start(self._respawn(action), name=f"respawn {action.child}")
            case ev.Rejoin():
                start(self._rejoin(action), name="rejoin")
            case ev.PerformDuty():
                duty = self._calls.duty_by_id[action.duty_id]
                paths = self._dataset.heldout_paths
                start(self._duties.perform(duty, heldout_paths=paths), name="duty")
            case _:
                raise AssertionError(f"action without a way to do it: {action}")

    # Tasks.

    async def _prepare_dataset(self) -> None:
        while True:
            try:
                await self._dataset.prepare()
                break
            except UnavailableError as error:
                _LOGGER.info("dataset: %s; trying again", error.found)
                await asyncio.sleep(_RETRY_SECONDS)
            except MusterError as error:
                self._stop(error)
                return
        self._is_dataset_ready.set()
        self._configure_trainer()
        self._core.feed(ev.DatasetReady())

    async def _respawn(self, action: ev.Respawn) -> None:
        child = action.child
        self._limits.learn_from(action)
        self._core.note(f"{action.reason}; starting it again")
        self._core.metrics.add(telemetry.PEER_CHILD_RESTARTS, 1, {"process": child.value})
        try:
            await self._children.start(child)
        except MachineError as error:
            self._stop(error)
            return
        if child is ChildName.SWARM:
            self._configure_swarm()
        elif self._is_dataset_ready.is_set():
            self._configure_trainer()

    async def _rejoin(self, action: ev.Rejoin) -> None:
        _LOGGER.info("joining again: %s", action.reason)
        while True:
            try:
                membership, clock = await join_run(
                    self._client,
                    join_string=self._membership.join_string,
                    identity=self._identity,
                    config=self._config,
                )
                break
            except UnavailableError:
                await asyncio.sleep(_RETRY_SECONDS)
            except MusterError as error:
                self._stop(error)
                return
        self._calls.note_clock(clock)
        self._keep_membership(membership)
        self._core.feed(joined_event(membership, has_lost_leases=True))

    def _serve_swarm(self, message: Message) -> None:
        if message["kind"] == "need_checkpoint":
            fetching = self._duties.fetch_checkpoint(max_outer_step=message["max_outer_step"])
            self._tasks.start(fetching, name="checkpoint")
        else:
            self._tasks.start(self._answer_swarm(message), name=message["method"])

    async def _answer_swarm(self, message: Message) -> None:
        response = await self._calls.answer_swarm(message["method"], message["request"])
        self._tell_swarm("coordinator_answer", request_id=message["request_id"], response=response)

    # Hooks.

    def _take_message(self, child: ChildName, message: Message) -> None:
        self._desk.take(child, message)

    def _on_death(self, child: ChildName, failure: ChildFailure) -> None:
        self._watches[child].forget()
        self._duties.child_ended(child)
        if child is ChildName.SWARM:
            self._outbox.lose_state()
        else:
            self._core.numbers.earlier_trained_tokens = self._core.numbers.trained_tokens
            self._limits.lose(failure.lost_devices)
        event = ev.ChildDied(
            child=child,
            reason=failure.reason,
            exit_code=failure.exit_code,
            is_out_of_memory=failure.is_out_of_memory,
            has_lost_device=bool(failure.lost_devices),
        )
        self._core.feed(event)

    def _keep_membership(self, membership: Membership) -> None:
        old, new = self._membership.response, membership.response
        self._membership = membership
        if new.incarnation_record != old.incarnation_record:
            record = new.incarnation_record.SerializeToString()
            self._tell_swarm("incarnation", record=record)
        if new.directive != old.directive:
            self._tell_swarm("directive", directive=new.directive.SerializeToString())
            self._note_reach()
        if list(new.initial_peers) != list(old.initial_peers):
            self._tell_swarm("initial_peers", addresses=list(new.initial_peers))
        try:
            save_membership(self._home.path, membership)
        except MachineError as error:
            self._core.note(f"membership not saved: {error}")

    def _note_reach(self) -> None:
        """Tell the owner when others can or cannot connect, as the coordinator found."""
        core, is_dialled = self._core, self._membership.is_dialled
        if is_dialled != core.numbers.is_dialled:
            core.numbers.is_dialled = is_dialled
            core.note(
                "the coordinator can connect to this peer: it reduces like others"
                if is_dialled
                else "the coordinator cannot connect to this peer, so it averages over connections "
                "that it makes itself and reduces nothing for others; to change that, let "
                "--listen-port through the firewall or router, or tell the address that leads to "
                "it with --announce"
            )

    def _pass_certificates(self, certificates: list[bytes]) -> None:
        self._tell_swarm("certificates", certificates=certificates)

    def _pass_directive(self, directive: common_pb2.Signed) -> None:
        self._tell_swarm("directive", directive=directive.SerializeToString())

    def _acknowledge(self, keys: list[CertificateKey]) -> None:
        """The swarm process may forget certificates up to the oldest that is still to be
        reported.
        """
        incarnation = self._core.numbers.incarnation
        steps = [step for number, step in keys if number == incarnation]
        if not steps:
            return
        oldest_open = self._outbox.oldest_step(incarnation)
        up_to = max(steps) if oldest_open is None else min(max(steps), oldest_open - 1)
        self._tell_swarm("certificates_acknowledged", incarnation=incarnation, up_to=up_to)
        self._core.feed(ev.CertificatesAcknowledged(outer_step=up_to))

    def _fetch_mirrored(self, max_outer_step: int) -> tuple[Path, CheckpointIndex]:
        """For Duties: a checkpoint of the mirrors that the coordinator named at Join."""
        joined, run_id = self._membership.response, self._membership.join_string.run_id
        return fetch_from_mirrors(
            [f"{url.rstrip('/')}/{run_id}" for url in joined.checkpoint_mirrors],
            self._home.tmp,
            run_id=run_id,
            public_key=joined.coordinator_public_key,
            max_outer_step=max_outer_step,
        )

    def _configure_swarm(self) -> None:
        settings = swarm_settings(
            config=self._config, identity=self._identity, membership=self._membership
        )
        self._children.configure(ChildName.SWARM, **settings)
        self._watches[ChildName.SWARM].begin(self._start_seconds)

    def _configure_trainer(self) -> None:
        settings = trainer_settings(
            config=self._config,
            membership=self._membership,
            heldout_paths=self._dataset.heldout_paths,
            tokenizer_path=self._dataset.tokenizer_path,
            limits=self._limits,
        )
        self._children.configure(ChildName.TRAINER, **settings)
        self._watches[ChildName.TRAINER].begin(self._start_seconds)

    # Small things.

    def _tell_swarm(self, kind: str, **fields: Any) -> None:
        self._children.send(ChildName.SWARM, kind, **fields)

    def _tell_trainer(self, kind: str, **fields: Any) -> None:
        self._children.send(ChildName.TRAINER, kind, **fields)

    def _stop(self, error: MusterError) -> None:
        self._core.feed(ev.StopRequested(reason=str(error), exit_code=error.exit_code))

    def _is_due(self, chore: str, interval_seconds: float) -> bool:
        now_seconds = time.monotonic()
        if now_seconds < self._next_by_chore[chore]:
            return False
        self._next_by_chore[chore] = now_seconds + interval_seconds
        return True

    def _check_memory(self) -> None:
        numbers, limit_bytes = self._core.numbers, self._config.memory_limit_bytes
        numbers.memory_bytes = self._supervisor.memory_bytes()
        self._core.metrics.set(telemetry.PEER_MEMORY_BYTES, numbers.memory_bytes)
        if limit_bytes is not None and numbers.memory_bytes > limit_bytes:
            self._stop(
                MachineError(
                    f"the peer's processes use {format_bytes(numbers.memory_bytes)}",
                    allowed=f"--memory-limit is {format_bytes(limit_bytes)}",
                    remedy="raise --memory-limit, or join a run with a smaller model",
                )
            )
