"""The trainer over a real socket pair and real shared memory: rounds, drops, duties, stops."""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file

from peer.ipc import ChannelClosed
from peer.model.objectives import Examples
from peer.parallel.devices import is_out_of_memory
from peer.parallel.faults import LocalRankError
from peer.shared_vectors import StatePosition
from peer.train.__main__ import run_trainer
from peer.train.bad_batches import MAX_KEPT, BadBatches
from protos.contract.errors import RunFailedError
from protos.contract.run_spec import StrategySpec
from tests.peer.model.tiny import SPEC
from tests.peer.train.harness import FakeDaemon, trainer_process, trainer_thread, windows_of


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def drain(daemon: FakeDaemon) -> None:
    """Read until the trainer has closed its end."""
    with pytest.raises(ChannelClosed):
        while True:
            daemon.seen.append(daemon.channel.receive())


def test_a_process_from_configure_to_stop(tmp_path: Path) -> None:
    with trainer_process(tmp_path) as daemon:
        changes = {"max_micro_batch_sequences": 3, "probe_interval_seconds": 0.001}
        daemon.send("configure", **daemon.configuration | changes)
        ready = daemon.expect("ready")
        assert ready["micro_batch_sequences"] == 3, "bounded, as after an out of memory"
        assert ready["num_threads"] == 1 and ready["device"].startswith("cpu")
        daemon.announce(round_windows=8)
        assert daemon.expect("need_leases")["wanted_tokens"] == 2 * 8 * 12
        daemon.give(daemon.lease(1, 0, 10), daemon.lease(2, 10, 40))
        losses_nats = []
        for outer_step in range(3):
            contribution = daemon.expect("contribution_ready")
            assert contribution["outer_step"] == outer_step
            assert contribution["num_tokens"] == 8 * 12
            expected = daemon.mean_gradient(contribution)
            assert relative_error(daemon.vectors.contribution, expected) < 0.05  # perhaps bf16
            losses_nats.append(contribution["loss_nats"])
            daemon.commit()
            if outer_step == 1:
                daemon.send(
                    "evaluate",
                    duty_id="d1",
                    eval_tokens=0,
                    heldout_paths=[str(daemon.chunk_path)],
                )
            daemon.end_round("COMMITTED", round_windows=8)
        assert losses_nats[2] < losses_nats[0]
        daemon.expect("contribution_ready")
        evaluation = next(m for m in daemon.seen if m["kind"] == "evaluation")
        assert evaluation["duty_id"] == "d1" and evaluation["outer_step"] in (1, 2)
        assert evaluation["num_tokens"] == 40 * 12 and evaluation["num_bytes"] > 480
        assert 0 < evaluation["total_nats"] / evaluation["num_tokens"] < 6
        progress = next(m for m in daemon.seen if m["kind"] == "progress")
        assert progress["tokens_per_second"] > 0 and progress["trained_tokens"] > 0
        probed = [m["layers"] for m in daemon.seen if m["kind"] == "layer_stats"]
        assert [layer["layer"] for layer in probed[0]] == ["embedding", "0", "1", "norm"]
        assert all(layer["gradient_rms"] > 0 for layer in probed[-1])
        turns = [m["longest_turn_seconds"] for m in daemon.seen if m["kind"] == "turn"]
        assert turns and 0.0 < max(turns) < 60.0, "the loop is heard to come round"
        begin_seconds = time.monotonic()
        daemon.send("stop")
        assert daemon.process is not None and daemon.process.wait(10) == 0
        assert time.monotonic() - begin_seconds < 3
        drain(daemon)
        # Lease 2 is partly in a contribution that may still be committed: the round decides.
        assert not [m for m in daemon.seen if m["kind"] == "released"]


def test_a_lost_device_is_told_from_other_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    class Link:
        def receive(self, *, wait_seconds: float) -> list[dict[str, object]]:
            return [{"kind": "configure", "device": "cuda:3", "lost_devices": []}]

    def end(words: str) -> BaseException:
        def fail(*_: object, **__: object) -> None:
            raise torch.AcceleratorError(words)

        monkeypatch.setattr("peer.train.__main__.build_loop", fail)
        with pytest.raises(RuntimeError) as raised:
            run_trainer(Link(), None)  # type: ignore[arg-type]
        return raised.value

    lost = end("CUDA error: uncorrectable ECC error encountered")
    assert isinstance(lost, LocalRankError) and lost.lost_devices == (0,)
    assert not isinstance(end("CUDA error: misaligned address"), LocalRankError)


