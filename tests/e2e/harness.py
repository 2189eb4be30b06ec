"""Starts and breaks real coordinators and peers: what a user would run, with a small model and
short intervals.

Everything runs on loopback in a temporary directory. Only processes started here are signalled, by
their id; `leftovers` says what outlived its owner. Waiting is polling with a deadline, and a
failure shows the last status and the logs.
"""

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.e2e.commands import Commands

ROOT = Path(__file__).resolve().parents[2]
TINY_MODEL = "d_model=64,num_layers=2,num_heads=2,num_kv_heads=1,head_dim=32,d_ff=128,seq_len=64"
FAST_COORDINATOR = {
    "MUSTER_COORDINATOR_HEARTBEAT_INTERVAL_SECONDS": "1",
    "MUSTER_COORDINATOR_LEASE_TTL_SECONDS": "8",
    "MUSTER_COORDINATOR_RECOVERING_SECONDS": "3",
    "MUSTER_COORDINATOR_QUORUM_GRACE_SECONDS": "4",
    "MUSTER_COORDINATOR_CHECKPOINT_INTERVAL_SECONDS": "6",
}


def environment(**extra: str) -> dict[str, str]:
    """Environment of a started process: this one's, the source tree importable, one thread."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **extra}


@functools.cache
def commands() -> Commands:
    """The process of this test process that forks for every command."""
    return Commands(environment())


def wait_until(condition: Callable[[], Any], *, what: str, deadline_seconds: float) -> Any:
    """Poll until `condition` is true and return its value. Raises AssertionError that names
    `what`.
    """
    end = time.monotonic() + deadline_seconds
    pause = threading.Event()
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(f"{what}: not within {deadline_seconds:.0f} s")
        pause.wait(0.1)


@dataclass
class Process:
    """One started process with its log."""

    name: str
    popen: subprocess.Popen[bytes]
    log: Path

    def kill(self, sent_signal: int = signal.SIGKILL) -> None:
        """Send a signal to this process alone."""
        self.popen.send_signal(sent_signal)

    def tree(self) -> list[int]:
        """Ids of the process and all of its living descendants."""
        children: dict[int, list[int]] = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError, IndexError, ValueError):
                fields = stat.read_text().rsplit(")", 1)[1].split()
                if fields[0] != "Z":
                    children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
        found, todo = [], [self.popen.pid]
        while todo:
            pid = todo.pop()
            found.append(pid)
            todo += children.get(pid, [])
        return found

    def tail(self) -> str:
        """End of the log."""
        return self.log.read_text(errors="replace")[-3000:] if self.log.exists() else ""


def is_alive(pid: int) -> bool:
    """True if a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@dataclass
