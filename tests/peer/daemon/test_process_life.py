"""A peer as a process: ended at any moment by any signal, it leaves no traceback, no process."""

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from peer.home import find_owned_processes
from tests.e2e.harness import ROOT, Process, Swarm, is_alive, running_swarm, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240), pytest.mark.xdist_group("e2e")]


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swarm]:
    """A coordinator with a run that outlasts these tests."""
    directory = tmp_path_factory.mktemp("life")
    with running_swarm(directory) as running:
        dataset = directory / "dataset"
        running.run_cli(
            "corpus", "build", str(ROOT / "protos"), str(ROOT / "coordinator"),
            "--out", str(dataset), timeout_seconds=120,
        )  # fmt: skip
        running.start_coordinator()
        running.create_run(dataset, budget_tokens=2**22, batch_tokens=1536, num_peers=1)
        yield running
    assert running.coordinator is not None
    assert "Traceback" not in running.coordinator.log.read_text()
    assert not running.leftovers()


def _check_end(swarm: Swarm, peer: Process, codes: tuple[int, ...]) -> None:
    code = peer.popen.wait(timeout=15)
    swarm.note_pids()
    logs = [peer.log, *(swarm.directory / "homes" / peer.name / "logs").glob("*")]
    for log in logs:
        text = log.read_text(errors="replace")
        assert "Traceback" not in text and "Exception ignored" not in text, f"{log}\n{text[-2000:]}"
    assert code in codes, f"exit code {code}\n{peer.tail()}"
    wait_until(
        lambda: not _of_home(swarm, peer),
        what=f"nothing of {peer.name} is left: {_of_home(swarm, peer)}",
        deadline_seconds=10,
    )


def _of_home(swarm: Swarm, peer: Process) -> list[int]:
    """Living processes that carry the mark of the peer's home."""
    return find_owned_processes(swarm.directory / "homes" / peer.name)


@pytest.mark.parametrize(
    ("state", "sent_signal"),
    [
        ("start", signal.SIGINT),
        ("JOINING", signal.SIGTERM),
        ("SYNCING", signal.SIGINT),
        ("TRAINING", signal.SIGINT),
    ],
)
def test_ctrl_c_at_any_moment(swarm: Swarm, state: str, sent_signal: signal.Signals) -> None:
    """The signal goes to the whole foreground group, as a terminal sends it."""
    peer = swarm.start_peer(f"ended-{state.lower()}")
    if state != "start":
        swarm.wait(lambda: f"  {state}" in peer.tail(), f"{peer.name} is {state}", 60)
    swarm.note_pids()
    os.killpg(peer.popen.pid, sent_signal)
    _check_end(swarm, peer, (0, 130, -sent_signal))


def test_killed_swarm_process_returns_on_the_same_port(swarm: Swarm) -> None:
    """Its p2pd goes with it, so that the next can listen there; SIGKILL of the daemon ends all."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    home = swarm.directory / "homes" / "fixed"
    peer = swarm.start(
        "fixed", "join", swarm.join_string, "--home", str(home), "--threads", "1",
        "--listen-host", "127.0.0.1", "--listen-port", str(port), module="peer.cli.main",
    )  # fmt: skip
    swarm.peers["fixed"] = peer
    swarm.wait(lambda: "  TRAINING" in peer.tail(), "the peer trains", 60)
    swarm.note_pids()
    by_command = {_command(pid): pid for pid in peer.tree()}
    swarm_pid = next(pid for command, pid in by_command.items() if "peer.swarm" in command)
    p2pd = next(pid for command, pid in by_command.items() if "p2pd" in command)
    os.kill(swarm_pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(p2pd), what="p2pd goes with it", deadline_seconds=5)
    num_before = swarm.status()["outer_step"]
    swarm.wait_for_step(num_before + 2)
    swarm.note_pids()
    assert peer.popen.poll() is None and "Traceback" not in peer.tail()
    pids = peer.tree()
    peer.kill(signal.SIGKILL)
    peer.popen.wait(10)
    wait_until(
        lambda: not [pid for pid in pids if is_alive(pid)],
        what=f"nothing survives the daemon: {[_command(pid) for pid in pids if is_alive(pid)]}",
        deadline_seconds=15,
    )
    again = swarm.start_peer("fixed")
    swarm.wait(lambda: "  TRAINING" in again.tail().rpartition("JOINING")[2], "it returns", 60)
    left = {path.name.split("_")[1] for path in Path("/dev/shm").glob("torch_*_*")}
    assert not left & {str(pid) for pid in pids}, "hivemind and torch leave nothing in memory"
    again.kill(signal.SIGTERM)
    _check_end(swarm, again, (0,))


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""