def test_torchs_words_for_out_of_memory_are_known() -> None:
    """A tensor that no machine can hold, so that the words are torch's own."""
    with pytest.raises(RuntimeError) as failure:
        torch.empty(2**50)
    assert is_out_of_memory(failure.value)
    assert is_out_of_memory(MemoryError()) and not is_out_of_memory(RuntimeError("shapes differ"))


def test_contribution_is_the_mean_gradient_over_its_ranges(tmp_path: Path) -> None:
    with trainer_thread(tmp_path, micro_batch_sequences=3) as daemon:
        daemon.announce(round_windows=7)
        daemon.give(daemon.lease(1, 0, 5), daemon.lease(2, 20, 30))
        contribution = daemon.expect("contribution_ready")
        assert windows_of(contribution) == [(0, 5), (20, 22)]
        expected = daemon.mean_gradient(contribution)
        assert relative_error(daemon.vectors.contribution, expected) < 1e-5


def test_resync_drops_the_work_and_returns_begun_leases_only(tmp_path: Path) -> None:
    with trainer_thread(tmp_path) as daemon:
        daemon.announce(round_windows=4)
        daemon.give(daemon.lease(1, 0, 2), daemon.lease(2, 2, 6), daemon.lease(3, 6, 12))
        daemon.expect("contribution_ready")
        daemon.write_state(0, 5, daemon.vectors.params * 0.9)
        daemon.end_round("RESYNC", round_windows=4, reason="another step won")
        released = daemon.expect("released")
        assert released["lease_numbers"] == [1, 2] and "another step won" in released["reason"]
        contribution = daemon.expect("contribution_ready")
        assert contribution["outer_step"] == 5 and windows_of(contribution) == [(6, 10)]
        expected = daemon.mean_gradient(contribution)
        assert relative_error(daemon.vectors.contribution, expected) < 1e-5


def test_late_news_of_a_state_is_not_the_verdict_on_an_offer_made_on_it(tmp_path: Path) -> None:
    """The trainer reads the state of step 2 with the outcome of step 1, works and offers on it;
    what the daemon said of step 2 meanwhile comes after that.
    """
    with trainer_thread(tmp_path) as daemon:
        daemon.announce(round_windows=4)
        daemon.give(daemon.lease(1, 0, 4), daemon.lease(2, 4, 8), daemon.lease(3, 8, 12))
        assert daemon.expect("contribution_ready")["offer_number"] == 1
        daemon.commit()
        daemon.commit()
        daemon.end_round("COMMITTED", round_windows=4)
        contribution = daemon.expect("contribution_ready")
        assert (contribution["outer_step"], contribution["offer_number"]) == (2, 2)
        offered = daemon.vectors.contribution.copy()
        daemon.end_round("RESYNC", round_windows=4, reason="came without us", offer_number=0)
        daemon.end_round("RESYNC", round_windows=4, reason="for the one before", offer_number=1)
        daemon.send("evaluate", duty_id="d", eval_tokens=0, heldout_paths=[str(daemon.chunk_path)])
        daemon.expect("evaluation")  # the loop has come round: it has seen both
        assert not [m for m in daemon.seen if m["kind"] == "released"]
        assert np.array_equal(daemon.vectors.contribution, offered), "the round still reads it"
        daemon.commit()
        daemon.end_round("COMMITTED", round_windows=4)
        assert windows_of(daemon.expect("contribution_ready")) == [(8, 12)]


def test_a_committed_round_keeps_the_rest_of_a_lease(tmp_path: Path) -> None:
    with trainer_thread(tmp_path) as daemon:
        daemon.announce(round_windows=4)
        daemon.give(daemon.lease(1, 0, 8))
        assert windows_of(daemon.expect("contribution_ready")) == [(0, 4)]
        daemon.commit()
        daemon.end_round("COMMITTED", round_windows=3)
        assert windows_of(daemon.expect("contribution_ready")) == [(4, 7)]


def test_news_of_the_same_state_changes_only_the_budget(tmp_path: Path) -> None:
    with trainer_thread(tmp_path) as daemon:
        daemon.announce(round_windows=6)
        daemon.give(daemon.lease(1, 0, 2))
        daemon.expect("progress")
        daemon.end_round("RESYNC", round_windows=3, reason="new directive")
        daemon.give(daemon.lease(2, 2, 8))
        contribution = daemon.expect("contribution_ready")
        assert windows_of(contribution) == [(0, 2), (2, 3)]
        assert not [m for m in daemon.seen if m["kind"] == "released"]


