"""Faults of a real swarm on loopback: kills, stops, restarts; the books must balance after every
one.
"""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from protos.contract.telemetry import ATTEMPT_PHASES, AttemptOutcome, SessionState
from tests.e2e.harness import ROOT, Swarm, is_alive, running_swarm, wait_until
from tests.e2e.test_bad_input import fill, small_disk

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


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
    check_no_tracebacks(running)


def start(
    swarm: Swarm,
    corpus: Path,
    *,
    num_peers: int,
    budget_tokens: int,
    settings: tuple[str, ...] = (),
) -> None:
    """Coordinator, run and peers; returns when the first outer steps are committed."""
    swarm.start_coordinator()
    swarm.create_run(
        corpus,
        budget_tokens=budget_tokens,
        batch_tokens=1536,
        num_peers=num_peers,
        settings=settings,
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
    """One run meets a killed peer, a newcomer, a killed rendezvous and a killed coordinator,
    without whom a member restarts and somebody new waits; it ends exact.
    """
    start(swarm, corpus, num_peers=3, budget_tokens=160_000)
    killed = swarm.peers["peer-0"]
    step = swarm.status()["outer_step"]
    killed.kill()
    swarm.wait_for_step(step + 3)
    swarm.start_peer("peer-3")
    swarm.wait(lambda: _credited(swarm, "peer-3") > 0, "the newcomer contributes", 90)

    rendezvous = _child_of_coordinator(swarm, b"rendezvous")
    step = swarm.status()["outer_step"]
    os.kill(rendezvous, signal.SIGKILL)
    swarm.wait_for_step(step + 2)

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
    _check_restart_and_wait_without_coordinator(swarm)
    swarm.start_coordinator(port=port)
    assert swarm.status()["credited_tokens"] >= before["credited_tokens"]
    swarm.wait(lambda: "SYNCING" in swarm.peers["peer-4"].tail(), "who waited has joined", 60)
    status = swarm.wait_for_end(150)
    check_books(swarm, status)
    assert status["num_peers_seen"] == 5


def _check_restart_and_wait_without_coordinator(swarm: Swarm) -> None:
    """While the coordinator is away: a member that was killed comes back by its last membership and
    takes the members' state; somebody new waits, and says so.
    """
    swarm.note_pids()
    swarm.peers["peer-1"].kill()
    again = swarm.start_peer("peer-1")

    def has_caught_up() -> bool:
        seen, other = swarm.peer_status("peer-1"), swarm.peer_status("peer-2")
        is_back = seen["pid"] == again.popen.pid and not seen["is_coordinator_reachable"]
        return is_back and bool(seen["outer_step"] >= other["outer_step"] > 0)

    swarm.wait(has_caught_up, "a member restarts without the coordinator", 90)
    said = again.log.read_text(errors="replace")
    assert "going on with the last membership" in said, said
    waiting = swarm.start_peer("peer-4")
    seen = swarm.wait(
        lambda: (s := swarm.peer_status("peer-4")) and "trying again" in s["state_reason"] and s,
        "somebody new says that it waits",
        30,
    )
    assert seen["state"] == SessionState.JOINING, seen
    assert "trying again" in waiting.tail() and waiting.popen.poll() is None


def _child_of_coordinator(swarm: Swarm, word: bytes) -> int:
    """Id of the coordinator's child whose command has this word."""
    assert swarm.coordinator is not None
    pids = [pid for pid in swarm.coordinator.tree() if pid != swarm.coordinator.popen.pid]
    (found,) = [
        pid for pid in pids if word in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    ]
    return found


STREAMING_DILOCO = (
    "strategy.name=diloco",
    "strategy.inner_steps=8",
    "strategy.inner_batch_tokens=256",
    "strategy.num_fragments=2",
    "strategy.overlap_inner_steps=2",
    "strategy.codec=int8",
)


def test_diloco_in_fragments_with_overlap_outlives_a_kill(swarm: Swarm, corpus: Path) -> None:
    """Fragments that travel as int8 while peers train on: one peer is killed, another joins, the
    owner sees where the time and the bytes of a round went, and the result can be exported.
    """
    start(swarm, corpus, num_peers=3, budget_tokens=160_000, settings=STREAMING_DILOCO)
    step = swarm.status()["outer_step"]
    swarm.peers["peer-0"].kill()
    swarm.wait_for_step(step + 3)
    swarm.start_peer("newcomer")
    swarm.wait(lambda: _credited(swarm, "newcomer") > 0, "the newcomer contributes", 90)
    _check_round_is_seen(swarm, "peer-1")
    status = swarm.wait_for_end(150)
    check_books(swarm, status)
    assert status["num_peers_seen"] == 4
    first, last = status["first_evaluation"], status["last_evaluation"]
    assert last["loss_nats"] < first["loss_nats"] - 0.5, (first, last)
    state = swarm.data_dir / status["newest_checkpoint_path"]
    swarm.run_peer_cli("export", str(state), "out", "--dataset", str(corpus))
    found = swarm.run_peer_cli("eval", "out", "--dataset", str(corpus))
    assert found["loss_nats"] < first["loss_nats"] - 0.5


def _check_round_is_seen(swarm: Swarm, name: str) -> None:
    """`muster-peer status` shows all five phases of a committed round (a member that is asked in
    before its own work is done has no FORM), and what went to and came from each of the others.
    """
    home = str(swarm.directory / "homes" / name)
    seen = swarm.run_peer_cli("status", "--home", home)
    committed = [one for one in seen["attempts"] if one["outcome"] == AttemptOutcome.COMMITTED]
    phases = [{span["phase"] for span in one["spans"]} for one in committed]
    assert set(ATTEMPT_PHASES) in phases, seen["attempts"]
    assert seen["peer_id"] not in seen["bytes_by_peer"] and len(seen["bytes_by_peer"]) >= 2
    assert all(sent > 0 and received > 0 for sent, received in seen["bytes_by_peer"].values())


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
    swarm.wait(
        lambda: swarm.status().get("leases_by_state", {}).get("EXPIRED", 0) > 0,
        "its leases expire",
        40,
    )
    for pid in pids:
        _signal(pid, signal.SIGCONT)
    credited = _credited(swarm, "peer-1")
    swarm.wait(lambda: _credited(swarm, "peer-1") > credited, "the continued peer works on", 40)
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


def test_a_home_that_fills_up(swarm: Swarm, corpus: Path) -> None:
    """The peer says so and leaves; nobody waits for it."""
    (swarm.directory / "homes").mkdir()
    with small_disk(swarm.directory / "homes/peer-0", 64 * 1024) as disk:
        start(swarm, corpus, num_peers=2, budget_tokens=60_000)
        fill(disk)
        leaving = swarm.peers["peer-0"]
        assert leaving.popen.wait(timeout=60) == 4, leaving.tail()
        said = leaving.log.read_text(errors="replace")
        assert "LEFT: cannot write" in said and "the disk is full" in said, said
        listed = json.loads(swarm.run_cli("peers", "--data-dir", str(swarm.data_dir), "--json"))
        states = {peer["name"]: peer["state"] for peer in listed["peers"]}
        assert states["peer-0"] == "LEFT", states
        check_books(swarm, swarm.wait_for_end(120))
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


def _credited(swarm: Swarm, name: str) -> int:
    """Tokens that the coordinator has credited to a peer."""
    by_peer = swarm.status().get("credited_tokens_by_peer", {})
    return int(by_peer.get(_peer_id(swarm, name), 0))


def _peer_id(swarm: Swarm, name: str) -> str:
    return str(swarm.peer_status(name).get("peer_id", ""))


def _signal(pid: int, sent: signal.Signals) -> None:
    os.kill(pid, sent)
