"""A contribution that comes too late is dropped without a word: its outcome has been told."""

import asyncio
from types import SimpleNamespace
from typing import Any

from peer.swarm.offers import Offers
from protos.contract.telemetry import RoundOutcome


class Told:
    """What a reporter was asked to say."""

    def __init__(self) -> None:
        self.outcomes: list[RoundOutcome] = []

    def outcome(self, outcome: RoundOutcome, *, reason: str) -> None:
        self.outcomes.append(outcome)


def test_a_late_contribution_gets_no_second_outcome() -> None:
    """By then the trainer may have offered the next one, which a second word would take for lost
    while this member has already committed to its bytes.
    """
    told = Told()
    shell: Any = SimpleNamespace(machine=None, checks=object(), own=None)
    replica: Any = SimpleNamespace(position=(1, 2))
    offers = Offers(shell, replica, told, own_peer_id="a")  # type: ignore[arg-type]
    late = {"incarnation": 1, "outer_step": 2, "ranges": [], "loss_nats": 1.0}

    async def scenario() -> None:
        await offers.contribution(late)  # between two rounds: held
        replica.position = (1, 3)  # a step was certified without it, and its outcome told
        shell.machine = object()
        await offers.renew()

    asyncio.run(scenario())
    assert told.outcomes == []
