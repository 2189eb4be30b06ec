"""What the doctor says of the kernel's network settings (advice with the command, never a fault)
and of the step; and what it ends with.
"""

import json
import os
import stat
import subprocess
from pathlib import Path

import pytest

from peer.cli.doctor_checks import (
    Check,
    check_coordinator,
    check_network,
    check_step_plan,
    exit_code_of,
    run_probe,
)
from peer.config import PeerConfig
from peer.home import Home
from protos.contract.channel import JoinString


def _settings(folder: Path, control: str, wmem: str) -> Path:
    (folder / "tcp_congestion_control").write_text(control + "\n")
    (folder / "tcp_wmem").write_text(wmem + "\n")
    return folder


def test_defaults_get_advice(tmp_path: Path) -> None:
    check = check_network(settings_folder=_settings(tmp_path, "cubic", "4096\t16384\t4194304"))
    assert check.is_ok
    assert "sysctl -w net.ipv4.tcp_congestion_control=bbr" in check.found
    assert "tcp_wmem='4096 16384 33554432'" in check.found and "about 23 MB/s" in check.found


def test_good_settings_get_none(tmp_path: Path) -> None:
    check = check_network(settings_folder=_settings(tmp_path, "bbr", "4096 16384 33554432"))
    assert (
        check.found.startswith("TCP with bbr, send buffer up to ") and "sysctl" not in check.found
    )


def test_unreadable_settings_are_said_to_be_unknown(tmp_path: Path) -> None:
    assert "unknown" in check_network(settings_folder=tmp_path).found


def test_the_step_that_was_measured_last(tmp_path: Path) -> None:
    config = PeerConfig(home=tmp_path)
    assert "no run's model" in check_step_plan(config).found
    config.step_cache.mkdir(mode=0o700)
    for time_ns, name in enumerate(("b", "a")):
        path = config.step_cache / f"plan-{name}.json"
        path.write_text(json.dumps({"reason": f"reason of {name}"}))
        os.utime(path, ns=(time_ns, time_ns))
    assert check_step_plan(config).found == "measured last: reason of a"
    config.step_cache.chmod(0o775)
    check = check_step_plan(config)
    assert not check.is_ok and "may be written by, others" in check.found
    assert check.remedy.endswith(f"chmod 700 {config.step_cache}")


def test_the_probe_leaves_a_step_cache_that_nobody_else_may_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = PeerConfig(home=tmp_path)

    def measured(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        Path(command[command.index("--cache") + 1]).mkdir(parents=True)
        return subprocess.CompletedProcess(command, 0, stdout="{}")

    monkeypatch.setattr("subprocess.run", measured)
    before = os.umask(0o002)
    try:
        run_probe(config)
    finally:
        os.umask(before)
    assert stat.S_IMODE(config.step_cache.stat().st_mode) == 0o700


def test_the_step_of_a_peer_that_runs_on_several_ranks(tmp_path: Path) -> None:
    config = PeerConfig(home=tmp_path)
    status = {
        "device": "2 x cpu tp=2 AVX512 bf16 eager",
        "tokens_per_second": 3103.4,
        "step_plan": "tp=2 on 2 of 2 devices: bf16, measured 3,857 tokens/s",
    }
    home = Home.open(tmp_path)
    try:
        home.run.mkdir(exist_ok=True)
        (home.run / "status.json").write_text(json.dumps(status))
        config.step_cache.mkdir(mode=0o700)
        (config.step_cache / "plan-a.json").write_text(json.dumps({"reason": "of earlier"}))
        found = check_step_plan(config).found
        assert found.startswith(f"in use by pid {os.getpid()}: 2 x cpu tp=2"), found
        assert "3,103 tokens/s in training; tp=2 on 2 of 2 devices" in found
    finally:
        home.close()
    assert check_step_plan(config).found == "measured last: of earlier"
    (config.step_cache / "plan-a.json").unlink()
    assert check_step_plan(config).found.startswith("used last: 2 x cpu tp=2")


def test_only_what_cannot_be_reached_has_an_exit_code_of_its_own(tmp_path: Path) -> None:
    nobody = JoinString(
        address="127.0.0.1:1",
        ca_fingerprint="0" * 64,
        run_id="demo",
        secret="ab" * 32,
        expire_unix_seconds=0,
    )
    unreached = check_coordinator(PeerConfig(home=tmp_path), nobody)
    good, bad = (Check(name="disk", is_ok=is_ok, found="some") for is_ok in (True, False))
    assert [check.is_ok for check in unreached] == [False]
    assert exit_code_of([good, *unreached]) == 6
    assert exit_code_of([*unreached, bad]) == exit_code_of([good, bad]) == 4
    assert exit_code_of([good]) == exit_code_of([]) == 0
