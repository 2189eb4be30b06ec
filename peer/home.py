"""The home directory of a peer: one peer at a time, nothing left over from dead ones, every write
whole.

identity.key, p2p.key   who the peer is (identity.py)
membership.json         last JoinResponse: a restart needs neither token nor running coordinator
lock                    flock held by the daemon; holds its pid
run/                    status.json, children.json: of no use after the daemon's death
state/                  local checkpoints and durable votes (swarm process)
cache/                  datasets by id, digest-checked
bad_batches/            micro-batches whose loss was not finite, the newest few
step/                   kernels built for this processor, chosen step plans, compiled code
logs/                   output of the children
"""

import contextlib
import errno
import fcntl
import json
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from protos.contract.errors import ErrorCode, MachineError

BAD_BATCHES = "bad_batches"
"""Directory under a home for micro-batches whose loss was not finite."""
_OWNER_VARIABLE = "MUSTER_OWNER_HOME"
"""In the environment of every descendant of a daemon: its home, resolved."""
_DIRECTORIES = ("run", "state", "cache", "logs", "tmp")


def machine_error_from_os_error(error: OSError, *, action: str) -> MachineError:
    """Turn a failed file operation into found / allowed / remedy."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return MachineError(
            f"cannot {action}: the disk is full",
            allowed="free space under --home",
            remedy="free some space or choose another disk with --home",
            code=ErrorCode.DISK_FULL,
        )
    return MachineError(
        f"cannot {action}: {error.strerror or error}",
        allowed="a directory that this user may read and write",
        remedy="correct its owner and mode, or choose another with --home",
        code=ErrorCode.PERMISSION_DENIED,
    )


def write_atomically(path: Path, data: bytes, *, is_durable: bool = True) -> None:
    """Replace a file by `data` as a whole, mode 0600. Raises MachineError."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            if is_durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise machine_error_from_os_error(error, action=f"write {path}") from error


def start_ticks_of(pid: int) -> int | None:
    """Start time of a living process in clock ticks since boot; with the pid it names a process for
    ever.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    after_name = stat[stat.rindex(b")") + 2 :].split()
    return None if after_name[0] in (b"Z", b"X") else int(after_name[19])


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildRecord:
    """A child as children.json remembers it."""

    name: str
    pid: int
    group_id: int
    start_ticks: int

    @property
    def is_alive(self) -> bool:
        """True if that very process, not a later one with its number, is alive."""
        return start_ticks_of(self.pid) == self.start_ticks


class Home:
    """A locked home directory."""

    def __init__(self, path: Path, lock_fd: int) -> None:
        self.path = path
        self._lock_fd = lock_fd

    @classmethod
    def open(cls, path: Path) -> Self:
        """Make the directories and take the lock. Raises MachineError HOME_LOCKED naming the
        holder.
        """
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            for name in _DIRECTORIES:
                (path / name).mkdir(mode=0o700, exist_ok=True)
            fd = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise machine_error_from_os_error(error, action=f"use {path} as home") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(fd)
            raise MachineError(
                f"{path} is in use by another peer (pid {holder})",
                allowed="one peer per home directory",
                remedy="stop that peer, or give this one its own directory with --home",
                code=ErrorCode.HOME_LOCKED,
            ) from error
        try:
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        except OSError as error:
            os.close(fd)
            raise machine_error_from_os_error(error, action=f"write {path / 'lock'}") from error
        return cls(path, fd)

    def close(self) -> None:
        """Remove what is of no use afterwards (status.json stays: how it ended) and release the
        lock.
        """
        (self.run / "children.json").unlink(missing_ok=True)
        for leftover in find_leftover_files(self.path):
            leftover.unlink(missing_ok=True)
        os.close(self._lock_fd)

    @property
    def run(self) -> Path:
        """Files that mean something only while the daemon lives."""
        return self.path / "run"

    @property
    def logs(self) -> Path:
        """Output of the children."""
        return self.path / "logs"

    @property
    def cache(self) -> Path:
        """Datasets by id."""
        return self.path / "cache"

    @property
    def tmp(self) -> Path:
        """Files under way; emptied at start."""
        return self.path / "tmp"

    @property
    def owner_mark(self) -> dict[str, str]:
        """For the environment of every descendant: by it the next daemon of this home finds what
        has outlived this one.
        """
        return {_OWNER_VARIABLE: str(self.path.resolve())}

    def record_children(self, records: list[ChildRecord]) -> None:
        """Remember the children, so that a later daemon can end those that outlived this one."""
        plain = [
            {"name": r.name, "pid": r.pid, "group_id": r.group_id, "start_ticks": r.start_ticks}
            for r in records
        ]
        write_atomically(self.run / "children.json", json.dumps(plain).encode(), is_durable=False)

    def clean_leftovers(self, *, wait_seconds: float = 2.0) -> list[str]:
        """End orphans of dead daemons, remove stale sockets and temporary files; return what was
        done.
        """
        done = []
        for record in load_child_records(self.path):
            if record.is_alive:
                _kill_group(record)
                _wait_until_gone(record, wait_seconds=wait_seconds)
                done.append(f"ended orphaned {record.name} process {record.pid}")
        for pid in find_owned_processes(self.path):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
                done.append(f"ended orphaned process {pid}")
        for leftover in find_leftover_files(self.path):
            leftover.unlink(missing_ok=True)
            done.append(f"removed {leftover.relative_to(self.path)}")
        return done


def find_owned_processes(home: Path) -> list[int]:
    """Living processes that descend from a daemon of this home, this one left out: they carry its
    mark in their environment, whatever became of their parents and groups.
    """
    mark = f"{_OWNER_VARIABLE}={home.resolve()}".encode()
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if mark in Path(entry.path, "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found


def load_child_records(home: Path) -> list[ChildRecord]:
    """Children that the last daemon wrote down; empty if none or unreadable."""
    try:
        plain = json.loads((home / "run" / "children.json").read_bytes())
        return [ChildRecord(**entry) for entry in plain]
    except (OSError, ValueError, TypeError):
        return []


def find_leftover_files(home: Path) -> list[Path]:
    """Files that only a dead process can have left: everything in tmp, sockets in run, half-written
    files.
    """
    found = [path for path in (home / "tmp").glob("*") if path.is_file()]
    if (home / "run").is_dir():
        found += [path for path in (home / "run").iterdir() if path.is_socket()]
    for pattern in (
        "*.tmp",
        "step/*.tmp",
        "bad_batches/*.tmp",
        "run/*.tmp",
        "state/*.tmp",
        "state/**/*.tmp",
        "cache/**/*.tmp",
    ):
        found += [path for path in home.glob(pattern) if path.is_file()]
    return sorted(set(found))


def load_status(home: Path) -> dict[str, Any] | None:
    """What the running daemon last wrote to status.json; None if there is none."""
    try:
        status: dict[str, Any] = json.loads((home / "run" / "status.json").read_bytes())
    except (OSError, ValueError):
        return None
    return status


def holder_of_lock(home: Path) -> int | None:
    """Pid of the daemon that holds the home directory; None if nobody does."""
    try:
        fd = os.open(home / "lock", os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        text = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
        return int(text) if text.isdigit() else 0
    finally:
        os.close(fd)
    return None


def _kill_group(record: ChildRecord) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(record.group_id, signal.SIGKILL)


def _wait_until_gone(record: ChildRecord, *, wait_seconds: float) -> None:
    deadline_monotonic_seconds = time.monotonic() + wait_seconds
    while record.is_alive and time.monotonic() < deadline_monotonic_seconds:
        time.sleep(0.02)
