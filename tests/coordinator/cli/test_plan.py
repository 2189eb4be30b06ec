"""`plan` as a person uses it: the table's figures, a spec that creates a run, bad input."""

import math
from pathlib import Path

import pytest

from coordinator.scaling.pool import POOL_EXAMPLE
from tests.coordinator.cli.test_cli import ask, run_here
from tests.coordinator.corpus.test_answers import ROWS, build, write_rows
from tests.coordinator.loopback import write_dataset


def test_growth_and_size_out_of_the_command_line() -> None:
    kaplan, chinchilla = (ask("plan", "--law", law, "--flop", "1e20") for law in
                          ("kaplan", "chinchilla"))  # fmt: skip
    assert kaplan["growth_params_ratio"] == pytest.approx(5.4, abs=0.05)
    assert kaplan["growth_tokens_ratio"] == pytest.approx(1.9, abs=0.05)
    assert chinchilla["growth_params_ratio"] == pytest.approx(3.1, abs=0.05)
    assert chinchilla["growth_tokens_ratio"] == pytest.approx(3.2, abs=0.05)
    assert kaplan["law_optimum"]["params_n"] > 1.5 * chinchilla["law_optimum"]["params_n"]
    ratio = ask("plan", "--law", "chinchilla-ratio", "--flop", "1.23e22")
    assert ratio["law_optimum"]["params_n"] == pytest.approx(math.sqrt(1.23e22 / 120))


def test_a_written_spec_creates_a_run(tmp_path: Path) -> None:
    dataset_dir, spec_path = tmp_path / "dataset", tmp_path / "run.toml"
    write_dataset(dataset_dir)
    asked = ("plan", "--flop", "1e9", "--seq-len", "8", "--dataset", str(dataset_dir))
    refused = run_here(*asked, "--write-spec", str(spec_path))
    assert refused.returncode == 2 and "less than the smallest compute" in refused.stderr
    asked = (*asked, "--force-extrapolation")
    found = ask(*asked, "--write-spec", str(spec_path))
    assert found["loss_nats"] is None and any("no loss" in said for said in found["warnings"])
    assert found["data_passes"] > 0 and found["spec_path"] == str(spec_path)
    made = ask(
        "run", "create", "--dataset", str(dataset_dir), "--spec", str(spec_path),
        "--data-dir", str(tmp_path / "data"),
    )  # fmt: skip
    assert made["budget_tokens"] == found["tokens_d"] == found["spec"]["budget_tokens"]
    again = run_here(*asked, "--write-spec", str(spec_path))
    assert again.returncode == 2 and "is there already" in again.stderr


def test_answers_are_not_taken_for_text(tmp_path: Path) -> None:
    """By the planner; and a run is told of its objective before it is told of its batch."""
    where = tmp_path / "answers"
    build(write_rows(tmp_path / "d.jsonl", ROWS), where)
    done = run_here("plan", "--flop", "1e9", "--seq-len", "32", "--dataset", str(where))
    assert done.returncode == 2 and "holds prompts and answers" in done.stderr
    for wish, found in (
        ("model.seq_len=32", "objective.name = causal"),
        ("objective.name=answers", "model.seq_len = 256"),
    ):
        done = run_here(
            "run", "create", "--dataset", str(where), "--set", wish,
            "--data-dir", str(tmp_path / "data"),
        )  # fmt: skip
        assert done.returncode == 2 and found in done.stderr


def test_a_pool_file(tmp_path: Path) -> None:
    path = tmp_path / "pool.toml"
    path.write_text(POOL_EXAMPLE)
    found = ask("plan", "--pool", str(path), "--deadline", "30d")
    assert found["admission"]["left_out"] == []
    assert found["calendar_seconds"] == pytest.approx(30 * 86_400, rel=0.01)
    shown = run_here("plan", "--pool", str(path))
    assert "30d are assumed" in shown.stderr, "never silently"
    for word in ("near-optimal N", "learning rate", "strategy", "loss", "wire per peer", "time"):
        assert word in shown.stdout


