"""Three real swarm processes, one of which nobody can dial: it takes part over connections that it
makes itself, and reduces nothing.
"""

import asyncio
import socket
from pathlib import Path

import numpy as np
import pytest

from tests.peer.swarm.swarm_hub import NUM_VALUES, Daemon, Hub

NUM_STEPS = 4
VECTOR_BYTES = 4 * NUM_VALUES


def _closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def _step(hub: Hub, members: list[Daemon], step: int) -> None:
    rng = np.random.default_rng(step)
    for daemon in members:
        hub.contribute(daemon, rng.standard_normal(NUM_VALUES).astype(np.float32))
    await hub.wait_state(members, (hub.incarnation, step), seconds=60.0)


def _sent_vectors(daemon: Daemon, step: int) -> float:
    """What a member sent in a committed round, in vectors; 0 if it was not in it."""
    found = [
        m["wire_sent_bytes"] / VECTOR_BYTES
        for m in daemon.messages
        if m["kind"] == "round_outcome"
        and m["outcome"] == "COMMITTED"
        and m["outer_step"] == step
        and m["num_peers"] == 3
    ]
    return found[0] if found else 0.0


async def _story(folder: Path) -> None:
    hub = Hub(folder)
    hub.begin()
    members = [hub.add_daemon() for _ in range(3)]
    hidden = members[2]
    hidden.announce = (f"/ip4/127.0.0.1/tcp/{_closed_port()}",)
    hidden.can_accept_connections = False
    await asyncio.gather(*(hub.launch(daemon) for daemon in members))
    assert [a.partition("/p2p/")[0] for a in hidden.addresses] == list(hidden.announce)
    base = await hub.wait_state(members, (0, 0))
    hub.start_incarnation(members, to_outer_step=0, base=base)
    hub.tell_all("incarnation", record=hub.record.SerializeToString())
    await hub.wait_state(members, (1, 0))
    for step in range(1, NUM_STEPS + 1):
        await _step(hub, members, step)
    sent = {s: [_sent_vectors(daemon, s) for daemon in members] for s in range(1, NUM_STEPS + 1)}
    together = [row for row in sent.values() if all(row)]
    assert len(together) >= NUM_STEPS - 1, f"the hidden member is left out of rounds: {sent}"
    for first, second, out in together:
        # it sends its own vector once; the two others share the reduction of three vectors
        assert 0.95 <= out <= 1.2, sent
        assert min(first, second) >= 1.25 and first + second >= 2.9, sent
    for daemon in members:
        assert await hub.stop(daemon) == 0


@pytest.mark.slow
def test_a_member_that_nobody_can_dial_takes_part_and_reduces_nothing(tmp_path: Path) -> None:
    asyncio.run(_story(tmp_path))
