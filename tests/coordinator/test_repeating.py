"""A turn that fails in whatever way is logged and counted, and the next one is taken."""

import asyncio
import logging

import pytest

from coordinator.repeating import Repeating
from protos.contract.errors import UnavailableError


class _Chore(Repeating):
    """Fails in a way that was foreseen, then in one that was not, then works."""

    def __init__(self) -> None:
        super().__init__("chore", pause_seconds=0.0)
        self.num_turns = 0
        self.has_worked = asyncio.Event()

    async def turn(self) -> None:
        self.num_turns += 1
        if self.num_turns == 1:
            raise UnavailableError("no answer", allowed="an answer", remedy="try again")
        if self.num_turns == 2:
            raise OSError("disk full")
        if self.num_turns == 3:
            raise ZeroDivisionError("never thought of")
        self.has_worked.set()


def test_a_failed_turn_is_told_and_the_next_one_is_taken(caplog: pytest.LogCaptureFixture) -> None:
    async def body() -> _Chore:
        chore = _Chore()
        chore.start()
        await asyncio.wait_for(chore.has_worked.wait(), 10.0)
        await chore.stop()
        num_turns = chore.num_turns
        await asyncio.sleep(0)
        assert chore.num_turns == num_turns, "nothing is done after stop"
        return chore

    with caplog.at_level(logging.WARNING):
        chore = asyncio.run(body())
    assert chore.num_failed_turns == 3
    found = [(record.levelno, record.getMessage().partition(";")[0]) for record in caplog.records]
    assert found[1:] == [(logging.WARNING, "chore: disk full"), (logging.ERROR, "chore failed")]
    assert found[0][0] == logging.WARNING and "no answer" in found[0][1]
    assert "never thought of" in caplog.text