def test_explanation() -> None:
    shown = run_here("plan", "--explain").stdout
    for words in ("irreducible", "jump", "x1000", "approach 3"):
        assert words in shown


@pytest.mark.parametrize(
    ("arguments", "exit_code", "words"),
    [
        ((), 2, "neither a pool, nor compute, nor N"),
        (("--serve-tokens", "1e12"), 2, "nothing that fixes N"),
        (("--flop", "1e20", "--gpu-hours", "5"), 2, "--flop and --gpu-hours at once"),
        (("--flop", "-1"), 2, "--flop -1"),
        (("--flop", "nan"), 2, "--flop nan"),
        (("--flop", "1e29"), 2, "times the largest compute"),
        (("--gpu-hours", "5"), 2, "GPU hours of no particular GPU"),
        (("--gpu-hours", "5", "--gpu", "abacus"), 2, "GPU 'abacus'"),
        (("--flop", "1e20", "--gpu", "h100"), 2, "a GPU without hours"),
        (("--flop", "1e20", "--deadline", "2001-02-03"), 2, "is in the past"),
        (("--flop", "1e20", "--deadline", "-3d"), 2, "--deadline -3d"),
        (("--flop", "1e20", "--column", "N=x"), 2, "without --observations"),
        (("--flop", "1e20", "--write-spec", "/nowhere/x.toml"), 4, "--write-spec"),
        (("--flop", "1e20", "--law", "moore"), 2, "law 'moore'"),
        (("--flop", "1e20", "--unique-tokens", "0"), 2, "--unique-tokens 0"),
        (("--flop", "1e20", "--strategy", "gossip"), 2, "--strategy gossip"),
        (("--flop", "1e20", "--strategy", "diloco"), 2, "without peers whose links"),
        (("--flop", "1e20", "--lr-from", "fast"), 2, "--lr-from 'fast'"),
        (("--pool", "nowhere.toml"), 2, "cannot read"),
        (("--flop", "1e20", "--dataset", "nowhere"), 2, "nowhere"),
    ],
)
def test_mistakes_are_explained(arguments: tuple[str, ...], exit_code: int, words: str) -> None:
    done = run_here("plan", *arguments)
    assert (done.returncode, "Traceback" in done.stderr) == (exit_code, False), done.stderr
    assert words in done.stderr and "allowed" in done.stderr or exit_code == 4


def test_absurd_pools_and_impossible_deadlines(tmp_path: Path) -> None:
    path = tmp_path / "pool.toml"
    path.write_text(POOL_EXAMPLE.replace("2.1e13", "0"))
    done = run_here("plan", "--pool", str(path), "--deadline", "30d")
    assert done.returncode == 2 and "flop_per_second = 0" in done.stderr
    path.write_text(POOL_EXAMPLE)
    done = run_here("plan", "--pool", str(path), "--flop", "1e22", "--deadline", "1d")
    assert done.returncode == 2 and "at most" in done.stderr
    path.write_bytes(b"\xef\xbb\xbf" + POOL_EXAMPLE.encode())
    assert run_here("plan", "--pool", str(path), "--deadline", "30d").returncode == 0, "a BOM"


def test_live_needs_a_run_with_measured_peers(tmp_path: Path) -> None:
    where = ("--data-dir", str(tmp_path / "data"))
    done = run_here("plan", "--pool", "live", "--deadline", "1d", *where)
    assert done.returncode == 2 and "not a coordinator's data directory" in done.stderr
    dataset_dir = tmp_path / "dataset"
    write_dataset(dataset_dir)
    ask(
        "run", "create", "--dataset", str(dataset_dir), "--model", "seq_len=8",
        "--set", "strategy.global_batch_tokens=64", *where,
    )  # fmt: skip
    done = run_here("plan", "--pool", "live", "--deadline", "1d", *where)
    assert done.returncode == 6 and "training speed" in done.stderr
