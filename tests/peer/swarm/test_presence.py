"""Presence outlives failures of p2pd; a record in the DHT brings only addresses that can be
dialled, and what is none of a member stops nobody.
"""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError
from hivemind.utils.multiaddr import Multiaddr

from peer.swarm import presence
from peer.swarm.presence import keep_presence
from peer.swarm.records import presence_from_plain
from protos.contract.addresses import problem_of_address
from protos.muster.v1 import rounds_pb2
from tests.contract.test_addresses import GOOD
from tests.peer.swarm.p2p_hosts import start_host


class _Dht:
    """Fails once."""

    def __init__(self) -> None:
        self.num_published = 0
        self.again = asyncio.Event()

    async def publish(self, record: Any) -> bool:
        self.num_published += 1
        if self.num_published == 1:
            raise P2PDaemonError("the stream was reset")
        self.again.set()
        return True

    async def lookup(self) -> dict[str, Any]:
        return {}


class _Here:
    p2p_peer_id = "Qm"
    position = (1, 2)

    async def addresses(self) -> list[str]:
        return []


def test_presence_goes_on_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence, "_RETRY_SECONDS", 0.01)
    here: Any = _Here()

    async def run() -> None:
        dht: Any = _Dht()
        task = asyncio.ensure_future(keep_presence(dht, here, here, "own"))
        await asyncio.wait_for(dht.again.wait(), 5.0)
        assert not task.done()
        task.cancel()

    asyncio.run(run())


def test_a_record_brings_only_what_can_be_dialled() -> None:
    plain = {
        "p2p_peer_id": "Qm",
        "addresses": ["/ip4/my-host.example/tcp/4001", "/ip4/1.2.3.4/tcp/5", 7],
        "incarnation": 1,
        "outer_step": 1,
    }
    record = presence_from_plain("peer", plain)
    assert record is not None and record.addresses == ("/ip4/1.2.3.4/tcp/5",)


@pytest.mark.parametrize("address", GOOD)
def test_the_library_reads_whatever_the_contract_lets_pass(address: str) -> None:
    assert problem_of_address(address) == ""
    assert str(Multiaddr(address)) == address


async def _meet(folder: Path) -> None:
    hosts = []
    for name in "ab":
        hosts.append(await start_host(folder / name))
    first, second = hosts
    answer = rounds_pb2.RoundAck(outer_step=7)

    async def on_message(peer_id: str, message: Any) -> rounds_pb2.RoundAck:
        return answer

    await second.serve_messages("round", on_message, rounds_pb2.RoundMessage)
    first.set_members({"b": second.p2p_peer_id})
    second.set_members({"a": first.p2p_peer_id})
    first.add_addresses("b", ["/ip4/my-host.example/tcp/4001", *await second.addresses()])
    found = await first.call("b", "round", rounds_pb2.RoundMessage(), rounds_pb2.RoundAck)
    assert found == answer
    for host in hosts:
        await host.close()


def test_a_bad_address_of_a_member_does_not_hide_the_good_ones(tmp_path: Path) -> None:
    asyncio.run(_meet(tmp_path))
