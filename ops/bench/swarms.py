"""A coordinator and peers as a user would start them, for benchmarks: the end-to-end tests' harness
with default settings.

Differs from the tests in three ways: the default model instead of a tiny one, intervals as
deployed, and checkpoints and evaluations only at the end, so that a figure is about training alone.
Import after `shared.use_project_python`.
"""

import json
import sys
from pathlib import Path
from typing import Any

from shared import ROOT, say

from tests.e2e.harness import Swarm

_QUIET_SETTINGS = {
    "MUSTER_COORDINATOR_CHECKPOINT_INTERVAL_SECONDS": "3600",
    "MUSTER_COORDINATOR_NUM_EVALUATIONS": "1",
    "MUSTER_COORDINATOR_RENDEZVOUS_PORT": "0",
}
EVAL_TOKENS = 2048


class BenchSwarm(Swarm):
    """See the module. Use inside `tests.e2e.harness.running_swarm`'s kind of try/finally: `stop` at
    the end.
    """

    def start_coordinator(self, *, port: int = 0) -> None:
        """Start `muster-coordinator serve` with deployed intervals and wait until it answers."""
        info = self.data_dir / "coordinator.json"
        info.unlink(missing_ok=True)
        self.coordinator = self.start(
            "coordinator",
            "serve",
            *("--data-dir", str(self.data_dir), "--host", "127.0.0.1", "--port", str(port)),
            *("--http-port", "0"),
            module="coordinator.cli.main",
            **_QUIET_SETTINGS,
        )
        self.wait(
            lambda: info.exists() and self.read("/healthz") is not None,
            "the coordinator serves",
            60,
        )

    def create_default_run(
        self, dataset: Path, *, batch_tokens: int, budget_tokens: int, num_peers: int
    ) -> None:
        """Create a run of the default model and a join string for everybody."""
        self.run_cli(
            *("run", "create", "--data-dir", str(self.data_dir), "--dataset", str(dataset)),
            *("--set", f"strategy.global_batch_tokens={batch_tokens}"),
            *("--set", f"data.eval_tokens={EVAL_TOKENS}", "--set", "data.max_data_passes=1000"),
            *("--budget-tokens", str(budget_tokens), "--min-peers", str(num_peers), "--json"),
        )
        token = json.loads(
            self.run_cli("token", "create", "--data-dir", str(self.data_dir), "--json")
        )
        self.join_string = token["join_string"]

    def steps(self) -> list[dict[str, Any]]:
        """Certified outer steps, oldest first."""
        runs = self.read("/api/v1/runs")
        if not runs:
            return []
        run_id = (runs["runs"] if isinstance(runs, dict) else runs)[0]["run_id"]
        series = self.read(f"/api/v1/runs/{run_id}/series?max_points=100000") or {}
        return list(series.get("steps", []))


def build_default_dataset(directory: Path) -> Path:
    """The embedded corpus, as `up` builds it; a minute of work, so share it between repetitions."""
    dataset = directory / "dataset"
    if not (dataset / "manifest.json").exists():
        say("building the embedded corpus")
        Swarm(directory).run_cli(
            "corpus", "build", "stdlib:", "--out", str(dataset), timeout_seconds=600
        )
    return dataset


def write_default_spec(dataset: Path, path: Path, *, batch_tokens: int) -> None:
    """The RunSpec of `create_default_run` in wire form, for processes that train without a
    swarm.
    """
    from coordinator.cli.spec_options import build_spec
    from coordinator.corpus.build import load_manifest

    spec = build_spec(
        load_manifest(dataset),
        spec_path=None,
        model=(),
        settings=(f"strategy.global_batch_tokens={batch_tokens}", "data.max_data_passes=1000"),
        budget_tokens=None,
        seed=None,
    )
    path.write_bytes(spec.to_wire())


def python_command(script: str, *arguments: str) -> list[str]:
    """Command line of another file of this directory."""
    return [sys.executable, str(ROOT / "ops" / "bench" / script), *arguments]
