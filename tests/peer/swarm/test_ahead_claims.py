"""A member that says that it is further holds nobody up for long if it is not."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from peer.swarm import node as node_module
from peer.swarm.ahead_claims import AheadClaims
from peer.swarm.node import SwarmNode


def test_vain_claims_are_heard_ever_more_seldom_and_right_ones_at_once() -> None:
    claims, looks, now = AheadClaims(), [], 0.0
    while now < 200.0:
        claims.heard("liar", now)
        if claims.is_due(now):
            looks.append(now)
            claims.looked(now, is_found=False)
        now += 0.1
    assert len(looks) < 16 and looks[1] - looks[0] < 1.0
    claims.heard("liar", now)
    assert not claims.is_due(now + 5.0)
    claims.heard("honest", now)
    assert not claims.is_due(now + 0.2) and claims.is_due(now + 0.4)
    claims.looked(now, is_found=True)
    claims.heard("honest", now)
    assert claims.is_due(now + 0.4)
    claims.clear()
    assert not claims.is_due(now + 9.0)


def test_a_silent_member_that_says_it_is_further_does_not_hold_up_rounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each look waits 5 s for its answer, and nothing of the round happens meanwhile."""
    clock, looked_seconds = [100.0], [0.0]
    monkeypatch.setattr(node_module, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    async def go_forward(*, is_short: bool) -> bool:
        clock[0] += 5.0
        looked_seconds[0] += 5.0
        return False

    async def live() -> None:
        node: Any = SwarmNode.__new__(SwarmNode)
        node._catch_up = SimpleNamespace(newer_record=None)
        node._replica = SimpleNamespace(is_current=True, position=(1, 7))
        node._next_save_seconds = float("inf")
        node._shell = SimpleNamespace(
            machine=object(), refused_reason="", behind=None, committed=None
        )
        node._target_step, node._next_settle_seconds = 7, 0.0
        node._ahead, node._go_forward = AheadClaims(), go_forward
        while clock[0] < 400.0:
            node._shell.behind = SimpleNamespace(peer_id="liar")
            await node._settle()
            await node._after_event()
            clock[0] += 0.1

    asyncio.run(live())
    assert looked_seconds[0] < 80.0
