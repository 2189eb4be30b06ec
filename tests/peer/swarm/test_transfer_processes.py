"""A newcomer downloads from three real members, is killed and goes on; then a donor is killed."""

import asyncio
import re
from pathlib import Path

import numpy as np
import pytest

from tests.peer.swarm.swarm_hub import NUM_VALUES, WINDOWS, Daemon, Hub

SLOW_UPLOAD_MBIT = 6.0
"""Half of it serves newcomers: the 3 MB of this state take a few seconds from three members."""
NEWEST_STEP = 6
"""More than the averaged bytes that members keep, so that the newcomer needs the whole state."""
_PROGRESS = re.compile(r"state 1/6: (\d+) of (\d+) pieces from (\d+) members")


def _progress(daemon: Daemon, *, num_members: int = 1, num_held: int = 0) -> tuple[int, int] | None:
    """(held, all) pieces of the newest report of a download with at least so much in it."""
    for message in reversed(daemon.messages):
        found = _PROGRESS.match(message.get("reason", "")) if message["kind"] == "phase" else None
        if found is not None:
            held, total, members = (int(text) for text in found.groups())
            return (held, total) if members >= num_members and held >= num_held else None
    return None


async def _round(hub: Hub, members: list[Daemon], step: int) -> bytes:
    rng = np.random.default_rng(step)
    for daemon in members:
        hub.contribute(daemon, rng.standard_normal(NUM_VALUES).astype(np.float32), WINDOWS)
    return await hub.wait_state(members, (hub.incarnation, step))


async def _story(folder: Path) -> None:
    hub = Hub(folder)
    hub.begin()
    members = [hub.add_daemon() for _ in range(3)]
    for daemon in members:
        daemon.upload_limit_mbit = SLOW_UPLOAD_MBIT
    await asyncio.gather(*(hub.launch(daemon) for daemon in members))
    base = await hub.wait_state(members, (0, 0))
    hub.start_incarnation(members, to_outer_step=0, base=base)
    hub.tell_all("incarnation", record=hub.record.SerializeToString())
    await hub.wait_state(members, (1, 0))
    await _round(hub, members, 1)
    newcomer = hub.add_daemon()
    hub.issue_directive(members, [newcomer])
    hub.tell_all("directive", directive=hub.directive.SerializeToString())
    for step in range(2, NEWEST_STEP + 1):
        await _round(hub, members, step)

    await hub.launch(newcomer)
    held, total = await hub.wait(
        lambda: _progress(newcomer, num_members=3, num_held=3), "three donors at work"
    )
    assert 3 <= held < total
    await hub.kill(newcomer)
    await hub.launch(newcomer)
    again, _ = await hub.wait(lambda: _progress(newcomer), "the download goes on")
    assert again >= held, "what was there is not fetched again"
    await hub.kill(members[2])
    digest = await hub.wait_state([*members[:2], newcomer], (1, NEWEST_STEP))
    assert newcomer.newest("state")["state_digest"] == digest
    for mine, theirs in zip(
        newcomer.vectors.state_vectors(), members[0].vectors.state_vectors(), strict=True
    ):
        assert np.array_equal(mine, theirs)
    assert not list((newcomer.home / "state").rglob("incoming.*"))
    await _round(hub, [*members[:2], newcomer], NEWEST_STEP + 1)
    for daemon in (*members[:2], newcomer):
        assert await hub.stop(daemon) == 0


@pytest.mark.slow
def test_newcomer_killed_and_donor_killed_in_a_download(tmp_path: Path) -> None:
    asyncio.run(_story(tmp_path))
