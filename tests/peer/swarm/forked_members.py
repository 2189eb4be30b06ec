"""Swarm processes forked from one that has done the imports: many short swarms in little time.

`Forker` starts one other process (this file as a program) with an environment of its own, which
imports what a swarm process needs, starts no thread, and forks for every member. A fork runs
peer.swarm's main with the arguments and descriptors that the daemon would give it. What a fork
cannot show (the start by exec, imports) is shown by test_swarm_processes.py.
"""

import asyncio
import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_PRELOADED = (
    "peer.swarm.__main__",
    "peer.swarm.config_message",
    "peer.swarm.dht",
    "peer.swarm.node",
    "peer.swarm.old_runs",
)
_MAX_MESSAGE_BYTES = 2**16
OLD_CPU = {
    "ATEN_CPU_CAPABILITY": "default",
    "NPY_DISABLE_CPU_FEATURES": "AVX2 FMA3 AVX512F AVX512_SKX",
}
"""Environment in which torch and numpy compute as on a CPU without AVX2."""


@dataclass(slots=True)
class ForkedProcess:
    """As much of asyncio's Process as the hub uses."""

    pid: int
    _status_fd: int
    returncode: int | None = None
    _guard: asyncio.Lock = field(default_factory=asyncio.Lock)

    def kill(self) -> None:
        """SIGKILL."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    async def wait(self) -> int:
        """Exit code, once it has ended; negative: the signal that ended it."""
        async with self._guard:
            while self.returncode is None:
                await _readable(self._status_fd)
                text = os.read(self._status_fd, _MAX_MESSAGE_BYTES)
                os.close(self._status_fd)
                assert text, "the forking process has ended"
                self.returncode = int(text)
        return self.returncode


async def _readable(fd: int) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(fd, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(fd)


class Forker:
    """That process, from its owner's side; it ends with its owner's socket."""

    def __init__(self, environment: Mapping[str, str], log: Path) -> None:
        """`environment` comes on top of this process's own, for all forks; their standard error
        goes to `log`.
        """
        self._log = log
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        everything = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        everything |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", **environment}
        with theirs, log.open("wb") as stderr:
            self._popen = subprocess.Popen(
                [sys.executable, __file__], stdin=theirs, stderr=stderr, env=everything
            )

    def start(self, arguments: Sequence[str], *, fds: Sequence[int]) -> ForkedProcess:
        """Fork a member; "{0}" and "{1}" in its arguments become its numbers of `fds`."""
        status_fd, write_fd = os.pipe()
        socket.send_fds(self._socket, [json.dumps(list(arguments)).encode()], [*fds, write_fd])
        os.close(write_fd)
        answer = self._socket.recv(_MAX_MESSAGE_BYTES)
        assert answer, f"the forking process ended with {self._popen.wait()}"
        return ForkedProcess(int(answer), status_fd)

    def close(self) -> None:
        """End it; members must have ended, and nobody may have shown a traceback."""
        self._socket.close()
        code = self._popen.wait(20)
        said = self._log.read_text(errors="replace")
        assert code == 0 and "Traceback" not in said, said


Forkers = tuple[Forker, Forker, Forker]
"""Of three members."""


def _serve(control: socket.socket) -> None:
    """Fork for every message, and report how each fork ended."""
    ends: dict[int, tuple[int, int]] = {}
    while True:
        ready, _, _ = select.select([control, *ends], [], [])
        for pidfd in set(ready) & set(ends):
            pid, status_fd = ends.pop(pidfd)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            os.write(status_fd, str(code).encode())
            os.close(pidfd)
            os.close(status_fd)
        if control not in ready:
            continue
        data, fds, _, _ = socket.recv_fds(control, _MAX_MESSAGE_BYTES, 8)
        if not data:
            return
        threads = os.listdir("/proc/self/task")
        assert len(threads) == 1, f"{len(threads)} threads; a fork would lose them"
        *given, status_fd = fds
        pid = os.fork()
        if pid == 0:
            control.close()
            for fd in (*ends, *(end[1] for end in ends.values()), status_fd):
                os.close(fd)
            sys.argv = ["peer.swarm", *(word.format(*given) for word in json.loads(data))]
            sys.exit(sys.modules["peer.swarm.__main__"].main())
        for fd in given:
            os.close(fd)
        ends[os.pidfd_open(pid)] = (pid, status_fd)
        control.send(str(pid).encode())


def _check_cpu() -> None:
    """The environment has the effect that it is meant to have."""
    torch, numpy_core = sys.modules["torch"], sys.modules["numpy._core._multiarray_umath"]
    if all(os.environ.get(key) == value for key, value in OLD_CPU.items()):
        assert torch.backends.cpu.get_cpu_capability() == "DEFAULT"
        assert not numpy_core.__cpu_features__["AVX2"]


if __name__ == "__main__":
    for name in _PRELOADED:
        importlib.import_module(name)
    _check_cpu()
    gc.collect()
    gc.freeze()  # forks then leave these pages shared
    _serve(socket.socket(fileno=os.dup(0)))
