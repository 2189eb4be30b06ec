"""Faults of a real swarm on loopback: kills, stops, restarts; the books must balance after every
one.
"""

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.harness import ROOT, Swarm, is_alive, running_swarm, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of Muster's own sources: about a hundred thousand tokens."""
    directory = tmp_path_factory.mktemp("corpus")
    swarm = Swarm(directory)
    swarm.run_cli(
        "corpus", "build", str(ROOT / "protos"), str(ROOT / "coordinator"), str(ROOT / "peer"),
        "--out", str(directory / "dataset"), timeout_seconds=120,
    )  # fmt: skip
    return directory / "dataset"


@pytest.fixture()
def swarm(tmp_path: Path) -> Iterator[Swarm]:
    """A swarm that leaves nothing behind."""
    with running_swarm(tmp_path) as running:
        yield running
    wait_until(
        lambda: not running.leftovers(),
        what=f"no leftovers: {running.leftovers()}",
        deadline_seconds=15,
    )


def start(
    swarm: Swarm, corpus: Path, *, num_peers: int, budget_tokens: int, batch_tokens: int = 1536
) -> None:
    """Coordinator, run and peers; returns when the first outer steps are committed."""
    swarm.start_coordinator()
    swarm.create_run(
        corpus, budget_tokens=budget_tokens, batch_tokens=batch_tokens, num_peers=num_peers
    )
    for index in range(num_peers):
        swarm.start_peer(f"peer-{index}")
    swarm.wait_for_step(2, 90)


def check_books(swarm: Swarm, status: dict[str, object]) -> None:
    """Budget credited exactly, no violation, equal digests."""
    assert status["credited_tokens"] == status["budget_tokens"], swarm.report()
    assert status["state_digests_equal"] is True, swarm.report()
    verdict = json.loads(
        swarm.run_cli("ledger", "verify", "--data-dir", str(swarm.data_dir), "--json")
    )
    assert verdict["violations"] == [], verdict


def check_no_tracebacks(swarm: Swarm) -> None:
    """No log of any process shows a traceback."""
    logs = [*swarm.directory.glob("*.log"), *swarm.directory.glob("homes/*/logs/*")]
    assert logs
    for log in logs:
        assert "Traceback" not in log.read_text(errors="replace"), (
            f"{log}\n{log.read_text()[-3000:]}"
        )


def test_peer_killed_newcomer_joins_coordinator_killed(swarm: Swarm, corpus: Path) -> None:
    """One run meets a killed peer, a newcomer and a killed coordinator, and ends exact."""
    start(swarm, corpus, num_peers=3, budget_tokens=160_000)
    killed = swarm.peers["peer-0"]
    step = swarm.status()["outer_step"]
    killed.kill()
    swarm.wait_for_step(step + 3)
    launched = time.monotonic()
    swarm.start_peer("peer-3")
    swarm.wait(
        lambda: swarm.status().get("credited_tokens_by_peer", {}).get(_peer_id(swarm, "peer-3"),
        0) > 0,
        "the newcomer contributes", 30,
    )  # fmt: skip
    assert time.monotonic() - launched <= 30

    before = swarm.status()
    assert swarm.coordinator is not None
    port = int(swarm.address.rsplit(":", 1)[1])
    steps_seen = [swarm.peer_status(name)["outer_step"] for name in ("peer-1", "peer-2")]
    swarm.coordinator.kill()
    swarm.coordinator.popen.wait()
    swarm.wait(
        lambda: all(
            swarm.peer_status(name)["outer_step"] > seen
            for name, seen in zip(("peer-1", "peer-2"), steps_seen, strict=True)
        ),
        "rounds go on without the coordinator", 30,
    )  # fmt: skip
    swarm.start_coordinator(port=port)
    assert swarm.status()["credited_tokens"] >= before["credited_tokens"]
    status = swarm.wait_for_end(150)
    check_books(swarm, status)
    assert status["num_peers_seen"] == 4
    check_no_tracebacks(swarm)


def test_all_peers_killed_between_checkpoints_rolls_back(swarm: Swarm, corpus: Path) -> None:
    """Nobody is left who has the newest state: the run goes back to a checkpoint, says so, and
    finishes.
    """
    start(swarm, corpus, num_peers=2, budget_tokens=90_000)
    swarm.wait(lambda: swarm.status().get("num_checkpoints", 0) > 0, "a checkpoint is stored", 40)
    step = swarm.status()["outer_step"]
    swarm.wait_for_step(step + 3)
    for peer in swarm.peers.values():
        peer.kill()
    swarm.start_peer("newcomer")
    status = swarm.wait_for_end(150)
    check_books(swarm, status)
    assert status["rolled_back_tokens"] > 0, swarm.report()
    assert status["num_rollbacks"] >= 1, swarm.report()


