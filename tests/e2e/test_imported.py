"""A model that transformers wrote is imported, trained on by a swarm whose spec names it by digest,
on text or on answers to prompts, and exported again.
"""

import json
import shutil
from pathlib import Path

import pytest

from tests.e2e.harness import ROOT, running_swarm

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240), pytest.mark.xdist_group("e2e")]


def write_records(path: Path) -> None:
    """Sums of two numbers, 3,600 lines."""
    pairs = [(a, b) for a in range(60) for b in range(60)]
    lines = [{"prompt": f"{a} plus {b} is", "answer": f" {a + b}"} for a, b in pairs]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize("objective", ["causal", "answers"])
def test_a_swarm_goes_on_from_an_imported_model(tmp_path: Path, objective: str) -> None:
    transformers = pytest.importorskip("transformers")
    with running_swarm(tmp_path) as swarm:
        other, dataset, hf = tmp_path / "other", tmp_path / "dataset", tmp_path / "hf"
        swarm.run_cli(
            "corpus", "build", str(ROOT / "protos"), "--out", str(other), "--vocab-size", "512",
            timeout_seconds=120,
        )  # fmt: skip
        config = transformers.LlamaConfig(
            vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128,
            eos_token_id=0, initializer_range=0.1,
        )  # fmt: skip
        transformers.LlamaForCausalLM(config).save_pretrained(hf)
        shutil.copy(other / "tokenizer.json", hf)
        made = swarm.run_peer_cli("import", str(hf), "imported", "--seq-len", "64")
        write_records(tmp_path / "sums.jsonl")
        source = {
            "causal": [str(ROOT / "coordinator")],
            "answers": ["sums.jsonl", "--answers", "64"],
        }
        swarm.run_cli(
            "corpus", "build", *source[objective], "--out", str(dataset), "--tokenizer",
            "imported/tokenizer.json", "--eos-token-id", "0", timeout_seconds=120,
        )  # fmt: skip
        before = swarm.run_peer_cli("eval", "imported", "--dataset", str(dataset))
        swarm.start_coordinator()
        swarm.run_cli(
            "run", "create", "--data-dir", str(swarm.data_dir), "--dataset", str(dataset),
            "--init", "imported", "--set", "strategy.global_batch_tokens=2048", "--budget-tokens",
            "40960", "--set", "schedule.lr_warmup_tokens=4096", "--min-peers", "2",
            "--set", f"objective.name={objective}",
        )  # fmt: skip
        token = json.loads(
            swarm.run_cli("token", "create", "--data-dir", str(swarm.data_dir), "--json")
        )
        swarm.join_string = token["join_string"]
        for name in ("anna", "ben"):
            swarm.start_peer(name)
        status = swarm.wait_for_end()
        assert status["credited_tokens"] == status["budget_tokens"] == 40_960, swarm.report()
        assert status["state_digests_equal"] is True, swarm.report()
        specs = list(swarm.data_dir.glob("run_spec-*.json"))
        assert json.loads(specs[0].read_text())["initial_digest"] == made["initial_digest"]
        state = swarm.data_dir / status["newest_checkpoint_path"]
        after = swarm.run_peer_cli("eval", str(state), "--dataset", str(dataset))
        assert before["objective"] == after["objective"] == objective
        assert after["loss_nats"] < before["loss_nats"] - 0.5
        # The state at step 0 is the imported model, not the seed's; the peer that is to evaluate it
        # may have made a step of it before.
        first = status["first_evaluation"]
        assert first["loss_nats"] <= before["loss_nats"] * 1.002
        least = 0.998 * before["loss_nats"] if first["outer_step"] == 0 else after["loss_nats"]
        assert first["loss_nats"] >= least, first
        credits = tmp_path / "credits.json"
        credits.write_text(swarm.run_cli("status", "--data-dir", str(swarm.data_dir), "--json"))
        swarm.run_peer_cli(
            "export", str(state), "out", "--dataset", str(dataset), "--credits", str(credits)
        )
        card = (tmp_path / "out" / "README.md").read_text()
        assert made["initial_digest"] in card and "| all | 40,960 |" in card
        transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
