"""Starting and stopping: what is taken, what is left behind, what must not be imported."""

import asyncio
import json
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from coordinator.app import Coordinator
from coordinator.identity import load_identity, load_running
from protos.contract.errors import CorruptDataError, ErrorCode, MachineError, UnavailableError
from tests.coordinator.loopback import deployed, open_client, test_config

_HEAVY_MODULES = ("torch", "hivemind", "scipy", "transformers", "pandas")


def test_neither_torch_nor_hivemind() -> None:
    program = (
        "import sys, coordinator.app, coordinator.cli.main, coordinator.cli.perform, "
        "coordinator.cli.spec_options, coordinator.corpus.build\n"
        f"sys.exit(', '.join(name for name in {_HEAVY_MODULES!r} if name in sys.modules) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_files_ports_and_lock(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with deployed(tmp_path) as deployment:
            coordinator, data_dir = deployment.coordinator, deployment.data_dir
            for name in ("ca.key", "signing.key", "admin.key"):
                assert stat.S_IMODE((data_dir / name).stat().st_mode) == 0o600, name
            running = load_running(data_dir)
            assert running.local_address == coordinator.local_address
            assert running.ca_fingerprint == coordinator.ca_fingerprint
            port = int(coordinator.local_address.rpartition(":")[2])
            http_port = int(coordinator.http_address.rpartition(":")[2])
            assert await start_code(test_config(data_dir)) is ErrorCode.DATA_DIR_LOCKED
            other = tmp_path / "other"
            assert await start_code(test_config(other, port=port)) is ErrorCode.PORT_IN_USE
            assert (
                await start_code(test_config(other, http_port=http_port)) is ErrorCode.PORT_IN_USE
            )
            token = await deployment.token()
            again = Coordinator(test_config(other))
            await again.start()  # nothing of the failed starts holds the directory
            await again.stop()
        with pytest.raises(UnavailableError):
            load_running(data_dir)
        async with open_restarted(tmp_path / "data") as restarted:
            assert restarted.ca_fingerprint == token.ca_fingerprint
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", port))

    asyncio.run(scenario())


def open_restarted(data_dir: Path) -> "Restarted":
    """The coordinator of a data directory, started again."""
    return Restarted(data_dir)


class Restarted:
    """Starts on entering, stops on leaving."""

    def __init__(self, data_dir: Path) -> None:
        self.coordinator = Coordinator(test_config(data_dir))

    async def __aenter__(self) -> Coordinator:
        await self.coordinator.start()
        return self.coordinator

    async def __aexit__(self, *exception: object) -> None:
        await self.coordinator.stop()


async def start_code(config: object) -> ErrorCode:
    """Code of the MachineError with which a start fails."""
    with pytest.raises(MachineError) as caught:
        await Coordinator(config).start()  # type: ignore[arg-type]
    assert caught.value.allowed and caught.value.remedy
    return caught.value.code


def test_advertised_address_and_page(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with deployed(tmp_path, advertise="train.example.org:443") as deployment:
            assert deployment.coordinator.address == "train.example.org:443"
            async with open_client(await deployment.token()) as client:
                await client.join()

    asyncio.run(scenario())


def test_damaged_keys_are_refused(tmp_path: Path) -> None:
    identity = load_identity(tmp_path, hosts=("127.0.0.1",))
    assert load_identity(tmp_path, hosts=()).ca_fingerprint == identity.ca_fingerprint
    (tmp_path / "signing.key").write_bytes(b"short")
    with pytest.raises(CorruptDataError, match="5 bytes"):
        load_identity(tmp_path, hosts=())
    (tmp_path / "signing.key").write_bytes(bytes(32))
    (tmp_path / "ca.key").unlink()
    with pytest.raises(MachineError, match=r"ca\.key"):
        load_identity(tmp_path, hosts=())


def test_unreadable_coordinator_json(tmp_path: Path) -> None:
    (tmp_path / "coordinator.json").write_text(json.dumps({"pid": 1}))
    with pytest.raises(CorruptDataError):
        load_running(tmp_path)
