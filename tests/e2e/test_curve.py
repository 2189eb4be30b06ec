"""The loss curve of a real swarm beside one process that trains the same run alone."""

from pathlib import Path

import numpy as np
import pytest

from coordinator.cli.spec_options import build_spec
from coordinator.corpus.build import load_manifest
from peer.train.reference import ReferenceRun
from tests.e2e.harness import ROOT, TINY_MODEL, Swarm, running_swarm

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180), pytest.mark.xdist_group("e2e")]

BUDGET_TOKENS = 60_000
BATCH_TOKENS = 2048
EVAL_TOKENS = 8192
MAX_RELATIVE_ERROR = 0.01


def swarm_curve(swarm: Swarm) -> list[tuple[int, float]]:
    """(schedule tokens, held-out nats) of every evaluation that the swarm's members made."""
    run_id = swarm.read("/api/v1/runs")["runs"][0]["run_id"]
    series = swarm.read(f"/api/v1/runs/{run_id}/series?max_points=100000")
    return [(point["schedule_tokens"], point["loss_nats"]) for point in series["evaluations"]]


def test_held_out_loss_follows_one_process_at_equal_tokens(tmp_path: Path) -> None:
    """Two peers, real rounds: every evaluation of the run within 1 % of one process's curve.

    One process takes windows in schedule order, a swarm whichever leases are at hand, and its
    rounds end a few windows earlier or later: the curves are close, not equal.
    """
    settings = (
        f"strategy.global_batch_tokens={BATCH_TOKENS}",
        "schedule.lr_warmup_tokens=4096",
        f"data.eval_tokens={EVAL_TOKENS}",
    )
    with running_swarm(tmp_path) as swarm:
        dataset = tmp_path / "dataset"
        sources = [str(ROOT / name) for name in ("protos", "coordinator", "peer")]
        swarm.run_cli("corpus", "build", *sources, "--out", str(dataset), timeout_seconds=120)
        swarm.start_coordinator()
        swarm.create_run(
            dataset,
            budget_tokens=BUDGET_TOKENS,
            batch_tokens=BATCH_TOKENS,
            num_peers=2,
            eval_tokens=EVAL_TOKENS,
        )
        for name in ("anna", "ben"):
            swarm.start_peer(name)
        status = swarm.wait_for_end(120)
        curve = swarm_curve(swarm)
    spec = build_spec(
        load_manifest(dataset),
        spec_path=None,
        model=(TINY_MODEL,),
        settings=settings,
        budget_tokens=BUDGET_TOKENS,
        seed=None,
    )
    assert spec.run_digest == status["run_digest"]

    alone = ReferenceRun(spec, dataset)
    tokens, nats = [0], [alone.evaluate(eval_tokens=EVAL_TOKENS).loss_nats]
    while not alone.is_finished:
        alone.advance()
        tokens.append(alone.schedule_tokens)
        nats.append(alone.evaluate(eval_tokens=EVAL_TOKENS).loss_nats)
    expected = np.interp([at for at, _ in curve], tokens, nats)
    errors = [
        abs(measured / wanted - 1) for (_, measured), wanted in zip(curve, expected, strict=True)
    ]
    shown = [
        f"{at} tokens: {measured:.4f}, alone {wanted:.4f}"
        for (at, measured), wanted in zip(curve, expected, strict=True)
    ]
    assert len(curve) >= 5, shown
    assert curve[0][1] - curve[-1][1] > 1.0, shown
    assert max(errors) <= MAX_RELATIVE_ERROR, shown
