"""Configuration: order of the sources, strictness, messages."""

from pathlib import Path

import pytest

from coordinator.config import CoordinatorConfig, load_config
from protos.contract.errors import ErrorCode, MachineError, UsageError


def test_later_sources_win(tmp_path: Path) -> None:
    path = tmp_path / "coordinator.toml"
    path.write_text(
        'port = 1\nhttp_port = 2\nrendezvous = ["/ip4/10.0.0.1/tcp/1/p2p/Qm1"]\nlease_ttl_seconds '
        "= 90\n"
    )
    environment = {
        "MUSTER_COORDINATOR_HTTP_PORT": "3",
        "MUSTER_COORDINATOR_HOST": "::1",
        "HOME": "/",
    }
    config = load_config(
        config_path=path, environment=environment, flags={"host": "127.0.0.1", "port": None}
    )
    assert (config.port, config.http_port, config.host) == (1, 3, "127.0.0.1")
    assert config.rendezvous == ("/ip4/10.0.0.1/tcp/1/p2p/Qm1",)
    assert config.lease_ttl_seconds == 90.0
    assert type(config.lease_ttl_seconds) is float


def test_file_may_be_named_by_the_environment(tmp_path: Path) -> None:
    path = tmp_path / "coordinator.toml"
    path.write_text("port = 5\n")
    assert load_config(environment={"MUSTER_COORDINATOR_CONFIG": str(path)}).port == 5


@pytest.mark.parametrize("key", ["heartbeat_intervall_seconds", "heartbeat_interval"])
def test_unknown_keys_name_the_nearest(tmp_path: Path, key: str) -> None:
    path = tmp_path / "coordinator.toml"
    path.write_text(f"{key} = 5\n")
    with pytest.raises(UsageError, match="did you mean 'heartbeat_interval_seconds'"):
        load_config(config_path=path, environment={})
    with pytest.raises(UsageError, match="did you mean 'heartbeat_interval_seconds'"):
        load_config(environment={f"MUSTER_COORDINATOR_{key.upper()}": "5"})


@pytest.mark.parametrize(
    "line",
    [
        "port = '7'",
        "port = true",
        "port = 70000",
        "lease_ttl_seconds = 'x'",
        "lease_ttl_seconds = 5",
        "stop_deadline_seconds = -1",
        "rendezvous = [1]",
        "rendezvous = ['here']",
        "data_dir = '\xff'",  # written in another encoding than UTF-8
        "max_peers = 0",
        "host = 'localhost'",
        "host = '::'",
        "rendezvous_host = 'here'",
        "data_dir = 3",
        "= 3",
    ],
)
def test_bad_values_are_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "coordinator.toml"
    path.write_text(line + "\n", encoding="latin-1")
    with pytest.raises(UsageError) as caught:
        load_config(config_path=path, environment={})
    assert caught.value.allowed and caught.value.remedy


def test_a_name_will_do_where_no_rendezvous_is_started() -> None:
    config = load_config(flags={"host": "localhost", "has_rendezvous": False}, environment={})
    assert config.host == "localhost"


@pytest.mark.parametrize("text", ["", "seven", "7.5"])
def test_bad_environment_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="MUSTER_COORDINATOR_PORT"):
        load_config(environment={"MUSTER_COORDINATOR_PORT": text})


def test_missing_file_is_the_machines_fault(tmp_path: Path) -> None:
    with pytest.raises(MachineError) as caught:
        load_config(config_path=tmp_path / "none.toml", environment={})
    assert caught.value.code is ErrorCode.PERMISSION_DENIED


def test_defaults_are_valid() -> None:
    assert load_config(environment={}) == CoordinatorConfig()
