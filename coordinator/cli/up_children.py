"""Child processes of `up`: peers that live and die with it, and one-shot `muster-peer` commands.

A peer gets a process group of its own, so Ctrl+C reaches only `up`, which then stops them in order;
the kernel sends it SIGTERM if `up` itself dies (`--die-with-parent`), so nothing is left behind.
The child asks for that itself: a function between fork and exec would run gRPC's fork handlers.
"""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from protos.contract.errors import ErrorCode, MachineError, RunFailedError
from protos.contract.leaving import LEAVE_SECONDS

PEER_MODULE = "peer.cli.main"


def peer_command(*arguments: str) -> list[str]:
    """Command line of `muster-peer` in this environment."""
    return [sys.executable, "-m", PEER_MODULE, "--die-with-parent", *arguments]


class PeerChild:
    """One `muster-peer join` process."""

    def __init__(self, *, name: str, home: Path, process: asyncio.subprocess.Process) -> None:
        self.name = name
        self.home = home
        self.process = process
        self.is_reported = False
        """True once its exit has been told to the coordinator."""

    @classmethod
    async def start(
        cls, *, name: str, home: Path, join_string: str, num_threads: int, step_cache: Path
    ) -> "PeerChild":
        """Start a peer that logs into its home. The join string goes through a pipe: arguments of
        processes can be read by everybody on the machine.
        """
        home.mkdir(parents=True, exist_ok=True)
        command = peer_command(
            "join", "-", "--name", name, "--home", str(home), "--threads", str(num_threads),
            "--listen-host", "127.0.0.1", "--metrics-port", "0",
            "--step-cache", str(step_cache),
        )  # fmt: skip
        with (home / "join.log").open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.PIPE,
                stdout=log,
                stderr=log,
                process_group=0,
            )
        assert process.stdin is not None
        process.stdin.write(join_string.encode() + b"\n")  # fits into the pipe: nobody waits
        process.stdin.close()
        return cls(name=name, home=home, process=process)

    @property
    def has_ended(self) -> bool:
        """True once the process is gone."""
        return self.process.returncode is not None

    def peer_id(self) -> str | None:
        """Identity of the peer, once it has written its status."""
        try:
            status = json.loads((self.home / "run" / "status.json").read_text())
        except (OSError, ValueError):
            return None
        peer_id = status.get("peer_id")
        return peer_id if isinstance(peer_id, str) else None

    def last_line(self) -> str:
        """Last line of its log, to say why it ended."""
        try:
            lines = (self.home / "join.log").read_text(errors="replace").strip().splitlines()
        except OSError:
            return ""
        return lines[-1] if lines else ""

    async def stop(self) -> None:
        """Ask it to leave; end it if it does not."""
        if self.has_ended:
            return
        self.process.terminate()
        try:
            await asyncio.wait_for(self.process.wait(), LEAVE_SECONDS)
        except TimeoutError:
            self.process.kill()
            await self.process.wait()


async def run_peer_command(*arguments: str) -> bytes:
    """Run a one-shot `muster-peer` command and return its standard output. Raises MachineError or
    RunFailedError.
    """
    process = await asyncio.create_subprocess_exec(
        *peer_command(*arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        process_group=0,
    )
    try:
        output, errors = await process.communicate()
    except asyncio.CancelledError:
        process.kill()
        await process.wait()
        raise
    if process.returncode != 0:
        text = errors.decode(errors="replace").strip()
        raise RunFailedError(
            f"muster-peer {arguments[0]} ended with exit code {process.returncode}: {text[-600:]}",
            allowed="exit code 0",
            remedy="run the same command by hand to see more",
        )
    return output


async def run_peer_json(*arguments: str) -> dict[str, Any]:
    """Run a one-shot `muster-peer` command whose last line of output is a JSON object."""
    output = await run_peer_command(*arguments)
    lines = output.decode().strip().splitlines()
    result: dict[str, Any] = json.loads(lines[-1])
    return result


def check_peer_is_installed() -> None:
    """Raises MachineError if the peer's dependencies are missing from this environment."""
    import importlib.util

    missing = [name for name in ("torch", "hivemind") if importlib.util.find_spec(name) is None]
    if missing:
        raise MachineError(
            f"`up` starts peers on this machine, but {' and '.join(missing)} are not installed",
            allowed="an environment with the extra `peer`",
            remedy="run `bash ops/up`, or install the package with the extra `peer`",
            code=ErrorCode.DEPENDENCY_MISSING,
        )
