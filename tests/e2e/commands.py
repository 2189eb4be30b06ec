"""Runs the two command lines as processes of their own without paying for each one's imports.

`Commands` starts one other process (this file as a program), which imports both command lines,
starts no thread, and forks for every command: arguments, environment, directory, standard output
and error, exit code and death by a signal are as if a person had started it. It ends with its
owner, at the end of its standard input.

What a fork cannot show (imports, capabilities, changes before the imports) is for a real start.
"""

import atexit
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_PRELOADED = (
    "coordinator.app",
    "coordinator.cli.main",
    "coordinator.cli.perform",
    "coordinator.cli.up",
    "coordinator.corpus.build",
    "peer.cli.main",
    "peer.cli.ports",
    "peer.daemon.daemon",
)


class Commands:
    """That process, from its owner's side; one command at a time."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        """`environment` is that of the imports; every command brings its own."""
        self._guard = threading.Lock()
        self._popen = subprocess.Popen(
            [sys.executable, __file__],
            env=dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        atexit.register(self._popen.communicate)

    def run(
        self,
        module: str,
        arguments: Sequence[str],
        *,
        environment: Mapping[str, str],
        directory: Path,
        timeout_seconds: int = 60,
    ) -> "subprocess.CompletedProcess[str]":
        """Run `module`'s main to its end; SIGALRM ends it when the time is over."""
        assert self._popen.stdin is not None and self._popen.stdout is not None
        with self._guard, tempfile.TemporaryDirectory() as outputs:
            paths = [str(Path(outputs, name)) for name in ("stdout", "stderr")]
            order = {
                "module": module,
                "arguments": list(arguments),
                "environment": dict(environment),
                "directory": str(directory),
                "outputs": paths,
                "timeout_seconds": timeout_seconds,
            }
            print(json.dumps(order), file=self._popen.stdin, flush=True)
            answer = self._popen.stdout.readline()
            assert answer, f"the forking process ended with {self._popen.wait()}"
            texts = [Path(path).read_text(errors="replace") for path in paths]
        return subprocess.CompletedProcess([module, *arguments], int(answer), *texts)


def _become(order: dict[str, Any]) -> None:
    """In the fork: be the ordered command."""
    signal.alarm(order["timeout_seconds"])
    for target, path in enumerate(("/dev/null", *order["outputs"])):
        flags = os.O_RDONLY if target == 0 else os.O_WRONLY | os.O_CREAT
        source = os.open(path, flags, 0o600)
        os.dup2(source, target)
        os.close(source)
    os.environ.clear()
    os.environ.update(order["environment"])
    os.chdir(order["directory"])
    sys.argv = [order["module"], *order["arguments"]]
    sys.modules[order["module"]].main()


def _serve() -> None:
    for name in _PRELOADED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # forks then leave these pages shared
    for line in sys.stdin:
        threads = os.listdir("/proc/self/task")
        assert len(threads) == 1, f"{len(threads)} threads; a fork would lose them"
        pid = os.fork()
        if pid == 0:
            _become(json.loads(line))
            sys.exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    _serve()
