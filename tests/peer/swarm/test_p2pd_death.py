"""A swarm process whose p2pd was killed ends with a reason, so that the daemon starts both anew;
one that ends before its p2pd is up leaves none behind.
"""

import asyncio
import os
import signal
from pathlib import Path

import pytest

from tests.peer.swarm.p2p_hosts import start_host
from tests.peer.swarm.swarm_hub import Hub

pytestmark = pytest.mark.slow


async def _story(folder: Path) -> None:
    hub = Hub(folder)
    hub.begin()
    daemon = hub.add_daemon()
    await hub.launch(daemon)
    await hub.wait_state([daemon], (0, 0))
    assert daemon.process is not None
    pid = daemon.process.pid
    (p2pd,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    os.kill(int(p2pd), signal.SIGKILL)
    assert await asyncio.wait_for(daemon.process.wait(), 20.0) == 1
    failed = await hub.wait(lambda: daemon.newest("failed"), "the reason")
    assert "p2pd has ended (signal 9)" in failed["reason"]
    await hub.launch(daemon)
    await hub.wait_state([daemon], (0, 0))
    assert await hub.stop(daemon) == 0


def test_killed_p2pd_ends_the_swarm_process_which_can_be_started_again(tmp_path: Path) -> None:
    asyncio.run(asyncio.wait_for(_story(tmp_path), 60.0))


def _children() -> set[str]:
    pid = os.getpid()
    return set(Path(f"/proc/{pid}/task/{pid}/children").read_text().split())


def test_p2pd_of_a_start_that_is_cancelled_is_ended(tmp_path: Path) -> None:
    async def story() -> None:
        before = _children()
        creating = asyncio.create_task(start_host(tmp_path))
        while not _children() - before:
            assert not creating.done()
            await asyncio.sleep(0)
        for _ in range(20):  # beyond asyncio's own start of a process, which cleans up by itself
            await asyncio.sleep(0)
        creating.cancel()
        with pytest.raises(asyncio.CancelledError):
            await creating
        assert _children() == before

    asyncio.run(asyncio.wait_for(story(), 60.0))
