"""Child processes of the daemon: started by exec, joined by inherited descriptors, in one process
group that dies as one.

Each child gets one end of a socket pair (ipc.py) and the memfd of the shared vectors. All children
share a process group that is not the daemon's, so Ctrl+C reaches only the daemon, which then stops
them in order. Nothing survives the daemon: in good order by `close` (SIGKILL to the group); after
SIGKILL of the daemon by PR_SET_PDEATHSIG, which each child sets itself, and by their channels,
which close; whatever slips through is ended at the next start by children.json (home.py).

Output of a child goes straight to a file under logs/ (no pipe that could fill up), rotated at start
and cut when too long.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from peer.home import ChildRecord, start_ticks_of
from peer.ipc import AsyncChannel
from protos.contract.errors import MachineError
from protos.contract.telemetry import LogField

_LOGGER = logging.getLogger(__name__)
MAX_LOG_BYTES = 4 * 2**20
KEPT_LOGS = 2
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_TERM_GRACE_SECONDS = 1.0
_ORPHAN_SECONDS = 2.0
_ORPHAN_POLL_SECONDS = 0.01


class Child:
    """One child process and the daemon's end of its channel."""

    def __init__(
        self,
        *,
        name: str,
        process: asyncio.subprocess.Process,
        channel: AsyncChannel,
        group_id: int,
        log_path: Path,
    ) -> None:
        self.name = name
        self.process = process
        self.channel = channel
        self.group_id = group_id
        self.log_path = log_path
        self.is_expected_to_end = False
        """True once it was told to stop; its end is then no failure."""
        self._start_ticks = start_ticks_of(process.pid) or 0

    @property
    def is_alive(self) -> bool:
        """True until its end has been noticed."""
        return self.process.returncode is None

    @property
    def record(self) -> ChildRecord:
        """How the home directory remembers it."""
        return ChildRecord(
            name=self.name,
            pid=self.process.pid,
            group_id=self.group_id,
            start_ticks=self._start_ticks,
        )

    def last_lines(self, *, num_lines: int = 5) -> str:
        """End of its output, to say why it ended."""
        try:
            with self.log_path.open("rb") as log:
                log.seek(max(0, self.log_path.stat().st_size - 8192))
                lines = log.read().decode("utf-8", "replace").strip().splitlines()
        except OSError:
            return ""
        return "\n".join(lines[-num_lines:])

    def describe_end(self) -> str:
        """Exit code or signal, for people."""
        code = self.process.returncode
        if code is None:
            return "is alive"
        if code < 0:
            with contextlib.suppress(ValueError):
                return f"was ended by {signal.Signals(-code).name}"
        return f"ended with exit code {code}"


