"""Every contribution gets one verdict, which names it."""

import asyncio
from types import SimpleNamespace
from typing import Any

from peer.swarm.offers import Offers
from protos.contract.telemetry import RoundOutcome


class Told:
    """What a reporter was asked to say."""

    def __init__(self) -> None:
        self.outcomes: list[tuple[RoundOutcome, int]] = []

    def outcome(self, outcome: RoundOutcome, *, reason: str, offer_number: int) -> None:
        self.outcomes.append((outcome, offer_number))


def offer(number: int, *, outer_step: int, state_digest: bytes = b"held") -> dict[str, Any]:
    return {
        "offer_number": number,
        "incarnation": 1,
        "outer_step": outer_step,
        "state_digest": state_digest,
        "ranges": [],
        "loss_nats": 1.0,
    }


def test_a_late_contribution_gets_the_one_verdict_that_names_it() -> None:
    """One that waits between two rounds is lost with the step that comes without it, and one that
    comes later still is refused by its own number: neither word can be taken for the next one's.
    """
    told = Told()
    shell: Any = SimpleNamespace(machine=None, checks=object(), own=None, has_work=False)
    replica: Any = SimpleNamespace(position=(1, 2), state_digest=b"held")
    offers = Offers(shell, replica, told, own_peer_id="a")  # type: ignore[arg-type]

    async def scenario() -> None:
        await offers.contribution(offer(1, outer_step=2))  # between two rounds: held
        replica.position = (1, 3)
        offers.lost("caught up with the swarm")
        shell.machine = object()
        await offers.renew()
        replica.position = (1, 4)
        offers.lost("caught up with the swarm")  # before the next contribution has come
        await offers.contribution(offer(2, outer_step=3))

    asyncio.run(scenario())
    lost = RoundOutcome.RESYNC
    assert told.outcomes == [(lost, 1), (lost, 0), (lost, 2)]


def test_work_on_a_state_that_was_replaced_is_refused() -> None:
    """It is of the same outer step: the digest alone tells."""
    told = Told()
    shell: Any = SimpleNamespace(machine=object(), checks=object(), own=None, has_work=False)
    replica: Any = SimpleNamespace(position=(1, 2), state_digest=b"held")
    offers = Offers(shell, replica, told, own_peer_id="a")  # type: ignore[arg-type]
    asyncio.run(offers.contribution(offer(1, outer_step=2, state_digest=b"replaced")))
    assert told.outcomes == [(RoundOutcome.RESYNC, 1)]
