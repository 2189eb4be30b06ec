"""One swarm of nodes of different layouts: one process, tensor parallel, a pipeline, both at once.

Their anchors are the same bits after every outer step, and a node that loses a local rank plans
anew for what is left, as the same peer.
"""

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.harness import ROOT, Process, Swarm, running_swarm, wait_until
from tests.e2e.test_faults import check_books

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
LAYOUTS = {
    "one": (),
    "tensor": ("--devices", "cpu:2", "--layout", "tp=2"),
    "pipeline": ("--devices", "cpu:2", "--layout", "pp=2"),
    "both": ("--devices", "cpu:4", "--layout", "tp=2,pp=2"),
}


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


def start_node(swarm: Swarm, name: str) -> Process:
    """`muster-peer join` with the layout of this name."""
    home = swarm.directory / "homes" / name
    swarm.peers[name] = swarm.start(
        name, "join", swarm.join_string, "--name", name, "--home", str(home), "--threads", "1",
        "--listen-host", "127.0.0.1", *LAYOUTS[name], module="peer.cli.main",
    )  # fmt: skip
    return swarm.peers[name]


def local_ranks(process: Process) -> list[int]:
    """Ids of a peer's local ranks other than their leader."""
    found = []
    for pid in process.tree():
        with contextlib.suppress(OSError):
            if b"peer.parallel.rank" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


def credited(swarm: Swarm, name: str) -> int:
    """Tokens that the coordinator has credited to a peer."""
    peer_id = swarm.peer_status(name).get("peer_id", "")
    return int(swarm.status().get("credited_tokens_by_peer", {}).get(peer_id, 0))


def test_nodes_of_all_layouts_train_as_one_and_outlive_lost_ranks(
    swarm: Swarm, tmp_path: Path
) -> None:
    dataset = tmp_path / "dataset"
    swarm.run_cli(
        "corpus", "build", str(ROOT / "protos"), str(ROOT / "peer"), "--out", str(dataset),
        timeout_seconds=120,
    )  # fmt: skip
    swarm.start_coordinator()
    swarm.create_run(dataset, budget_tokens=120_000, batch_tokens=2048, num_peers=len(LAYOUTS))
    for name in LAYOUTS:
        start_node(swarm, name)
    swarm.wait(
        lambda: all(credited(swarm, name) > 0 for name in LAYOUTS), "everybody is credited", 150
    )
    assert swarm.status()["state_digests_equal"] is True
    assert [len(local_ranks(swarm.peers[name])) for name in LAYOUTS] == [0, 1, 1, 3]

    before = {name: credited(swarm, name) for name in LAYOUTS}
    identity = {name: swarm.peer_status(name)["peer_id"] for name in LAYOUTS}
    (victim,) = local_ranks(swarm.peers["tensor"])
    os.kill(victim, signal.SIGKILL)
    (frozen,) = local_ranks(swarm.peers["pipeline"])
    os.kill(frozen, signal.SIGSTOP)
    for name, words in (
        ("tensor", "was ended by signal 9"),
        ("pipeline", "does not answer"),
    ):
        swarm.wait(lambda name=name, words=words: words in swarm.peers[name].tail(), words, 60)
        swarm.wait(lambda name=name: credited(swarm, name) > before[name], f"{name} is back", 90)
        assert local_ranks(swarm.peers[name]) == [], "one device is left"
    status = swarm.wait_for_end(200)
    check_books(swarm, status)
    assert {name: swarm.peer_status(name)["peer_id"] for name in LAYOUTS} == identity
    assert status["num_peers_seen"] == len(LAYOUTS)