class Swarm:
    """A coordinator's data directory, its run and its peers."""

    directory: Path
    coordinator: Process | None = None
    peers: dict[str, Process] = field(default_factory=dict)
    join_string: str = ""
    seen_pids: set[int] = field(default_factory=set)
    seen_updates: dict[str, set[Any]] = field(default_factory=dict)

    @property
    def data_dir(self) -> Path:
        """The coordinator's data directory."""
        return self.directory / "coordinator"

    def run_cli(self, *arguments: str, timeout_seconds: int = 60) -> str:
        """Run a coordinator's command to its end and return its standard output. Raises
        AssertionError with its errors.
        """
        done = commands().run(
            "coordinator.cli.main",
            arguments,
            environment=environment(),
            directory=self.directory,
            timeout_seconds=timeout_seconds,
        )
        assert done.returncode == 0, f"{arguments}: exit {done.returncode}\n{done.stderr}"
        return done.stdout

    def run_peer_cli(self, *arguments: str, timeout_seconds: int = 120) -> dict[str, Any]:
        """Run a peer's command with --json to its end and return its answer. Raises AssertionError
        with its errors.
        """
        done = commands().run(
            "peer.cli.main",
            (*arguments, "--json"),
            environment=environment(),
            directory=self.directory,
            timeout_seconds=timeout_seconds,
        )
        assert done.returncode == 0, f"{arguments}: exit {done.returncode}\n{done.stderr}"
        return dict(json.loads(done.stdout))

    def start(self, name: str, *arguments: str, module: str, **extra: str) -> Process:
        """Start a process in a group of its own, its output in a log file."""
        log = self.directory / f"{name}.log"
        with log.open("ab") as file:
            popen = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                env=environment(**extra),
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                process_group=0,
            )
        return Process(name, popen, log)

    def start_coordinator(self, *, port: int = 0) -> None:
        """Start `muster-coordinator serve` and wait until it answers."""
        info = self.data_dir / "coordinator.json"
        info.unlink(missing_ok=True)
        self.coordinator = self.start(
            "coordinator", "serve", "--data-dir", str(self.data_dir), "--host", "127.0.0.1",
            "--port", str(port),
            "--http-port", "0", module="coordinator.cli.main",
            MUSTER_COORDINATOR_RENDEZVOUS_PORT="0", **FAST_COORDINATOR,
        )  # fmt: skip
        self.wait(
            lambda: info.exists() and self.read("/healthz") is not None,
            "the coordinator serves",
            30,
        )

    @property
    def address(self) -> str:
        """HOST:PORT of the coordinator."""
        return str(json.loads((self.data_dir / "coordinator.json").read_text())["address"])

    def read(self, path: str) -> Any:
        """Read from the page's server: JSON for /api, text otherwise; None while it cannot be
        reached.
        """
        try:
            base = json.loads((self.data_dir / "coordinator.json").read_text())["http_address"]
            url = base if base.startswith("http") else f"http://{base}"
            with urllib.request.urlopen(url + path, timeout=5) as answer:
                text = answer.read().decode()
        except (OSError, ValueError):
            return None
        return json.loads(text) if path.startswith("/api") else text

    def create_run(
        self,
        corpus: Path,
        *,
        budget_tokens: int,
        batch_tokens: int,
        num_peers: int,
        eval_tokens: int = 2048,
        settings: Sequence[str] = (),
    ) -> None:
        """Create the run, with more `settings` ("KEY=VALUE"), and a join string for everybody."""
        more = [word for setting in settings for word in ("--set", setting)]
        self.run_cli(
            "run", "create", "--data-dir", str(self.data_dir), "--dataset", str(corpus), "--model",
            TINY_MODEL,
            "--set", f"strategy.global_batch_tokens={batch_tokens}", "--set",
            "schedule.lr_warmup_tokens=4096",
            "--set", f"data.eval_tokens={eval_tokens}", "--budget-tokens", str(budget_tokens),
            "--min-peers", str(num_peers), "--json", *more,
        )  # fmt: skip
        token = json.loads(
            self.run_cli("token", "create", "--data-dir", str(self.data_dir), "--json")
        )
        self.join_string = token["join_string"]

    def start_peer(self, name: str) -> Process:
        """Start `muster-peer join`."""
        home = self.directory / "homes" / name
        self.peers[name] = self.start(
            name, "join", self.join_string, "--name", name, "--home", str(home), "--threads", "1",
            "--listen-host", "127.0.0.1", "--metrics-port", "0", module="peer.cli.main",
        )  # fmt: skip
        return self.peers[name]

    def status(self) -> dict[str, Any]:
        """Status of the only run; {} while the coordinator or its page does not know it."""
        runs = (self.read("/api/v1/runs") or {}).get("runs")
        return (self.read(f"/api/v1/runs/{runs[0]['run_id']}") or {}) if runs else {}

    def peer_status(self, name: str) -> dict[str, Any]:
        """What `muster-peer status --json` would show, read from its home."""
        try:
            text = (self.directory / "homes" / name / "run" / "status.json").read_text()
            return dict(json.loads(text))
        except (OSError, ValueError):
            return {}

    def wait(self, condition: Callable[[], Any], what: str, deadline_seconds: float) -> Any:
        """`wait_until` that shows status and logs when it fails."""
        try:
            return wait_until(condition, what=what, deadline_seconds=deadline_seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.report()}") from None
        finally:
            self.note_pids()

    def wait_for_step(self, outer_step: int, deadline_seconds: float = 60) -> None:
        """Wait until an outer step is certified."""
        self.wait(
            lambda: self.status().get("outer_step", -1) >= outer_step,
            f"outer step {outer_step}",
            deadline_seconds,
        )

    def wait_for_end(self, deadline_seconds: float = 120) -> dict[str, Any]:
        """Wait until the run is finished and return its status."""
        self.wait(
            lambda: self.status().get("state") == "FINISHED",
            "the run is finished",
            deadline_seconds,
        )
        return self.status()

    def note_pids(self) -> None:
        """Remember every descendant, to look for orphans later."""
        for process in [self.coordinator, *self.peers.values()]:
            if process is not None and process.popen.poll() is None:
                self.seen_pids.update(process.tree())

    def report(self) -> str:
        """Status and logs, for a failure message."""
        parts = [json.dumps(self.status(), indent=1)]
        for process in [self.coordinator, *self.peers.values()]:
            if process is not None:
                parts.append(f"--- {process.name} (exit {process.popen.poll()})\n{process.tail()}")
        return "\n".join(parts)

    def stop(self) -> None:
        """End everything that was started here."""
        self.note_pids()
        for process in [*self.peers.values(), self.coordinator]:
            if process is not None and process.popen.poll() is None:
                process.kill(signal.SIGCONT)
                process.kill(signal.SIGTERM)
        for process in [*self.peers.values(), self.coordinator]:
            if process is None:
                continue
            try:
                process.popen.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.popen.wait(timeout=10)

    def leftovers(self) -> list[str]:
        """Processes and sockets that outlived their owners."""
        found = [
            f"process {pid}: {_command(pid)}" for pid in sorted(self.seen_pids) if is_alive(pid)
        ]
        found += [str(path) for path in self.directory.rglob("*.sock")]
        return found


def _command(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()[:120]
    return "?"


@contextlib.contextmanager
def running_swarm(directory: Path) -> Iterator[Swarm]:
    """A swarm that is taken down whatever happens."""
    swarm = Swarm(directory)
    try:
        yield swarm
    finally:
        swarm.stop()