def test_stopped_past_its_lease_then_continued(swarm: Swarm, corpus: Path) -> None:
    """A stopped peer's ranges go to others; continued, it resynchronises and contributes again."""
    start(swarm, corpus, num_peers=3, budget_tokens=240_000)
    stopped = swarm.peers["peer-1"]
    pids = stopped.tree()
    swarm.note_pids()
    for pid in pids:
        _signal(pid, signal.SIGSTOP)
    own_id = _peer_id(swarm, "peer-1")
    swarm.wait(
        lambda: swarm.status().get("leases_by_state", {}).get("EXPIRED", 0) > 0,
        "its leases expire",
        40,
    )
    for pid in pids:
        _signal(pid, signal.SIGCONT)
    credited = swarm.status()["credited_tokens_by_peer"].get(own_id, 0)
    swarm.wait(
        lambda: swarm.status().get("credited_tokens_by_peer", {}).get(own_id, 0) > credited,
        "the continued peer works on", 40,
    )  # fmt: skip
    check_books(swarm, swarm.wait_for_end(150))


def test_asked_to_leave(swarm: Swarm, corpus: Path) -> None:
    """One signal: leases returned, left within 5 s, exit code 0; the last peer ends the run alone,
    though its children stop: the daemon notices the silence, says so, kills and replaces them.
    """
    start(swarm, corpus, num_peers=3, budget_tokens=60_000)
    for name, sent_signal in (("peer-0", signal.SIGTERM), ("peer-1", signal.SIGINT)):
        leaving = swarm.peers[name]
        pids = leaving.tree()
        asked = time.monotonic()
        leaving.kill(sent_signal)
        leaving.popen.wait(timeout=10)
        assert time.monotonic() - asked <= 5.5
        assert leaving.popen.returncode == 0, leaving.tail()
        wait_until(
            lambda pids=pids: not any(map(is_alive, pids)),
            what="nothing is left of it",
            deadline_seconds=5,
        )
    children = json.loads((swarm.directory / "homes/peer-2/run/children.json").read_text())
    stopped = [child["pid"] for child in children if child["name"] in ("trainer", "swarm")]
    assert len(stopped) == 2
    for pid in stopped:
        _signal(pid, signal.SIGSTOP)
    swarm.wait(lambda: not any(map(is_alive, stopped)), "the stopped children are killed", 40)
    check_books(swarm, swarm.wait_for_end(120))
    said = swarm.peers["peer-2"].log.read_text(errors="replace")
    assert said.count("no progress for") >= 2 and said.count("starting it again") >= 2, said
    check_no_tracebacks(swarm)


def test_operator_pauses_resumes_and_evicts(swarm: Swarm, corpus: Path) -> None:
    """Paused: no step; resumed: steps again; evicted: out for good, and the others go on."""
    start(swarm, corpus, num_peers=2, budget_tokens=60_000)
    data_dir = ("--data-dir", str(swarm.data_dir))
    swarm.run_cli("run", "pause", *data_dir)
    swarm.wait(
        lambda: all(swarm.peer_status(name).get("state") == "WAITING" for name in swarm.peers),
        "peers wait",
        15,
    )
    swarm.wait(lambda: swarm.status().get("state") == "PAUSED", "the page knows it", 5)
    step = swarm.peer_status("peer-0")["outer_step"]
    swarm.wait(lambda: _has_lived_on(swarm, "peer-0", 3), "the peer lives on, paused", 10)
    assert swarm.peer_status("peer-0")["outer_step"] == step
    swarm.run_cli("run", "resume", *data_dir)
    swarm.wait_for_step(step + 3, 30)
    swarm.run_cli("run", "evict", _peer_id(swarm, "peer-1"), *data_dir)
    evicted = swarm.peers["peer-1"]
    swarm.wait(lambda: evicted.popen.poll() is not None, "the evicted peer ends", 30)
    assert evicted.popen.returncode == 3, evicted.tail()
    check_books(swarm, swarm.wait_for_end(120))


def _has_lived_on(swarm: Swarm, name: str, number: int) -> bool:
    """True once the peer has written its status so many times since the first call."""
    seen = swarm.seen_updates.setdefault(name, set())
    seen.add(swarm.peer_status(name).get("update_unix_seconds"))
    return len(seen) > number


def _peer_id(swarm: Swarm, name: str) -> str:
    return str(swarm.peer_status(name).get("peer_id", ""))


def _signal(pid: int, sent: signal.Signals) -> None:
    import os

    os.kill(pid, sent)
