"""Three real swarm processes whose pairs have lanes, and one of them killed in a round."""

import asyncio
import signal
from pathlib import Path

import pytest

from protos.contract.telemetry import RoundPhase
from tests.peer.swarm.faulted_swarm import FaultedSwarm
from tests.peer.swarm.swarm_hub import Daemon

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


class LanedSwarm(FaultedSwarm):
    """Every pair has lanes."""

    def _add(self) -> Daemon:
        daemon = super()._add()
        (daemon.home / "lanes").touch()
        return daemon

    def num_bundles(self, daemon: Daemon) -> int:
        """Made by a member since its first start."""
        return daemon.stderr_path.read_text().count(" connections")


def test_a_member_killed_while_its_bytes_are_on_lanes(tmp_path: Path) -> None:
    async def story() -> None:
        swarm = LanedSwarm(tmp_path)
        await swarm.start(3)
        before = {daemon.name: swarm.num_bundles(daemon) for daemon in swarm.members}
        assert all(num >= 2 for num in before.values()), before
        recovery = await swarm.strike(RoundPhase.REDUCE, signal.SIGKILL)
        guilty = recovery.attempts_lost - recovery.innocent_attempts_lost
        assert guilty <= 1, recovery
        for _ in range(3):
            await swarm.round_with_all()
        after = {daemon.name: swarm.num_bundles(daemon) for daemon in swarm.members}
        assert all(after[name] > before[name] for name in before), (before, after)
        await swarm.stop()

    asyncio.run(story())
