"""`plan --pool live`: the peers of a real swarm, as they were measured, become the pool."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from coordinator.cli.perform import look
from coordinator.operations.pool import PoolFound, live_pool
from coordinator.operations.requests_admin import PoolRequest
from protos.contract.errors import MusterError
from protos.contract.run_spec import RunSpec
from tests.e2e.harness import ROOT, Swarm, running_swarm

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240), pytest.mark.xdist_group("e2e")]


def measured_pool(swarm: Swarm) -> PoolFound | None:
    """The pool once both peers have a speed and have averaged a round."""
    try:
        found: PoolFound = look(swarm.data_dir, live_pool, PoolRequest())
    except MusterError:
        return None
    return found if len(found.pool.peers) == 2 and not found.notes else None


def plan(swarm: Swarm, *more: str) -> dict[str, Any]:
    text = swarm.run_cli(
        "plan", "--pool", "live", "--deadline", "1d", "--data-dir", str(swarm.data_dir), "--json",
        *more,
    )  # fmt: skip
    return dict(json.loads(text))


def test_the_measured_peers_of_a_swarm_are_planned_for(tmp_path: Path) -> None:
    with running_swarm(tmp_path) as swarm:
        dataset = tmp_path / "dataset"
        swarm.run_cli(
            "corpus", "build", str(ROOT / "coordinator"), "--vocab-size", "1024", "--out",
            str(dataset), timeout_seconds=120,
        )  # fmt: skip
        swarm.start_coordinator()
        swarm.create_run(dataset, budget_tokens=1_500_000, batch_tokens=2048, num_peers=2)
        for name in ("anna", "ben"):
            swarm.start_peer(name)
        swarm.wait(lambda: measured_pool(swarm), "both peers are measured", 120)
        found = measured_pool(swarm)
        spec_path = tmp_path / "planned.toml"
        said = plan(
            swarm, "--dataset", str(dataset), "--seq-len", "64", "--write-spec", str(spec_path)
        )
        assert found is not None and all(peer.flop_per_second > 1e6 for peer in found.pool.peers)
        day = sum(peer.flop_per_second for peer in found.pool.peers) * 86_400
        assert 0.02 * day < said["compute_flop"] < 5 * day
        assert said["strategy"] is not None and math.isfinite(said["calendar_seconds"])
        assert all(choice["reason"] for choice in said["choices"])
        swarm.run_cli(
            "run", "create", "--data-dir", str(swarm.data_dir), "--dataset", str(dataset), "--spec",
            str(spec_path), "--run-id", "planned",
        )  # fmt: skip
        spec = RunSpec.from_toml(spec_path.read_text())
        assert spec.budget_tokens > 0 and spec.model.seq_len == 64
