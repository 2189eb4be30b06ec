"""Three real swarm processes, one of which may only send a quarter of a megabit per second."""

import asyncio
import time
from pathlib import Path

import numpy as np
import pytest

from tests.peer.swarm.swarm_hub import NUM_VALUES, Daemon, Hub

LIMIT_MBIT = 0.25
NUM_STEPS_BEFORE, NUM_STEPS = 5, 8
VECTOR_SECONDS = 4 * NUM_VALUES * 8 / (LIMIT_MBIT * 1e6)
"""How long the slow member needs to send its vector once."""


async def _step(hub: Hub, members: list[Daemon], step: int) -> float:
    """Everybody contributes; returns the seconds until the quick ones have the next state."""
    rng = np.random.default_rng(step)
    begin_seconds = time.monotonic()
    for daemon in members:
        hub.contribute(daemon, rng.standard_normal(NUM_VALUES).astype(np.float32))
    await hub.wait_state(members[:2], (hub.incarnation, step), seconds=60.0)
    return time.monotonic() - begin_seconds


def _discarded(daemon: Daemon, step: int) -> list[str]:
    return [
        m["reason"]
        for m in daemon.messages
        if m["kind"] == "attempt_discarded" and m["outer_step"] == step
    ]


async def _story(folder: Path) -> None:
    hub = Hub(folder)
    hub.begin()
    members = [hub.add_daemon() for _ in range(3)]
    members[2].upload_limit_mbit = LIMIT_MBIT
    await asyncio.gather(*(hub.launch(daemon) for daemon in members))
    base = await hub.wait_state(members, (0, 0))
    quick = members[:2]
    hub.start_incarnation(quick, to_outer_step=0, base=base)
    hub.tell_all("incarnation", record=hub.record.SerializeToString())
    await hub.wait_state(members, (1, 0))
    for step in range(1, NUM_STEPS_BEFORE + 1):
        await _step(hub, quick, step)

    hub.issue_directive(members)
    hub.tell_all("directive", directive=hub.directive.SerializeToString())
    first = NUM_STEPS_BEFORE + 1
    await _step(hub, quick, first)  # it takes the directive into force
    await hub.wait_state(members, (1, first))
    seconds, num_attempts = [], []
    for step in range(first + 1, first + 1 + NUM_STEPS):
        seconds.append(await _step(hub, members, step))
        num_attempts.append(1 + max(len(_discarded(daemon, step)) for daemon in quick))
        reasons = [r for daemon in quick for r in _discarded(daemon, step)]
        assert not any("sent nothing" in reason for reason in reasons), reasons
        await hub.wait_state(members, (1, step), seconds=60.0)  # it follows, and has a vote
    assert max(num_attempts) <= 5, (num_attempts, seconds)
    assert sum(s < VECTOR_SECONDS / 4 for s in seconds) >= NUM_STEPS // 2, (num_attempts, seconds)
    for daemon in members:
        assert await hub.stop(daemon) == 0
    print([round(s, 1) for s in seconds], num_attempts)


@pytest.mark.slow
def test_a_slow_member_does_not_hold_up_the_swarm(tmp_path: Path) -> None:
    asyncio.run(_story(tmp_path))
