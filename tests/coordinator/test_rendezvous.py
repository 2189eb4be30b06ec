"""The rendezvous child: up, back after a kill, gone with its parent; a clear message without the
peer extra.
"""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from coordinator.rendezvous import Rendezvous
from tests.coordinator.loopback import eventually

needs_hivemind = pytest.mark.skipif(find_spec("hivemind") is None, reason="needs the [peer] extra")


def test_missing_extra_is_explained(tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['hivemind'] = None\n"
        "from coordinator.cli.main import main\n"
        f"sys.argv = ['x', 'serve', '--port', '0', '--data-dir', {str(tmp_path / 'data')!r}]\n"
        "main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 4
    assert "pip install" in done.stderr and "--rendezvous MULTIADDRESS" in done.stderr


@pytest.mark.slow
@needs_hivemind
def test_child_comes_back_with_its_identity(tmp_path: Path) -> None:
    async def scenario() -> None:
        rendezvous = Rendezvous(home=tmp_path / "home", host="127.0.0.1", port=0)
        await rendezvous.start()
        try:
            first_pid, first = rendezvous.pid, p2p_identities(rendezvous.addresses)
            assert first and first_pid is not None
            os.kill(first_pid, signal.SIGKILL)

            async def is_back() -> bool:
                return rendezvous.is_ready and rendezvous.pid not in (None, first_pid)

            await eventually(is_back, deadline_seconds=60.0)
            assert p2p_identities(rendezvous.addresses) == first
            last_pid = rendezvous.pid
        finally:
            await rendezvous.stop()
        assert last_pid is not None and not is_alive(last_pid)

    asyncio.run(scenario())


def p2p_identities(addresses: tuple[str, ...]) -> set[str]:
    """libp2p identities that multiaddresses end in."""
    return {address.rpartition("/p2p/")[2] for address in addresses}


def is_alive(pid: int) -> bool:
    """True while the process exists."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False
