"""`muster-coordinator up` in small: the command a stranger runs, its summary, its resume and its
refusals.
"""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.e2e.harness import ROOT, TINY_MODEL, environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

SUMMARY_TYPES: dict[str, type | tuple[type, ...]] = {
    "run_digest": str,
    "num_peers_seen": int,
    "outer_steps_committed": int,
    "credited_tokens": int,
    "budget_tokens": int,
    "uncredited_trained_tokens": int,
    "rolled_back_tokens": int,
    "heldout_loss_nats_first": float,
    "heldout_loss_nats_last": float,
    "heldout_bits_per_byte_last": float,
    "one_process_bits_per_byte": float,
    "gzip_bits_per_byte": float,
    "bigram_bits_per_byte": float,
    "train_seconds": float,
    "goodput_tokens_per_second": float,
    "credited_tokens_by_peer": dict,
    "state_digests_equal": bool,
    "ledger_violations": list,
    "checkpoint_path": str,
    "sample_text": str,
    "not_exported_reason": str,
}


def up_command(directory: Path, *arguments: str) -> list[str]:
    """`up` with the small model on Muster's own sources."""
    return [
        sys.executable, "-m", "coordinator.cli.main", "up", "--data-dir", str(directory / "data"),
        "--port", "0", "--peers", "2", "--model", TINY_MODEL,
        "--corpus", str(ROOT / "protos"), str(ROOT / "coordinator"), *arguments,
    ]  # fmt: skip


def up(
    directory: Path, *arguments: str, timeout_seconds: float = 200
) -> subprocess.CompletedProcess[bytes]:
    """Run it to its end."""
    return subprocess.run(
        up_command(directory, *arguments),
        env=environment(),
        cwd=directory,
        capture_output=True,
        timeout=timeout_seconds,
    )


def interrupted_up(directory: Path, *, at: str, num_interrupts: int) -> tuple[float, str]:
    """Start it, interrupt it when it has said `at`; returns how long that took, and its words."""
    with subprocess.Popen(
        up_command(directory, "--budget-tokens", "20000"),
        env=environment(),
        cwd=directory,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        said = ""
        while at not in said:
            line = process.stderr.readline()
            assert line, said
            said += line
        begin = time.monotonic()
        process.send_signal(signal.SIGINT)
        for _ in range(1, num_interrupts):
            said += process.stderr.readline()
            process.send_signal(signal.SIGINT)
        said += process.stderr.read()
        process.wait(60)
        assert process.returncode == 130, said
        assert "Traceback" not in said and "never awaited" not in said, said
        return time.monotonic() - begin, said


def test_small_up_trains_and_reports_then_refuses(tmp_path: Path) -> None:
    """The whole way in small; a second `up` on the finished run names --data-dir and --fresh."""
    done = up(tmp_path, "--budget-tokens", "40000", "--json")
    errors = done.stderr.decode()
    assert done.returncode == 0, errors
    assert "Traceback" not in errors
    summary = json.loads(done.stdout.decode().strip().splitlines()[-1])
    assert summary == json.loads((tmp_path / "data" / "summary.json").read_text())
    assert set(summary) == set(SUMMARY_TYPES)
    for key, kind in SUMMARY_TYPES.items():
        assert isinstance(summary[key], kind), (key, summary[key])
    assert summary["credited_tokens"] == summary["budget_tokens"] > 39_000
    assert sum(summary["credited_tokens_by_peer"].values()) == summary["credited_tokens"]
    assert summary["state_digests_equal"] is True
    assert summary["ledger_violations"] == []
    assert summary["num_peers_seen"] == 2
    assert summary["heldout_loss_nats_last"] < summary["heldout_loss_nats_first"]
    ratio = summary["heldout_bits_per_byte_last"] / summary["one_process_bits_per_byte"]
    assert abs(ratio - 1) <= 0.02
    assert Path(summary["checkpoint_path"]).exists()
    assert summary["sample_text"] and summary["not_exported_reason"] == ""

    again = up(tmp_path, "--budget-tokens", "40000", timeout_seconds=60)
    message = again.stderr.decode()
    assert again.returncode == 2
    assert "--fresh" in message and "--data-dir" in message


def test_interrupted_it_ends_at_once_and_resumes_from_the_store(tmp_path: Path) -> None:
    """Ctrl+C while the corpus is built, twice during the run; then it ends with what the store
    holds, though the spec's file is gone.
    """
    seconds, said = interrupted_up(tmp_path, at="corpus:", num_interrupts=1)
    assert seconds < 3 and "interrupted while preparing" in said
    seconds, said = interrupted_up(tmp_path, at="page:", num_interrupts=2)
    assert seconds < 3 and "stopping" in said
    (tmp_path / "data" / "run_spec.json").unlink()
    done = up(tmp_path, "--json")
    assert done.returncode == 0, done.stderr.decode()
    summary = json.loads(done.stdout.decode().strip().splitlines()[-1])
    assert summary["credited_tokens"] == summary["budget_tokens"] > 19_000
