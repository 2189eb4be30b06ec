"""One swarm of nodes of different layouts: one process, tensor parallel, a pipeline, both at once;
diloco, whose inner steps each node makes on its own shards.

Their anchors are the same bits after every outer step, and a node that loses a local rank plans
anew for what is left, as the same peer. Layouts under sync: tests/peer/train/test_layouts.py.
"""

import contextlib
import os
import re
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
DILOCO = (
    "strategy.name=diloco",
    "strategy.inner_steps=2",
    "strategy.inner_batch_tokens=256",
)
STATE = re.compile(r"incarnation=(\d+) outer_step=(\d+) digest=([0-9a-f]{16})")


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


def digests_of(swarm: Swarm, name: str) -> dict[tuple[int, int], str]:
    """Digest of each state that a member has held, by its incarnation and outer step; anchors and
    outer moments are in it.
    """
    log = swarm.peers[name].log.read_text(errors="replace")
    found = [((int(life), int(step)), digest) for life, step, digest in STATE.findall(log)]
    assert len(set(found)) == len(dict(found)), f"{name} held two states of one step"
    return dict(found)


def check_anchors(swarm: Swarm, *, last_step: int) -> None:
    """After every outer step all members that held its state held the same bits. Who was late may
    have skipped a step, so most are asked of everybody, and each of two at least.
    """
    digests = {name: digests_of(swarm, name) for name in LAYOUTS}
    incarnation = max(life for found in digests.values() for life, _ in found)
    num_held_by_all = 0
    for step in range(last_step + 1):
        place = (incarnation, step)
        held = {name: found[place] for name, found in digests.items() if place in found}
        assert len(held) >= 2 and len(set(held.values())) == 1, f"after outer step {step}: {held}"
        num_held_by_all += len(held) == len(LAYOUTS)
    assert num_held_by_all >= 0.75 * last_step >= 10, digests


def test_nodes_of_all_layouts_train_as_one_and_outlive_lost_ranks(
    swarm: Swarm, tmp_path: Path
) -> None:
    dataset = tmp_path / "dataset"
    swarm.run_cli(
        "corpus", "build", str(ROOT / "protos"), str(ROOT / "peer"), "--out", str(dataset),
        timeout_seconds=120,
    )  # fmt: skip
    swarm.start_coordinator()
    swarm.create_run(
        dataset,
        budget_tokens=120_000,
        batch_tokens=2048,
        num_peers=len(LAYOUTS),
        settings=DILOCO,
    )
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
    check_anchors(swarm, last_step=status["outer_step"])
    assert {name: swarm.peer_status(name)["peer_id"] for name in LAYOUTS} == identity
    assert status["num_peers_seen"] == len(LAYOUTS)
