"""Three real swarm processes, one of which nobody can dial: it takes part over connections that it
makes itself, and reduces nothing.
"""

import asyncio
import socket
from pathlib import Path

import numpy as np
import pytest

from peer.ipc import Message
from tests.peer.swarm.swarm_hub import NUM_VALUES, Daemon, Hub

NUM_ROUNDS = 3
"""Of all three members, before the verdict."""
MOST_STEPS = 12
"""On a busy machine a round may form before its third member's work has come."""
VECTOR_BYTES = 4 * NUM_VALUES


def _closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def _sent_vectors(hub: Hub, members: list[Daemon], step: int) -> list[float]:
    """Make one outer step; what each member sent in it, in vectors, if all were in its round."""
    rng = np.random.default_rng(step)
    for daemon in members:
        hub.contribute(daemon, rng.standard_normal(NUM_VALUES).astype(np.float32))
    await hub.wait_state(members, (hub.incarnation, step), seconds=60.0)

    def outcomes() -> list[Message] | None:
        newest = [daemon.newest("round_outcome") for daemon in members]
        told = [m for m in newest if m is not None and m["outer_step"] == step]
        return told if len(told) == len(members) else None

    told = await hub.wait(outcomes, f"outcome of outer step {step}")
    if any(m["outcome"] != "COMMITTED" or m["num_peers"] != len(members) for m in told):
        return []
    return [m["wire_sent_bytes"] / VECTOR_BYTES for m in told]


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
    together: list[list[float]] = []
    for step in range(1, MOST_STEPS + 1):
        if sent := await _sent_vectors(hub, members, step):
            together.append(sent)
        if len(together) == NUM_ROUNDS:
            break
    assert len(together) == NUM_ROUNDS, f"the hidden member is left out of rounds: {together}"
    for first, second, out in together:
        # it sends its own vector once; the two others share the reduction of three vectors
        assert 0.95 <= out <= 1.2, together
        assert min(first, second) >= 1.25 and first + second >= 2.9, together
    for daemon in members:
        assert await hub.stop(daemon) == 0


@pytest.mark.slow
def test_a_member_that_nobody_can_dial_takes_part_and_reduces_nothing(tmp_path: Path) -> None:
    asyncio.run(_story(tmp_path))
