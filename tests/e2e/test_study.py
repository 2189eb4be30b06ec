"""A study on a real swarm: two peers train tiny trials, one is killed in the middle, every trial is
counted once, and the fit reads them.
"""

import csv
import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.harness import ROOT, Swarm, running_swarm, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240), pytest.mark.xdist_group("e2e")]

STUDY = (
    "--sizes", "4", "--min-params", "8e3", "--max-params", "6e4", "--flop", "4e10", "--repeats",
    "1", "--seq-len", "64", "--heldout-tokens", "2048", "--lr", "4e-3,8e-3",
)  # fmt: skip


def study_of(swarm: Swarm) -> dict[str, Any]:
    text = swarm.run_cli("study", "status", "--data-dir", str(swarm.data_dir), "--json")
    return dict(json.loads(text))


def is_killed_at_work(swarm: Swarm, name: str) -> bool:
    """Kill a peer that holds a trial; it is stopped for the look, so that it cannot finish it."""
    peer = swarm.peers[name]
    peer.kill(signal.SIGSTOP)
    holds_one = any(
        trial["state"] == "ASSIGNED" and trial["peer_name"] == name
        for trial in study_of(swarm)["trials"]
    )
    peer.kill(signal.SIGKILL if holds_one else signal.SIGCONT)
    return holds_one


def states(swarm: Swarm) -> list[str]:
    return [trial["state"] for trial in study_of(swarm)["trials"]]


def test_a_study_survives_a_killed_peer(tmp_path: Path) -> None:
    with running_swarm(tmp_path) as swarm:
        dataset = tmp_path / "dataset"
        sources = [str(ROOT / name) for name in ("protos", "coordinator")]
        swarm.run_cli(
            "corpus", "build", *sources, "--vocab-size", "257", "--out", str(dataset),
            timeout_seconds=120,
        )  # fmt: skip
        swarm.start_coordinator()
        swarm.create_run(dataset, budget_tokens=64_000, batch_tokens=2048, num_peers=2)
        data_dir = str(swarm.data_dir)
        swarm.run_cli("run", "pause", "--data-dir", data_dir, "--reason", "a study")
        swarm.run_cli("study", "create", "--data-dir", data_dir, *STUDY)
        for name in ("anna", "ben"):
            swarm.start_peer(name)
        swarm.wait(
            lambda: "DONE" in states(swarm) and is_killed_at_work(swarm, "anna"),
            "a first result, and a peer killed at work",
            120,
        )
        swarm.wait(lambda: study_of(swarm)["stage"] in ("DONE", "FAILED"), "the study is over", 150)
        found = study_of(swarm)
        assert found["stage"] == "DONE", swarm.report()
        trials = found["trials"]
        assert [trial["state"] for trial in trials] == ["DONE"] * 9
        assert len({trial["params_digest"] for trial in trials}) == 9
        assert sum(trial["num_handouts"] > 1 for trial in trials) >= 1
        assert {trial["peer_name"] for trial in trials} == {"anna", "ben"} or all(
            trial["peer_name"] == "ben" for trial in trials if trial["num_handouts"] > 1
        )
        sizes = [trial for trial in trials if trial["purpose"] == "SIZE"]
        assert len(sizes) == 4 and len({trial["learning_rate"] for trial in sizes}) == 1
        assert all(1.0 < trial["loss_nats"] < 5.0 for trial in sizes)
        table = tmp_path / "points.csv"
        fit = json.loads(
            swarm.run_cli(
                "study", "fit", "--data-dir", data_dir, "--study", found["study_id"], "--form",
                "tied", "--bootstrap", "0", "--export", str(table), "--json",
            )
        )  # fmt: skip
        assert fit["convention"] == "matmul" and fit["num_rows"] >= 12
        with table.open() as file:
            rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
        assert len(rows) == fit["num_rows"]
        swarm.stop()
        wait_until(lambda: not swarm.leftovers(), what="nothing is left", deadline_seconds=15)
        for log in [*tmp_path.glob("*.log"), *tmp_path.glob("homes/*/logs/*")]:
            assert "Traceback" not in log.read_text(errors="replace"), log.read_text()[-3000:]
