"""Devices that an owner names are tried before anybody is asked to join."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from peer.cli.devices import require_devices
from peer.cli.doctor_checks import check_asked_devices
from peer.cli.main import app
from peer.cli.ports import require_free_port
from peer.config import PeerConfig
from protos.contract.channel import JoinString
from protos.contract.errors import MachineError, UsageError

NOT_HERE = "cuda:99"
NOBODY = JoinString(
    address="127.0.0.1:1",
    ca_fingerprint="0" * 64,
    run_id="demo",
    secret="ab" * 32,
    expire_unix_seconds=0,
).encode()
"""Whoever asks there waits three quarters of a minute."""


@pytest.mark.slow
@pytest.mark.parametrize("option", ["--devices", "--device"])
def test_join_refuses_a_device_that_is_not_here(tmp_path: Path, option: str) -> None:
    arguments = ("join", NOBODY, "--home", str(tmp_path / "home"), option, NOT_HERE)
    refusal = CliRunner().invoke(app, arguments).exception
    assert isinstance(refusal, MachineError) and NOT_HERE in refusal.found
    assert refusal.allowed and "cpu" in refusal.remedy


@pytest.mark.slow
def test_doctor_tells_before_anybody_joins(tmp_path: Path) -> None:
    arguments = ("doctor", "--json", "--no-probe", "--home", str(tmp_path), "--devices", NOT_HERE)
    done = CliRunner().invoke(app, arguments)
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert done.exit_code == 4 and not checks["device"]["is_ok"]
    assert NOT_HERE in checks["device"]["found"] and checks["device"]["remedy"]


def test_join_refuses_more_shares_of_the_cpu_than_its_memory_holds(tmp_path: Path) -> None:
    home = ("--home", str(tmp_path / "home"), "--memory-limit", "2GiB")
    refusal = CliRunner().invoke(app, ("join", NOBODY, *home, "--devices", "cpu:99")).exception
    assert isinstance(refusal, MachineError)
    assert "cpu:99 with 2.0 GiB" in refusal.found and "at most cpu:4" in refusal.allowed
    config = PeerConfig(home=tmp_path, memory_limit_bytes=2**31)
    require_devices(replace(config, devices="cpu:4"))
    check = check_asked_devices(replace(config, devices="cpu:5"))
    assert check is not None and not check.is_ok and check.remedy


def test_torch_is_asked_for_every_cuda_device_and_for_no_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = PeerConfig(home=tmp_path)
    asked: list[list[str]] = []
    answer = "{}"

    def run(command: list[str], **_: object) -> "subprocess.CompletedProcess[str]":
        asked.append(command[3:])
        return subprocess.CompletedProcess(command, 0, answer, "a driver's complaint\n")

    monkeypatch.setattr(subprocess, "run", run)
    for free in ({}, {"device": "cpu"}, {"devices": "cpu:2"}, {"devices": "auto"}):
        require_devices(replace(config, **free))
    assert asked == []
    require_devices(replace(config, devices="cuda:0,3"))
    require_devices(replace(config, device="cuda"))
    assert asked == [["cuda:0", "cuda:3"], ["cuda"]]
    answer = json.dumps({"found": "f", "allowed": "a", "remedy": "r"})
    with pytest.raises(MachineError, match="f; a; r"):
        require_devices(replace(config, devices="cuda:0"))
    answer = "no JSON"
    with pytest.raises(MachineError, match="a driver's complaint"):
        require_devices(replace(config, devices="cuda:0"))


def test_what_names_no_device_or_address_of_this_machine_is_refused(tmp_path: Path) -> None:
    for options in ({"devices": "cuda:0,0"}, {"devices": "cuda:1,01"}, {"threads": 100_000}):
        with pytest.raises(UsageError) as refusal:
            PeerConfig(home=tmp_path, **options)
        assert refusal.value.allowed and refusal.value.remedy
    PeerConfig(home=tmp_path, devices="cuda:0,1")
    for host in ("nowhere.invalid", "localhost", "::", ""):
        with pytest.raises(UsageError, match=f"--host {host}"):
            require_free_port(host, 0, host_flag="--host", port_flag="--port")
    with pytest.raises(MachineError, match="with --host"):
        require_free_port("192.0.2.1", 0, host_flag="--host", port_flag="--port")
    require_free_port("0.0.0.0", 0)


def test_a_layout_is_looked_at_by_doctor_too(tmp_path: Path) -> None:
    config = PeerConfig(home=tmp_path, devices="cpu:2")
    assert check_asked_devices(replace(config, layout="pp=2")) is None
    refused = check_asked_devices(replace(config, layout="pp=16"))
    assert refused is not None and "takes 16 devices" in refused.found
    assert "auto" in refused.remedy and "cpu:16" not in refused.remedy