def test_a_state_of_the_same_step_that_replaces_another_is_trained_on_anew(
    tmp_path: Path,
) -> None:
    with trainer_thread(tmp_path) as daemon:
        daemon.announce(round_windows=6)
        daemon.give(daemon.lease(1, 0, 2))
        daemon.expect("progress")
        daemon.write_state(0, 0, daemon.vectors.params * 0.9, state_digest=b"other" + bytes(27))
        daemon.end_round("RESYNC", round_windows=4, reason="it was wrong", offer_number=0)
        assert daemon.expect("released")["lease_numbers"] == [1]
        daemon.give(daemon.lease(2, 2, 8))
        contribution = daemon.expect("contribution_ready")
        assert windows_of(contribution) == [(2, 6)]
        assert contribution["state_digest"] == b"other" + bytes(27)
        expected = daemon.mean_gradient(contribution)
        assert relative_error(daemon.vectors.contribution, expected) < 1e-5


def test_out_of_leases_contributes_what_there_is_and_then_idles(tmp_path: Path) -> None:
    with trainer_thread(tmp_path) as daemon:
        daemon.announce(round_windows=10)
        daemon.give(daemon.lease(1, 0, 3))
        daemon.send("no_more_leases", is_exhausted=False)
        assert daemon.expect("contribution_ready")["num_tokens"] == 3 * 12
        daemon.commit()
        daemon.end_round("COMMITTED", round_windows=10)
        assert daemon.expect("idle")["is_idle"] is True
        daemon.commit()
        daemon.end_round("COMMITTED", round_windows=10)
        daemon.give(daemon.lease(2, 3, 20))
        assert daemon.expect("idle")["is_idle"] is False
        assert daemon.expect("contribution_ready")["outer_step"] == 2


def test_a_new_incarnation_begins_leases_anew(tmp_path: Path) -> None:
    with trainer_thread(tmp_path) as daemon:
        daemon.announce(round_windows=4)
        daemon.give(daemon.lease(5, 0, 2), daemon.lease(6, 2, 3))
        daemon.expect("progress")
        daemon.give(daemon.lease(1, 10, 20, incarnation=1))
        daemon.write_state(1, 0, daemon.vectors.params)
        daemon.announce(round_windows=4)
        contribution = daemon.expect("contribution_ready")
        assert contribution["incarnation"] == 1 and windows_of(contribution) == [(10, 14)]


def test_lost_leases_are_not_trained(tmp_path: Path) -> None:
    with trainer_thread(tmp_path) as daemon:
        daemon.send("pause", is_paused=True)
        daemon.announce(round_windows=4)
        daemon.give(daemon.lease(1, 0, 10), daemon.lease(2, 10, 20))
        daemon.send("lost_leases", lease_numbers=[1])
        daemon.send("pause", is_paused=False)
        assert windows_of(daemon.expect("contribution_ready")) == [(10, 14)]


def test_a_damaged_chunk_costs_its_lease_only(tmp_path: Path) -> None:
    with trainer_thread(tmp_path) as daemon:
        daemon.announce(round_windows=4)
        bad = daemon.lease(1, 0, 10) | {"path": str(tmp_path / "missing")}
        daemon.give(bad, daemon.lease(2, 10, 20))
        assert daemon.expect("released")["lease_numbers"] == [1]
        assert windows_of(daemon.expect("contribution_ready")) == [(10, 14)]


def test_gradients_that_stay_non_finite_end_the_trainer(tmp_path: Path) -> None:
    with trainer_thread(tmp_path) as daemon:
        params = daemon.vectors.params.copy()
        params[:100] = np.nan
        daemon.write_state(0, 0, params)
        daemon.announce(round_windows=4)
        daemon.give(*(daemon.lease(number, 2 * number, 2 * number + 4) for number in range(1, 8)))
        drain(daemon)
        released = [m["lease_numbers"] for m in daemon.seen if m["kind"] == "released"]
        assert released == [[1], [2], [3], [4], [5]]
        assert not daemon.vectors.contribution.any()
        error = daemon.end_reasons[0]
        assert isinstance(error, RunFailedError) and "5 in a row" in str(error)
        kept = sorted((tmp_path / "bad").iterdir())
        told = [m["kept"] for m in daemon.seen if m["kind"] == "bad_batch"]
        assert [str(path) for path in kept] == told and len(told) == 5
        assert kept[-1].name in error.remedy
        batch = load_file(kept[0])
        inputs_BT, labels_BT = batch["inputs_BT"], batch["labels_BT"]
        assert inputs_BT.shape == (2, SPEC.model.seq_len)
        steps = (labels_BT - inputs_BT) % SPEC.model.vocab_size
        assert (steps == 7).all(), "the chunk's token i is 7 i"


