"""PeerConfig: where values come from, what is refused and how."""

import os
from pathlib import Path

import pytest

from peer.config import (
    PeerConfig,
    child_environment,
    format_bytes,
    load_config,
    num_physical_cores,
    parse_bytes,
)
from protos.contract.errors import MachineError, UsageError


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("8GiB", 8 * 2**30),
        ("1.5 MiB", 3 * 2**19),
        ("500MB", 500_000_000),
        ("12kb", 12_000),
        ("1048576", 2**20),
        (4096, 4096),
        ("1 TiB", 2**40),
    ],
)
def test_sizes(text: str | int, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "8 gigs", "1e9", "8GiBs"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_bytes(text)
    assert caught.value.allowed and caught.value.remedy


def test_format_bytes() -> None:
    assert [format_bytes(n) for n in (0, 1536, 2**20, 3 * 2**29)] == [
        "0 B",
        "1.5 KiB",
        "1.0 MiB",
        "1.5 GiB",
    ]


def test_later_sources_win(tmp_path: Path) -> None:
    path = tmp_path / "peer.toml"
    path.write_text(
        'name = "file"\nthreads = 3\nmemory_limit = "2GiB"\nannounce = ["/ip4/1.2.3.4/tcp/9"]\n'
    )
    environment = {"MUSTER_PEER_NAME": "environment", "MUSTER_PEER_THREADS": "5", "HOME": "/x"}
    config = load_config(
        flags={"name": "flag", "home": tmp_path, "threads": None}, environment=environment
    )
    assert (config.name, config.threads, config.memory_limit_bytes) == ("flag", 5, 2 * 2**30)
    assert config.announce == ("/ip4/1.2.3.4/tcp/9",)
    assert config.home == tmp_path


def test_lists_and_limits_from_text(tmp_path: Path) -> None:
    environment = {
        "MUSTER_PEER_HOME": str(tmp_path),
        "MUSTER_PEER_ANNOUNCE": "/ip4/1.2.3.4/tcp/9, /dns4/x/tcp/9",
        "MUSTER_PEER_DISK_LIMIT": "none",
    }
    config = load_config(flags={}, environment=environment)
    assert config.announce == ("/ip4/1.2.3.4/tcp/9", "/dns4/x/tcp/9")
    assert config.disk_limit_bytes is None


@pytest.mark.parametrize(
    ("environment", "text", "nearest"),
    [
        ({"MUSTER_PEER_THREAD": "2"}, "", "MUSTER_PEER_THREADS"),
        ({}, 'nmae = "x"', "name"),
        ({}, "memory_limit_bytes = 3", "memory_limit"),
    ],
)
def test_unknown_keys_name_the_nearest(
    tmp_path: Path, environment: dict[str, str], text: str, nearest: str
) -> None:
    (tmp_path / "peer.toml").write_text(text)
    with pytest.raises(UsageError, match="unknown key") as caught:
        load_config(flags={"home": tmp_path}, environment=environment)
    assert repr(nearest) in caught.value.remedy


@pytest.mark.parametrize(
    "flags",
    [
        {"name": ""},
        {"name": "-x"},
        {"threads": 0},
        {"threads": "many"},
        {"listen_port": 65536},
        {"metrics_port": -1},
        {"device": "tpu"},
        {"log_level": "LOUD"},
        {"upload_limit_mbit": -1.0},
        {"memory_limit": "lots"},
        {"announce": ["/ip4/my-host.example/tcp/4001"]},
    ],
)
def test_values_that_cannot_work(tmp_path: Path, flags: dict[str, object]) -> None:
    with pytest.raises(UsageError) as caught:
        load_config(flags=flags | {"home": tmp_path}, environment={})
    assert caught.value.allowed and caught.value.remedy


def test_a_file_that_is_not_toml_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text("name = ")
    with pytest.raises(UsageError, match="not TOML"):
        load_config(flags={}, config_path=path, environment={})
    with pytest.raises(MachineError):
        load_config(flags={}, config_path=tmp_path / "missing.toml", environment={})


def test_children_inherit_no_settings_and_their_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUSTER_PEER_NAME", "x")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)  # torch sets it at import
    environment = child_environment(PeerConfig(home=Path("/home/x"), threads=3))
    assert "MUSTER_PEER_NAME" not in environment
    assert environment["OMP_NUM_THREADS"] == "3"
    assert environment["TORCHINDUCTOR_CACHE_DIR"] == "/home/x/step/inductor"


def test_code_is_not_compiled_where_others_may_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    config = PeerConfig(home=tmp_path / "home", shared_step_cache=tmp_path / "shared")
    for mode, expected in ((0o700, "shared"), (0o777, "home"), (0o720, "home")):
        config.step_cache.mkdir(exist_ok=True)
        config.step_cache.chmod(mode)
        found = child_environment(config)["TORCHINDUCTOR_CACHE_DIR"]
        assert found == str(tmp_path / expected / "inductor")


def test_hardware_threads_of_one_core_count_once(tmp_path: Path) -> None:
    numbers = sorted(os.sched_getaffinity(0))
    assert num_physical_cores(tmp_path) == len(numbers), "nothing is known"
    for number in numbers:
        siblings = tmp_path / f"cpu{number}" / "topology" / "thread_siblings_list"
        siblings.parent.mkdir(parents=True)
        siblings.write_text(f"{number // 2 * 2}-{number // 2 * 2 + 1}\n")
    assert num_physical_cores(tmp_path) == len({number // 2 for number in numbers})


def test_defaults_are_valid() -> None:
    config = PeerConfig()
    assert config.threads >= 1 and config.home.is_absolute()


@pytest.mark.parametrize("devices", ["", "auto", "cpu", "cpu:2", "cuda", "cuda:0", "cuda:0,1"])
def test_devices_that_can_be_lent(devices: str) -> None:
    assert PeerConfig(devices=devices).devices == devices


@pytest.mark.parametrize("devices", ["cpu:0", "cpu:two", "cpu:0,1", "cuda:", "gpu:0", "cuda:0,"])
def test_devices_that_there_are_not(devices: str) -> None:
    with pytest.raises(UsageError, match="devices"):
        PeerConfig(devices=devices)


def test_device_and_devices_are_one_too_many() -> None:
    with pytest.raises(UsageError, match="device cuda and devices cpu:2"):
        PeerConfig(device="cuda", devices="cpu:2")
