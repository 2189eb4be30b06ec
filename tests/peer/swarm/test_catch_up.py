"""The way of a member to the newest state."""

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from peer.swarm.catch_up import CatchUp
from peer.swarm.state_server import StateServer
from peer.swarm.transport import Stream
from tests.peer.swarm.swarm_hub import Hub
from tests.peer.swarm.wire import Wire


@pytest.mark.parametrize(("outer_step", "num_moves"), [(0, 0), (3, 0), (3, 2)])
def test_a_newcomer_takes_the_swarms_state_and_no_base_that_was_left_behind(
    tmp_path: Path, outer_step: int, num_moves: int
) -> None:
    """It downloads once if the swarm is ahead, and nothing if it can build what the swarm holds. A
    donor that makes steps between its answer and the request is asked again.
    """

    async def story() -> None:
        hub, wire = Hub(tmp_path), Wire()
        hub.begin()
        voter, newcomer = hub.add_daemon(), hub.add_daemon()
        held, other = (hub.replica(daemon) for daemon in (voter, newcomer))
        held.enter_incarnation(hub.record)
        assert held.build_initial()
        hub.start_incarnation([voter], to_outer_step=0, base=held.state_digest)
        held.enter_incarnation(hub.record)
        assert held.rebase() and held.meta is not None and held.directive is not None

        def go_to(step: int) -> None:
            assert held.meta is not None and held.directive is not None
            vectors = tuple(vector + np.float32(1) for vector in held.vectors.state_vectors())
            held.load(replace(held.meta, outer_step=step), vectors, held.directive)

        if outer_step:
            go_to(outer_step)
        hub.issue_directive([voter], [newcomer])
        server = StateServer(held, wire, upload_limit_mbit=None)  # type: ignore[arg-type]
        moves = iter(range(outer_step + 1, outer_step + 1 + num_moves))

        async def serve(peer_id: str, stream: Stream) -> None:
            if (step := next(moves, None)) is not None:
                go_to(step)
            await server._on_snapshot(peer_id, stream)

        wire.handler_by_peer[voter.peer_id] = serve
        wire.server_by_peer[voter.peer_id] = server
        other.enter_incarnation(hub.record)
        other.learn_directive(hub.directive)
        catch_up = CatchUp(other, wire, own_peer_id=newcomer.peer_id)  # type: ignore[arg-type]
        assert await catch_up.rebase()
        assert (other.position, other.state_digest) == (held.position, held.state_digest)
        assert other.position == (1, outer_step + num_moves)
        assert (wire.received_bytes > 0) == (outer_step > 0)
        server.close()

    asyncio.run(story())