class Supervisor:
    """Starts, watches and ends the children of one daemon."""

    def __init__(
        self,
        *,
        logs: Path,
        environment: Mapping[str, str],
        record_children: Callable[[list[ChildRecord]], None],
    ) -> None:
        self._logs = logs
        self._environment = dict(environment)
        self._record_children = record_children
        self._children: list[Child] = []
        self._group_ids: set[int] = set()

    @property
    def children(self) -> list[Child]:
        """Those whose end has not been noticed."""
        return [child for child in self._children if child.is_alive]

    async def spawn(
        self, name: str, command: Sequence[str], *, channel_flag: str = "", fds: Sequence[int] = ()
    ) -> Child:
        """Start `command`; with `channel_flag` its end of the channel is appended as that flag's
        value.

        `fds` are inherited under their own numbers. Call it from the main thread only:
        PR_SET_PDEATHSIG of a child fires when the *thread* that started it ends. Raises
        MachineError.
        """
        ours, theirs = socket.socketpair()
        log_path = self._logs / f"{name}.log"
        arguments = list(command) + ([channel_flag, str(theirs.fileno())] if channel_flag else [])
        try:
            rotate_log(log_path)
            with log_path.open("ab") as log:
                process, group_id = await self._exec(
                    arguments, log.fileno(), (theirs.fileno(), *fds)
                )
        except OSError as error:
            ours.close()
            raise MachineError(
                f"cannot start the {name} process: {error}",
                allowed=f"a system that lets this user run {sys.executable}",
                remedy="check limits of processes and memory (ulimit -a)",
            ) from error
        finally:
            theirs.close()
        channel = await AsyncChannel.from_socket(ours)
        child = Child(
            name=name, process=process, channel=channel, group_id=group_id, log_path=log_path
        )
        self._children = [*self.children, child]
        self._group_ids = {known for known in self._group_ids if _pids_in_groups({known})}
        self._group_ids.add(group_id)
        self._record()
        _LOGGER.debug("started %s=%s pid=%d", LogField.PROCESS, name, process.pid)
        return child

    async def _exec(
        self, arguments: list[str], log_fd: int, fds: tuple[int, ...]
    ) -> tuple[asyncio.subprocess.Process, int]:
        """Join the group of the living children; a new group if there is none any more."""
        group_id = next((child.group_id for child in self.children), 0)
        try:
            process = await self._exec_in_group(arguments, log_fd, fds, group_id)
        except (PermissionError, ProcessLookupError):
            if group_id == 0:
                raise
            group_id = 0
            process = await self._exec_in_group(arguments, log_fd, fds, group_id)
        return process, group_id or process.pid

    async def _exec_in_group(
        self, arguments: list[str], log_fd: int, fds: tuple[int, ...], group_id: int
    ) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log_fd,
            stderr=log_fd,
            pass_fds=fds,
            process_group=group_id,
            env=self._environment,
        )

    async def wait(self, child: Child) -> str:
        """Wait for the end of a child, then end what it has started; returns how it ended."""
        await child.process.wait()
        await self._end_orphans()
        self._record()
        return child.describe_end()

    async def stop(self, child: Child, *, grace_seconds: float) -> None:
        """Give a child that was asked to end `grace_seconds`, then SIGTERM, then SIGKILL; close its
        channel.
        """
        child.is_expected_to_end = True
        waits = (
            (None, grace_seconds),
            (signal.SIGTERM, min(grace_seconds, _TERM_GRACE_SECONDS)),
            (signal.SIGKILL, 5.0),
        )
        for signal_number, seconds in waits:
            if signal_number is not None and child.is_alive:
                _LOGGER.warning(
                    "%s=%s did not end; %s", LogField.PROCESS, child.name, signal_number.name
                )
                with contextlib.suppress(ProcessLookupError):
                    child.process.send_signal(signal_number)
            try:
                async with asyncio.timeout(seconds):
                    await child.process.wait()
                break
            except TimeoutError:
                continue
        await child.channel.close()
        await self._end_orphans()
        self._record()

    async def _end_orphans(self) -> None:
        """Kill processes of our groups whose parent is gone, and wait for their end: a new child
        may need their port.
        """
        loop = asyncio.get_running_loop()
        deadline_seconds = loop.time() + _ORPHAN_SECONDS
        known = {os.getpid(), *(child.process.pid for child in self._children)}
        while orphans := _orphans_in_groups(self._group_ids, known=known):
            for pid in orphans:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            if loop.time() > deadline_seconds:
                _LOGGER.warning("processes %s do not end", orphans)
                return
            await asyncio.sleep(_ORPHAN_POLL_SECONDS)

    async def close(self) -> None:
        """End whatever is left of all children and their descendants, at once."""
        for child in self.children:
            child.is_expected_to_end = True
        for group_id in self._group_ids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(group_id, signal.SIGKILL)
        for child in self._children:
            await child.process.wait()
            await child.channel.close()
        self._children = []
        self._record()

    def memory_bytes(self) -> int:
        """Memory of the daemon and of everything in the children's groups; shared pages are divided
        by their users.
        """
        groups = {child.group_id for child in self.children}
        return sum(_memory_of(pid) for pid in (os.getpid(), *_pids_in_groups(groups)))

    def trim_logs(self) -> None:
        """Cut logs that grew too long; the writers append, so they go on at the new end."""
        for child in self.children:
            with contextlib.suppress(OSError):
                if child.log_path.stat().st_size > MAX_LOG_BYTES:
                    os.truncate(child.log_path, 0)

    def _record(self) -> None:
        """For a later daemon; children end with this one anyway (parent_death.py)."""
        try:
            self._record_children([child.record for child in self.children])
        except MachineError as error:
            _LOGGER.warning("children were not recorded: %s", error)


def rotate_log(path: Path, *, kept: int = KEPT_LOGS) -> None:
    """Move a log aside as .1, .2, ...; the oldest goes."""
    if not path.exists() or path.stat().st_size == 0:
        return
    for number in range(kept, 0, -1):
        older = path.with_name(f"{path.name}.{number}")
        newer = path.with_name(f"{path.name}.{number - 1}") if number > 1 else path
        if newer.exists():
            os.replace(newer, older)


def _pids_in_groups(group_ids: set[int]) -> list[int]:
    found = []
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            if os.getpgid(int(entry.name)) in group_ids:
                found.append(int(entry.name))
    return found


def _orphans_in_groups(group_ids: set[int], *, known: set[int]) -> list[int]:
    """Processes of the groups whose parent is neither `known` nor in a group any more."""
    pids = set(_pids_in_groups(group_ids)) - known
    return [pid for pid in pids if (p := _parent_of(pid)) is not None and p not in pids | known]


def _parent_of(pid: int) -> int | None:
    """Parent of a process; None if it has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    state, parent = stat[stat.rindex(b")") + 2 :].split()[:2]
    return None if state in (b"Z", b"X") else int(parent)


def _memory_of(pid: int) -> int:
    """Proportional set size; resident size where the kernel does not tell the former; 0 if it has
    ended.
    """
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_BYTES
    except (OSError, IndexError, ValueError):
        return 0
