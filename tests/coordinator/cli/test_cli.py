"""The command line as a person uses it: exit codes, standard output, messages.

Most commands run inside this process through the same `main` (a process of its own costs half a
second of CPU each); test_serve.py and the tests of --help start real ones.
"""

import contextlib
import importlib.util
import io
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from coordinator.cli.main import main
from protos.contract.channel import JoinString
from protos.contract.run_spec import RunSpec
from tests.coordinator.loopback import tiny_spec, write_dataset

MAX_HELP_CPU_SECONDS = 0.5


def run_cli(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """One `muster-coordinator` process."""
    command = [sys.executable, "-m", "coordinator.cli.main", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL
    )


def run_here(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """The same inside this process."""
    out, err = io.StringIO(), io.StringIO()
    exit_code, before = 0, sys.argv
    sys.argv = ["muster-coordinator", *arguments]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as end:
        exit_code = int(end.code or 0)
    finally:
        sys.argv = before
    return subprocess.CompletedProcess(arguments, exit_code, out.getvalue(), err.getvalue())


def ask(*arguments: str) -> Any:
    """Object that a successful command prints with --json."""
    done = run_here(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "arguments", [("--help",), ("--version",), ("serve", "--help"), ("up", "--help")]
)
def test_help_is_quick(arguments: tuple[str, ...]) -> None:
    def attempt() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = run_cli(*arguments)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0 and done.stdout
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(attempt() for _ in range(2)) <= MAX_HELP_CPU_SECONDS


def test_exit_codes_are_documented() -> None:
    shown = run_cli("--help").stdout
    assert "Exit codes" in shown and "130" in shown


def test_a_run_by_hand_without_a_server(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    where = ("--data-dir", str(data_dir))
    dataset_dir = data_dir / "datasets" / "test"
    spec_path = tmp_path / "run.toml"
    spec_path.write_text(tiny_spec(write_dataset(dataset_dir)).to_toml())
    made = ask(
        "run", "create", "--dataset", str(dataset_dir), "--spec", str(spec_path), "--run-id", "one",
        "--budget-tokens", "125", "--set", "optimizer.peak_lr=0.002", *where,
    )  # fmt: skip
    assert (made["run_id"], made["budget_tokens"]) == ("one", 120)
    kept_spec = RunSpec.from_wire((data_dir / "run_spec-one.json").read_bytes())
    assert kept_spec.run_digest == made["run_digest"]
    assert [run["run_id"] for run in ask("run", "list", *where)["runs"]] == ["one"]
    assert run_here("token", "create", *where).returncode == 2, "its address is not known yet"
    token = ask(
        "token", "create", "--max-uses", "2", "--expires", "1h", "--advertise", "host:7", *where
    )
    decoded = JoinString.decode(token["join_string"])
    assert (decoded.address, decoded.run_id) == ("host:7", "one")
    assert "secret" not in token
    assert ask("token", "revoke", token["token_id"], *where)["was_revoked"]
    assert [item["state"] for item in ask("token", "list", *where)["tokens"]] == ["REVOKED"]
    assert ask("status", *where)["budget_tokens"] == 120
    assert ask("peers", *where)["peers"] == []
    assert ask("ledger", *where)["credited_tokens"] == 0
    assert ask("ledger", "verify", *where)["violations"] == []
    assert ask("run", "stop", "--reason", "test", *where)["state"] == "STOPPED"
    for command in (("status",), ("peers",), ("ledger",), ("run", "list"), ("token", "list")):
        done = run_here(*command, *where)
        assert done.returncode == 0 and done.stdout, command


@pytest.mark.parametrize(
    ("arguments", "exit_code", "words"),
    [
        (("status",), 2, "not a coordinator's data directory"),
        (("run", "pause"), 2, "not a coordinator's data directory"),
        (("token", "create", "--expires", "soon"), 2, "duration 'soon'"),
        (("run", "create", "--dataset", "nowhere"), 2, "corpus build"),
        (("serve", "--port", "70000"), 2, "port"),
        (("serve", "--advertise", "nohost"), 2, "HOST:PORT"),
        (("serve", "--config", "nowhere.toml"), 4, "cannot read"),
        (("corpus", "build", "nowhere.txt", "--out", "out"), 2, "nowhere.txt"),
        (("corpus", "build", "", "--out", "out"), 2, "an empty source"),
        (("up", "--port", "99999"), 2, "port = 99999"),
        (("up", "--peers", "0"), 2, "--peers 0"),
        (("fly",), 2, "no such command"),
    ],
)
def test_mistakes_are_explained(
    tmp_path: Path, arguments: tuple[str, ...], exit_code: int, words: str
) -> None:
    has_data_dir = arguments[0] not in ("corpus", "fly")
    where = ("--data-dir", str(tmp_path / "data")) if has_data_dir else ()
    done = run_here(*arguments, *where)
    assert (done.returncode, "Traceback" in done.stderr) == (exit_code, False), done.stderr
    assert words in done.stderr
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("more", [(), ("--fresh",), ("--budget-tokens", "1")])
def test_up_refuses_at_once(tmp_path: Path, more: tuple[str, ...]) -> None:
    """Before a corpus is built, and before --fresh deletes anything."""
    (tmp_path / "file").touch()
    done = run_here("up", "--data-dir", str(tmp_path / "file" / "data"), *more)
    assert done.returncode == (2 if "1" in more else 4) and "corpus:" not in done.stderr
    has_peer = importlib.util.find_spec("torch") and importlib.util.find_spec("hivemind")
    refused = "--data-dir" if has_peer else "extra `peer`"
    assert ("budget_tokens = 1" if "1" in more else refused) in done.stderr
    assert "  remedy:" in done.stderr and "--out" not in done.stderr
    assert (tmp_path / "file").read_bytes() == b""


@pytest.mark.parametrize("arguments", [("plan", "--flop", "1e20", "--json"), ("study", "laws")])
def test_an_output_that_takes_nothing_is_said(arguments: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "coordinator.cli.main", *arguments]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False
        )
    assert done.returncode == 4 and "internal error" not in done.stderr
    for words in ("cannot write to standard output: No space left", "allowed:", "remedy:"):
        assert words in done.stderr
    assert "Exception ignored" not in done.stderr
