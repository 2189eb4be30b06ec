"""Two hosts that dial each other at once: a collision is waited out, a refusal told at once."""

import asyncio
from typing import Any

import pytest
from hivemind.p2p import PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError

from peer.swarm.dialling import DialError, Dialler

LOW, HIGH = sorted((PeerID(b"\x12\x20" + bytes([i]) * 32) for i in (1, 200)), key=PeerID.to_base58)
COLLISION = "all dials failed * [/ip4/10.0.0.1/tcp/1] failed to negotiate security protocol: read"
BACK_OFF = "all dials failed * [/ip4/10.0.0.1/tcp/1] dial backoff"
REFUSED = "all dials failed * [/ip4/10.0.0.1/tcp/1] connect: connection refused"


class Network:
    """A daemon's answers: each dial fails with the next reason, then there is a connection."""

    def __init__(self, own: PeerID, other: PeerID, reasons: list[str]) -> None:
        self.peer_id, self._other, self._reasons = own, other, reasons
        self._client = self
        self.is_connected = False
        self.num_dials = self.num_looks = self.looks_until_dialled = 0
        self.answers = asyncio.Event()
        self.answers.set()

    async def connect(self, identity: PeerID, maddrs: Any) -> None:
        self.num_dials += 1
        await self.answers.wait()
        if self._reasons:
            raise P2PDaemonError(self._reasons.pop(0))
        self.is_connected = True

    async def list_peers(self) -> list[Any]:
        self.num_looks += 1
        self.is_connected |= self.num_looks == self.looks_until_dialled
        return [type("Peer", (), {"peer_id": self._other})] if self.is_connected else []


def _dialler(own: PeerID, other: PeerID, *reasons: str) -> tuple[Dialler, Network]:
    network: Any = Network(own, other, list(reasons))
    return Dialler(network), network


async def _meet(dialler: Dialler, other: PeerID) -> None:
    await dialler.meet(other, [], timeout_seconds=5.0)


def test_a_collision_is_dialled_again_until_the_back_off_ends() -> None:
    dialler, network = _dialler(LOW, HIGH, COLLISION, BACK_OFF, BACK_OFF)
    asyncio.run(_meet(dialler, HIGH))
    assert network.num_dials == 4 and network.is_connected


def test_back_off_of_somebody_never_met_may_be_a_collision_that_we_have_not_seen() -> None:
    dialler, network = _dialler(LOW, HIGH, BACK_OFF)
    asyncio.run(_meet(dialler, HIGH))
    assert network.num_dials == 2


@pytest.mark.parametrize("reasons", [(REFUSED,), (COLLISION, REFUSED)])
def test_a_refused_connection_is_told_at_once(reasons: tuple[str, ...]) -> None:
    dialler, network = _dialler(LOW, HIGH, *reasons, BACK_OFF)
    with pytest.raises(DialError, match="refused"):
        asyncio.run(_meet(dialler, HIGH))
    with pytest.raises(DialError, match="backoff"):
        asyncio.run(_meet(dialler, HIGH))
    assert network.num_dials == len(reasons) + 1


def test_a_member_that_died_is_not_taken_for_a_collision() -> None:
    dialler, network = _dialler(LOW, HIGH)
    asyncio.run(_meet(dialler, HIGH))
    network.is_connected, network._reasons = False, [BACK_OFF]
    with pytest.raises(DialError):
        asyncio.run(_meet(dialler, HIGH))


def test_the_higher_identity_is_dialled() -> None:
    async def run() -> None:
        dialler, network = _dialler(HIGH, LOW)
        network.looks_until_dialled = 3
        await asyncio.gather(_meet(dialler, LOW), _meet(dialler, LOW))
        assert network.num_dials == 0 and network.num_looks == 3, "both wait for one connection"

    asyncio.run(run())


def test_a_caller_without_patience_is_told_and_the_dial_goes_on() -> None:
    async def run() -> None:
        dialler, network = _dialler(LOW, HIGH, COLLISION)
        with pytest.raises(DialError, match="within 0.0 s"):
            await dialler.meet(HIGH, [], timeout_seconds=5.0, patience_seconds=0.01)
        assert not network.is_connected
        await _meet(dialler, HIGH)
        assert network.is_connected and network.num_dials == 2

    asyncio.run(run())


def test_a_dial_that_takes_too_long_is_still_heard_to_its_end() -> None:
    """p2pd answers later; its connection, broken off before that, would stay open for good with a
    Python older than 3.11.5.
    """

    async def run() -> None:
        dialler, network = _dialler(LOW, HIGH)
        network.answers.clear()
        with pytest.raises(DialError, match="no connection within"):
            await dialler.connect(HIGH, [], timeout_seconds=0.01)
        network.answers.set()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert network.is_connected

    asyncio.run(run())
