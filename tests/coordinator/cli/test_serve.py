"""`serve` as a process: commands through it, SIGKILL and restart, SIGTERM, what is taken."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from protos.contract.channel import JoinString
from tests.coordinator.cli.test_cli import ask, run_cli
from tests.coordinator.loopback import SEQ_LEN, open_client, tiny_spec, write_dataset


@contextmanager
def serving(data_dir: Path, port: int) -> Iterator["subprocess.Popen[str]"]:
    """A `serve` process that is up; killed at the end if it still lives."""
    flags = [
        "--data-dir",
        str(data_dir),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--http-port",
        "0",
    ]
    command = [
        sys.executable,
        "-m",
        "coordinator.cli.main",
        "serve",
        "--json",
        "--no-rendezvous",
        *flags,
    ]
    environment = os.environ | {"MUSTER_COORDINATOR_START_GRACE_SECONDS": "0.1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        assert line, process.stderr.read()
        assert json.loads(line)["local_address"] == f"127.0.0.1:{port}"
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=20)


def free_port() -> int:
    """A port that was free a moment ago."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_sigkill_loses_no_acknowledged_lease(tmp_path: Path) -> None:
    data_dir, port = tmp_path / "data", free_port()
    where = ("--data-dir", str(data_dir))
    spec_path = tmp_path / "run.toml"
    spec_path.write_text(tiny_spec(write_dataset(data_dir / "datasets" / "test")).to_toml())
    with serving(data_dir, port) as process:
        dataset = ("--dataset", str(data_dir / "datasets" / "test"))
        ask("run", "create", *dataset, "--spec", str(spec_path), *where)
        join_string = JoinString.decode(ask("token", "create", *where)["join_string"])
        assert ask("run", "pause", *where)["state"] == "PAUSED"
        assert ask("run", "resume", *where)["state"] != "PAUSED"

        async def take_leases() -> tuple[bytes, list[int]]:
            async with open_client(join_string) as client:
                await client.join()
                await client.reach_incarnation_one()
                leases = await client.acquire(4 * SEQ_LEN, request_id="before the kill")
                process.kill()
                return client.session_key, [lease.lease_number for lease in leases]

        session_key, lease_numbers = asyncio.run(take_leases())
        assert lease_numbers
        assert process.wait(timeout=20) == -signal.SIGKILL
    assert ask("status", *where)["active_tokens"] == 4 * SEQ_LEN, "readable while nobody serves"
    with serving(data_dir, port) as process:
        state = ask("status", *where)
        assert state["coordinator_state"] == "RECOVERING"

        async def come_back() -> None:
            async with open_client(join_string) as client:
                client.session_key = session_key
                reply = await client.heartbeat(incarnation=1, lease_numbers=lease_numbers)
                assert not reply.lost_lease_numbers
                again = await client.acquire(4 * SEQ_LEN, request_id="before the kill")
                assert [lease.lease_number for lease in again] == lease_numbers

        asyncio.run(come_back())
        done = run_cli("serve", "--no-rendezvous", *where)
        assert done.returncode == 4 and str(process.pid) in done.stderr
        other = ("--data-dir", str(tmp_path / "other"), "--host", "127.0.0.1")
        done = run_cli("serve", "--no-rendezvous", "--port", str(port), *other)
        assert done.returncode == 4 and "--port" in done.stderr
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=20)
        assert process.returncode == 0, stderr
        assert "Traceback" not in stderr
    assert ask("ledger", "verify", *where)["violations"] == []
    assert not (data_dir / "coordinator.json").exists()
