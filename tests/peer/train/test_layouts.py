"""The trainer process as the leader of local ranks: what it offers is what one process would."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from protos.contract.run_spec import StrategySpec
from tests.e2e.harness import is_alive, wait_until
from tests.peer.model.tiny import SPEC
from tests.peer.train.harness import trainer_process, windows_of

pytestmark = pytest.mark.slow
SEQ_LEN = SPEC.model.seq_len
DILOCO = replace(
    SPEC,
    strategy=StrategySpec(name="diloco", inner_steps=4, inner_batch_tokens=2 * SEQ_LEN),
)


def local_ranks(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children]


def test_gradients_of_two_rounds_and_a_stop(tmp_path: Path) -> None:
    with trainer_process(tmp_path) as daemon:
        fields = {"devices": "cpu:4", "layout": "tp=2,pp=2", "probe_interval_seconds": 0.001}
        daemon.send("configure", **daemon.configuration | fields)
        ready = daemon.expect("ready")
        assert ready["num_ranks"] == 4 and ready["layout"] == "pp=2,tp=2"
        assert "guessed" in ready["reason"] and "fp32" in ready["reason"]
        daemon.announce(round_windows=7)
        daemon.give(daemon.lease(1, 0, 10), daemon.lease(2, 10, 40))
        for outer_step, windows in enumerate([[(0, 7)], [(7, 10), (10, 14)]]):
            contribution = daemon.expect("contribution_ready")
            assert contribution["outer_step"] == outer_step
            assert windows_of(contribution) == windows
            expected = daemon.mean_gradient(contribution)
            error = np.linalg.norm(daemon.vectors.contribution - expected)
            assert error < 0.05 * np.linalg.norm(expected)  # perhaps bf16
            daemon.commit()
            daemon.end_round("COMMITTED", round_windows=7)
        looks = [message["layers"] for message in daemon.seen if message["kind"] == "layer_stats"]
        names = ["embedding", *map(str, range(SPEC.model.num_layers)), "norm"]
        assert [layer["layer"] for layer in looks[0]] == names and len(looks) >= 2
        assert all(0 < layer["gradient_rms"] < layer["gradient_max"] for layer in looks[-1])
        assert daemon.process is not None
        ranks = local_ranks(daemon.process.pid)
        assert len(ranks) == 3
        daemon.send("evaluate", duty_id="d", eval_tokens=0, heldout_paths=[str(daemon.chunk_path)])
        assert daemon.expect("evaluation")["num_tokens"] == 40 * SEQ_LEN
        daemon.send("stop")
        assert daemon.process.wait(20) == 0
        wait_until(
            lambda: not any(is_alive(rank) for rank in ranks),
            what="the ranks end with their leader",
            deadline_seconds=20,
        )


def test_diloco_on_two_ranks_learns_and_a_lost_rank_is_reported(tmp_path: Path) -> None:
    with trainer_process(tmp_path, spec=DILOCO) as daemon:
        fields = {"devices": "cpu:2", "layout": "tp=2"}
        daemon.send("configure", **daemon.configuration | fields)
        daemon.announce(round_windows=8)
        daemon.give(daemon.lease(1, 0, 20), daemon.lease(2, 20, 40))
        losses_nats = []
        for _ in range(4):
            contribution = daemon.expect("contribution_ready")
            losses_nats.append(contribution["loss_nats"])
            assert daemon.vectors.contribution.any()
            daemon.commit()
            daemon.end_round("COMMITTED", round_windows=8)
        assert losses_nats[-1] < losses_nats[0]
        daemon.expect("contribution_ready")
        assert daemon.process is not None
        (rank,) = local_ranks(daemon.process.pid)
        os.kill(rank, signal.SIGKILL)
        daemon.commit()
        daemon.end_round("COMMITTED", round_windows=8)
        with pytest.raises(AssertionError, match="signal 9") as failed:
            daemon.expect("contribution_ready")
        assert "'lost_devices': [1]" in str(failed.value)
        assert "'is_out_of_memory': False" in str(failed.value)
        assert daemon.process.wait(20) != 0
