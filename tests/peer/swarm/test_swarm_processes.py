"""Three real swarm processes on loopback, then two, a newcomer, a restart and a rollback; a
stranger all the while.
"""

import asyncio
from pathlib import Path

import numpy as np
import pytest

from peer.swarm.state_transfer import SNAPSHOT_STREAM, STATE_INFO_CALL
from peer.swarm.transport import PeerCallError, StreamError
from protos.muster.v1 import rounds_pb2, state_pb2
from tests.peer.swarm.p2p_hosts import start_host
from tests.peer.swarm.single_process import Expected
from tests.peer.swarm.swarm_hub import (
    NUM_VALUES,
    SEQ_LEN,
    WINDOWS,
    Daemon,
    Hub,
)


async def _round(
    hub: Hub,
    members: list[Daemon],
    step: int,
    expected: Expected | None = None,
    voteless: Daemon | None = None,
) -> bytes:
    """Everybody contributes; returns the digest that all of them reach.

    A group need not wait for a member without a vote: it may be left out, and then catches up to
    the same state and hears RESYNC.
    """
    rng = np.random.default_rng(step)
    parts: dict[str, tuple[np.ndarray, int]] = {}
    for index, daemon in enumerate(members):
        values = rng.standard_normal(NUM_VALUES).astype(np.float32)
        num_windows = WINDOWS + index
        parts[daemon.peer_id] = (values, num_windows * SEQ_LEN)
        hub.contribute(daemon, values, num_windows)
    digest = await hub.wait_state(members, (hub.incarnation, step))
    for daemon in members:
        outcome = await hub.wait(
            lambda d=daemon: (o := d.newest("round_outcome")) and o["outer_step"] == step and o,
            "outcome",
        )
        is_allowed = outcome["outcome"] == "RESYNC" and daemon is voteless
        assert outcome["outcome"] == "COMMITTED" or is_allowed, outcome
    if expected is not None:
        expected.apply(step, parts)
        for daemon in members:
            assert np.array_equal(daemon.vectors.params, expected.params)
            assert np.array_equal(daemon.vectors.state_vectors()[2], expected.exp_avg_sq)
    return digest


async def _check_stranger(hub: Hub, folder: Path, victim: Daemon) -> None:
    """Somebody who knows address and prefix gets neither an answer nor a byte."""
    stranger = await start_host(folder, prefix="swarmtest")
    try:
        stranger.set_members({victim.peer_id: victim.p2p_peer_id})
        stranger.add_addresses(victim.peer_id, victim.addresses)
        for name, message, answer in (
            ("round", rounds_pb2.RoundMessage(), rounds_pb2.RoundAck),
            (STATE_INFO_CALL, state_pb2.StateInfoRequest(), state_pb2.StateInfoResponse),
        ):
            with pytest.raises(PeerCallError, match="not a member"):
                await stranger.call(victim.peer_id, name, message, answer)
        stream = await stranger.open_stream(victim.peer_id, SNAPSHOT_STREAM)
        with pytest.raises(StreamError):
            await stream.send_message(state_pb2.SnapshotRequest(incarnation=1, outer_step=1))
            await stream.read_message(state_pb2.SnapshotHeader)
        assert stranger.received_bytes == 0
    finally:
        await stranger.close()


async def _story(folder: Path) -> None:
    hub = Hub(folder)
    first, second, third = members = [hub.add_daemon() for _ in range(3)]
    await hub.found(members)
    expected = Expected()
    for step in (1, 2, 3):
        await _round(hub, members, step, expected)
    await _check_stranger(hub, folder / "stranger", first)

    await hub.kill(third)
    await _round(hub, [first, second], 4)

    newcomer = hub.add_daemon()
    hub.issue_directive([first, second, third], [newcomer])
    hub.tell_all("directive", directive=hub.directive.SerializeToString())
    await _round(hub, [first, second], 5)
    await hub.launch(newcomer)
    await hub.wait_state([first, newcomer], (1, 5))
    await _round(hub, [first, second, newcomer], 6, voteless=newcomer)

    hub.issue_directive([first, second])
    hub.tell_all("directive", directive=hub.directive.SerializeToString())
    await _round(hub, [first, second, newcomer], 7, voteless=newcomer)
    await hub.kill(second)
    await _round(hub, [first], 8)

    await hub.launch(second)
    hub.is_coordinator_up = False
    digest = await hub.wait_state([first, second], (1, 8))
    await _round(hub, [first, second], 9)
    hub.is_coordinator_up = True

    hub.start_incarnation(
        [first, second], to_outer_step=9, base=first.newest("state")["state_digest"]
    )
    assert digest != first.newest("state")["state_digest"]
    hub.tell_all("incarnation", record=hub.record.SerializeToString())
    await hub.wait_state([first, second], (2, 9))
    await _round(hub, [first, second], 10)
    for daemon in (first, second, newcomer):
        assert await hub.stop(daemon) == 0
        assert not list((daemon.home / "run").glob("*.sock"))


@pytest.mark.slow
def test_story_of_a_swarm(tmp_path: Path) -> None:
    asyncio.run(_story(tmp_path))
