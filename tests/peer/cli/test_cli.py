"""`muster-peer` as a stranger meets it: quick help, frozen flags, one clear message and exit code
for each mistake.
"""

import io
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from peer.cli.options import read_join_text
from peer.home import Home
from protos.contract.channel import JoinString
from protos.contract.errors import UsageError

HELP_CPU_SECONDS = 0.5
JOIN_FLAGS = {
    "--name", "--threads", "--memory-limit", "--disk-limit", "--upload-limit-mbit", "--home",
    "--listen-host", "--join-file",
    "--listen-port", "--announce", "--metrics-port", "--device", "--devices", "--layout",
    "--execution", "--step-cache", "--config", "--log-level",
    "--json-events", "--help",
}  # fmt: skip
COMMANDS = (
    "join",
    "status",
    "doctor",
    "rendezvous",
    "generate",
    "eval",
    "export",
    "import",
    "finetune",
)


def muster_peer(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "peer.cli.main", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=dict(os.environ) | {"COLUMNS": "200"} | environment,
    )


def join_string(**changes: object) -> str:
    plain = {
        "address": "127.0.0.1:1",
        "ca_fingerprint": "0" * 64,
        "run_id": "demo",
        "secret": "ab" * 32,
        "expire_unix_seconds": 0,
    }
    return JoinString(**(plain | changes)).encode()


def test_help_is_quick_and_lists_commands() -> None:
    best_seconds = float("inf")
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = muster_peer("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        best_seconds = min(best_seconds, used)
    assert done.returncode == 0
    assert all(command in done.stdout for command in COMMANDS)
    assert "Exit codes" in done.stdout and "reference" not in done.stdout
    assert best_seconds <= HELP_CPU_SECONDS


def test_flags_of_join_are_frozen() -> None:
    words = muster_peer("join", "--help", TERM="dumb").stdout.replace(",", " ").split()
    assert {word for word in words if word.startswith("--")} == JOIN_FLAGS


@pytest.mark.parametrize(
    ("arguments", "exit_code", "said"),
    [
        (("join", "nonsense"), 2, "join string"),
        (("join",), 2, "no join string"),
        (("join", "--layout", "foo=2"), 2, "foo=2"),
        (("join", join_string(), "--threads", "0"), 2, "threads is 0"),
        (("join", join_string(), "--memory-limit", "lots"), 2, "lots"),
        (("join", join_string(), "--memory-limit", "3 apples"), 2, "3 apples"),
        (("status",), 6, ""),
        (("eval", "missing.safetensors"), 2, "missing.safetensors"),
        (("export", "missing", "out"), 2, "missing"),
    ],
)
def test_mistakes(tmp_path: Path, arguments: tuple[str, ...], exit_code: int, said: str) -> None:
    done = muster_peer(*arguments, MUSTER_PEER_HOME=str(tmp_path / "home"))
    assert done.returncode == exit_code, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    if exit_code == 2:
        assert "remedy:" in done.stderr


def test_unknown_key_names_the_nearest(tmp_path: Path) -> None:
    done = muster_peer("status", MUSTER_PEER_HOMME=str(tmp_path))
    assert done.returncode == 2
    assert "did you mean 'MUSTER_PEER_HOME'" in done.stderr


def test_a_home_in_use(tmp_path: Path) -> None:
    home = Home.open(tmp_path / "home")
    try:
        done = muster_peer("join", join_string(), "--home", str(home.path))
    finally:
        home.close()
    assert done.returncode == 4
    assert f"pid {os.getpid()}" in done.stderr and "--home" in done.stderr


def test_status_and_doctor_in_json(tmp_path: Path) -> None:
    home = str(tmp_path / "home")
    status = muster_peer("status", "--json", "--home", home)
    assert json.loads(status.stdout)["is_running"] is False
    doctor = muster_peer("doctor", "--json", "--no-probe", "--home", home)
    report = json.loads(doctor.stdout)
    names = [check["name"] for check in report["checks"]]
    assert names == [
        "versions",
        "home",
        "leftovers",
        "memory",
        "disk",
        "port",
        "step",
        "network",
        "coordinator",
    ]
    assert (doctor.returncode == 0) is report["is_ok"]
    assert not (tmp_path / "home").exists()


@pytest.mark.slow
def test_doctor_measures_the_step_and_keeps_it(tmp_path: Path) -> None:
    home = Home.open(tmp_path / "home")
    home.close()
    for is_again in (False, True):
        doctor = muster_peer("doctor", "--json", "--home", str(home.path))
        (device,) = (c for c in json.loads(doctor.stdout)["checks"] if c["name"] == "device")
        found = device["details"]
        assert device["is_ok"] and ("measured before" in device["found"]) is is_again
        ratio = found["flop_per_second"] / found["product_flop_per_second"]
        assert found["mfu_ratio"] == pytest.approx(ratio) and found["tokens_per_second"] > 100
        ways = {(tried["execution"], tried["precision"]) for tried in found["tried"]}
        assert len(ways) == 4 and (found["execution"], found["precision"]) in ways


def test_doctor_finds_seeded_faults(tmp_path: Path) -> None:
    home = Home.open(tmp_path / "home")
    home.close()
    (home.tmp / "upload.safetensors").write_bytes(b"x")
    done = muster_peer(
        "doctor", join_string(), "--json", "--no-probe", "--home", str(home.path),
        "--memory-limit", "1MiB", "--disk-limit", "1MiB",
    )  # fmt: skip
    assert done.returncode == 4
    bad = {
        check["name"]: check for check in json.loads(done.stdout)["checks"] if not check["is_ok"]
    }
    assert set(bad) == {"leftovers", "memory", "disk", "coordinator"}
    assert all(check["found"] and check["remedy"] for check in bad.values())


def test_join_strings_come_from_a_file_or_standard_input_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "join"
    file.write_text("muster1:from-a-file\nmore\n")
    assert read_join_text("", file) == "muster1:from-a-file"
    monkeypatch.setattr("sys.stdin", io.StringIO("muster1:from-stdin\n"))
    assert read_join_text("-", None) == "muster1:from-stdin"
    assert read_join_text("muster1:given", None) == "muster1:given"
    assert read_join_text("", None) == ""
    empty = tmp_path / "empty"
    empty.touch()
    for text, path in (("muster1:given", file), ("", tmp_path / "missing"), ("", empty)):
        with pytest.raises(UsageError) as refused:
            read_join_text(text, path)
        assert refused.value.allowed and refused.value.remedy


@pytest.mark.parametrize("program", ["peer.cli", "coordinator.cli"])
def test_an_interrupt_during_imports_is_no_traceback(program: str) -> None:
    """The handler is there before the imports that take half a second."""
    code = f"import sys; sys.argv = ['-m']; import {program}; import os; os.kill(os.getpid(), 2)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (130, "interrupted\n")
