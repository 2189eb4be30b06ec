"""A swarm process whose p2pd was killed ends with a reason, so that the daemon starts both anew."""

import asyncio
import os
import signal
from pathlib import Path

from tests.peer.swarm.swarm_hub import Hub


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
