"""What the shell says of a reduction that moves, while no round was measured."""

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import pytest

from peer.swarm import round_shell
from peer.swarm import round_types as rt
from peer.swarm.pace import MOST_REDUCE_SECONDS
from peer.swarm.round_shell import RoundShell


def _shell(reduction: Any, posted: list[rt.Event]) -> Any:
    return SimpleNamespace(
        place=(1, 7),
        _place=lambda: (1, 7),
        _current=reduction,
        _post=lambda place, event: posted.append(event),
    )


def _reduction(begin_seconds: float) -> Any:
    return SimpleNamespace(
        place=(1, 7, 2), num_moved=0, has_failed=False, begin_seconds=begin_seconds
    )


async def _let_others_run() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def test_every_look_that_finds_pieces_moved_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(round_shell, "_MOVES_SECONDS", 0.0)
    posted: list[rt.Event] = []

    async def body() -> None:
        reduction = _reduction(time.monotonic())
        shell = _shell(reduction, posted)
        watching = asyncio.ensure_future(RoundShell._watch_moves(shell, reduction))
        await _let_others_run()
        assert posted == [], "nothing has moved"
        for number in (1, 2):
            reduction.num_moved += 3
            await _let_others_run()
            assert posted == [rt.ReduceMoved(2)] * number, "once for what has moved since"
        reduction.has_failed = True
        await asyncio.wait_for(watching, 5.0)

    asyncio.run(body())


def test_an_hour_is_the_most(monkeypatch: pytest.MonkeyPatch) -> None:
    posted: list[rt.Event] = []

    async def body() -> None:
        reduction = _reduction(time.monotonic() - MOST_REDUCE_SECONDS)
        reduction.num_moved = 1
        shell = _shell(reduction, posted)
        await asyncio.wait_for(RoundShell._watch_moves(shell, reduction), 5.0)

    asyncio.run(body())
    assert posted == []