def test_only_the_newest_bad_batches_are_kept(tmp_path: Path) -> None:
    position = StatePosition(
        incarnation=1, outer_step=2, schedule_tokens=3, directive_number=1,
        cooldown_start_tokens=4, budget_tokens=5,
    )  # fmt: skip
    tokens_BT = np.zeros((1, 4), np.int64)
    examples = Examples(inputs_BT=tokens_BT, labels_BT=tokens_BT)
    bad = BadBatches(tmp_path / "bad")
    paths = [
        bad.keep(examples, total_nats=float("nan"), base=position, how="bf16 native")
        for _ in range(MAX_KEPT + 3)
    ]
    assert sorted(map(str, (tmp_path / "bad").iterdir())) == paths[3:]
    with safe_open(paths[-1], framework="np") as file:
        found = file.metadata()
    assert found["outer_step"] == "2" and found["total_nats"] == "nan"
    (tmp_path / "file").write_text("")
    nowhere = BadBatches(tmp_path / "file" / "bad")
    kept = nowhere.keep(examples, total_nats=0.0, base=position, how="bf16 native")
    assert kept.startswith("nowhere: ")


def test_stop_releases_what_is_not_in_a_round(tmp_path: Path) -> None:
    with trainer_thread(tmp_path) as daemon:
        daemon.announce(round_windows=20)
        daemon.give(daemon.lease(1, 0, 2), daemon.lease(2, 2, 4))
        daemon.expect("progress")
        daemon.send("stop")
        assert daemon.expect("released")["lease_numbers"] in ([1, 2], [2])
        drain(daemon)
        assert daemon.end_reasons == ["asked to stop"]


def test_the_loop_ends_when_the_daemon_is_gone(tmp_path: Path) -> None:
    with trainer_thread(tmp_path) as daemon:
        daemon.announce(round_windows=4)
        daemon.expect("ready")
    assert daemon.end_reasons == ["the daemon is gone"]


def test_an_evaluation_that_cannot_be_done_says_why(tmp_path: Path) -> None:
    with trainer_thread(tmp_path) as daemon:
        daemon.announce(round_windows=4)
        daemon.send(
            "evaluate", duty_id="d2", eval_tokens=0, heldout_paths=[str(tmp_path / "nothing")]
        )
        evaluation = daemon.expect("evaluation")
        assert evaluation["num_tokens"] == 0 and "nothing" in evaluation["reason"]


def test_diloco_trains_on_while_its_fragment_travels(tmp_path: Path) -> None:
    """Two inner steps a round, one of them may overlap; the state comes back in between."""
    seq_len = SPEC.model.seq_len
    strategy = StrategySpec(
        name="diloco", inner_steps=4, num_fragments=2, inner_batch_tokens=2 * seq_len,
        overlap_inner_steps=1, mix_ratio=0.5,
    )  # fmt: skip
    with trainer_thread(tmp_path, spec=replace(SPEC, strategy=strategy)) as daemon:
        daemon.announce(round_windows=4)
        daemon.give(daemon.lease(1, 0, 9), daemon.lease(2, 9, 40))
        contribution = daemon.expect("contribution_ready")
        assert windows_of(contribution) == [(0, 4)] and contribution["outer_step"] == 0
        frozen = daemon.vectors.contribution.copy()
        assert frozen.any() and np.isfinite(frozen).all()
        losses_nats = [contribution["loss_nats"]]
        for outer_step, windows in enumerate([[(4, 8)], [(8, 9), (9, 12)], [(12, 16)]], start=1):
            daemon.commit()
            daemon.end_round("COMMITTED", round_windows=4)
            contribution = daemon.expect("contribution_ready")
            assert contribution["outer_step"] == outer_step
            assert windows_of(contribution) == windows
            losses_nats.append(contribution["loss_nats"])
        assert losses_nats[-1] < losses_nats[0]
        daemon.write_state(0, 9, daemon.vectors.params)
        daemon.end_round("RESYNC", round_windows=4, reason="left out")
        released = daemon.expect("released")
        assert released["lease_numbers"] == [2]  # what was offered and what overlapped
