"""The swarm process and the trainer as the daemon sees them: how they are started, configured,
listened to and stopped.

Both are started as soon as the number of parameters is known, because their imports take seconds;
`configure` waits in the socket. A child whose channel closes is given a moment to end; then its end
is told with the last lines of its output.
"""

import asyncio
import logging
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peer.background import BackgroundTasks
from peer.config import PeerConfig
from peer.daemon.membership import Membership
from peer.daemon.trainer_limits import TrainerLimits
from peer.home import BAD_BATCHES
from peer.identity import Identity
from peer.ipc import ChannelClosed, Message
from peer.session_events import ChildName
from peer.shared_vectors import SharedVectors
from peer.supervisor import Child, Supervisor
from protos.contract.telemetry import LogField

_LOGGER = logging.getLogger(__name__)
_VMSTAT = Path("/proc/vmstat")
_CLOSED_GRACE_SECONDS = 3.0
CHECKPOINT_INTERVAL_SECONDS = 60.0
_MODULE_BY_CHILD = {ChildName.SWARM: "peer.swarm", ChildName.TRAINER: "peer.train"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildFailure:
    """Why a child ended, as far as it could say."""

    reason: str = ""
    exit_code: int | None = None
    """Of an error that has one."""
    is_out_of_memory: bool = False
    lost_devices: tuple[int, ...] = ()
    """Positions of devices whose local ranks ended or do not answer."""


def num_kernel_oom_kills() -> int:
    """Processes that this kernel has ended for want of memory since its start; 0 if it does not
    tell.
    """
    try:
        for line in _VMSTAT.read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    except OSError:
        pass
    return 0


class Children:
    """Both processes; at most one of each."""

    def __init__(
        self,
        supervisor: Supervisor,
        vectors: SharedVectors,
        *,
        tasks: BackgroundTasks,
        on_message: Callable[[ChildName, Message], None],
        on_death: Callable[[ChildName, ChildFailure], None],
    ) -> None:
        self._supervisor = supervisor
        self._vectors = vectors
        self._tasks = tasks
        self._on_message = on_message
        self._on_death = on_death
        self._child_by_name: dict[ChildName, Child] = {}
        self._failure_by_name: dict[ChildName, ChildFailure] = {}
        self._is_configured: dict[ChildName, bool] = {}
        self._has_spoken: set[ChildName] = set()

    async def start(self, name: ChildName) -> None:
        """Start a process; it does nothing before `configure`."""
        command = [
            sys.executable,
            "-m",
            _MODULE_BY_CHILD[name],
            "--vectors-fd",
            str(self._vectors.fd),
            "--num-values",
            str(self._vectors.num_values),
        ]
        self._is_configured[name] = False
        self._has_spoken.discard(name)
        self._failure_by_name.pop(name, None)
        child = await self._supervisor.spawn(
            name, command, channel_flag="--channel-fd", fds=(self._vectors.fd,)
        )
        self._child_by_name[name] = child
        self._tasks.start(self._listen(name, child), name=f"{name} messages")

    def configure(self, name: ChildName, **fields: Any) -> None:
        """The first message; what is sent before it is dropped."""
        self._is_configured[name] = True
        self.send(name, "configure", **fields)

    def send(self, name: ChildName, kind: str, **fields: Any) -> bool:
        """Send a message; a child that is gone or not configured hears nothing (False), and is told
        anew after its return.
        """
        child = self._child_by_name.get(name)
        if child is None or not self._is_configured.get(name):
            return False
        try:
            child.channel.send(kind, **fields)
        except ChannelClosed:
            return False
        return True

    def note_failure(self, name: ChildName, failure: ChildFailure) -> None:
        """What a child said before it ended."""
        self._failure_by_name[name] = failure

    def kill(self, name: ChildName, reason: str) -> None:
        """End a child that does not answer any more; its death is told with this reason."""
        child = self._child_by_name.get(name)
        if child is not None and child.is_alive:
            self.note_failure(name, ChildFailure(reason=reason))
            child.process.kill()

    async def stop(self, name: ChildName, *, grace_seconds: float, **fields: Any) -> None:
        """Ask a child to end and see that it does."""
        child = self._child_by_name.get(name)
        if child is None or not child.is_alive:
            return
        child.is_expected_to_end = True
        self._is_configured[name] = True
        self.send(name, "stop", **fields)
        if name not in self._has_spoken:
            # It imports, builds or measures: it hears nothing yet, and has nothing to lose. The
            # swarm process may have a p2pd to end, the trainer heeds no SIGTERM.
            is_swarm = name is ChildName.SWARM
            (child.process.terminate if is_swarm else child.process.kill)()
        await self._supervisor.stop(child, grace_seconds=grace_seconds)

    async def _listen(self, name: ChildName, child: Child) -> None:
        oom_kills_before = num_kernel_oom_kills()
        try:
            while True:
                message = await child.channel.receive()
                self._has_spoken.add(name)
                self._on_message(name, message)
        except ChannelClosed:
            pass
        if child.is_expected_to_end:
            return
        try:
            async with asyncio.timeout(_CLOSED_GRACE_SECONDS):
                await self._supervisor.wait(child)
        except TimeoutError:
            child.process.kill()
            await self._supervisor.wait(child)
        await child.channel.close()
        if child.is_expected_to_end:
            return
        said = self._failure_by_name.get(name)
        was_killed = child.process.returncode == -signal.SIGKILL
        if said is None and was_killed and num_kernel_oom_kills() > oom_kills_before:
            said = ChildFailure(reason="the kernel ran out of memory", is_out_of_memory=True)
        said = said or ChildFailure()
        reason = f"the {name} process {child.describe_end()}"
        reason += f": {said.reason}" if said.reason else ""
        _LOGGER.warning(
            "%s=%s %s; last output:\n%s", LogField.PROCESS, name, reason, child.last_lines()
        )
        self._on_death(name, replace(said, reason=reason))


def swarm_settings(
    *, config: PeerConfig, identity: Identity, membership: Membership
) -> dict[str, Any]:
    """Fields of the swarm process's `configure`."""
    response = membership.response
    return {
        "run_spec": response.run_spec,
        "run_id": membership.join_string.run_id,
        "peer_id": identity.peer_id,
        "home": str(config.home),
        "identity_key_path": str(identity.identity_key_path),
        "p2p_key_path": str(identity.p2p_key_path),
        "coordinator_public_key": response.coordinator_public_key,
        "dht_prefix": response.dht_prefix,
        "initial_peers": list(response.initial_peers),
        "listen_port": config.listen_port,
        "announce": list(config.announce),
        "host": config.listen_host,
        "upload_limit_mbit": config.upload_limit_mbit,
        "incarnation_record": response.incarnation_record.SerializeToString(),
        "directive": response.directive.SerializeToString(),
        "outer_step": response.outer_step,
        "checkpoint_interval_seconds": CHECKPOINT_INTERVAL_SECONDS,
    }


def trainer_settings(
    *,
    config: PeerConfig,
    membership: Membership,
    heldout_paths: tuple[Path, ...],
    tokenizer_path: Path,
    limits: TrainerLimits,
) -> dict[str, Any]:
    """Fields of the trainer's `configure`; `limits` bound its own choice."""
    return {
        "run_spec": membership.response.run_spec,
        "num_threads": config.threads,
        "device": config.device,
        "execution": config.execution,
        "bad_batch_path": str(config.home / BAD_BATCHES),
        "step_cache_path": str(config.step_cache),
        "devices": config.devices,
        "layout": config.layout,
        "probe_interval_seconds": config.probe_interval_seconds,
        "memory_limit_bytes": config.memory_limit_bytes,
        "heldout_paths": [str(path) for path in heldout_paths],
        "tokenizer_path": str(tokenizer_path),
        "seed": membership.spec.seed,
        "max_micro_batch_sequences": limits.max_micro_batch_sequences,
        "saves_memory": limits.saves_memory,
        "lost_devices": list(limits.lost_devices),
    }
