"""A stranger with the run's secret key for the DHT cannot poison it: nobody writes, replaces or
prolongs another's record, and no record displaces the roster's addresses.
"""

import asyncio
import dataclasses
import time
from pathlib import Path

import pytest
from hivemind.dht.node import DHTNode
from hivemind.dht.routing import DHTID
from hivemind.dht.validation import DHTRecord
from hivemind.utils import MSGPackSerializer

from peer.swarm.address_book import AddressBook, AddressSource
from peer.swarm.dht import Dht
from peer.swarm.records import PresenceRecord, presence_key
from peer.swarm.signed_records import OwnRecordsOnly
from protos.contract.signing import SigningKey
from tests.peer.swarm.p2p_hosts import start_host

OWNER, STRANGER = SigningKey(b"\x01" * 32), SigningKey(b"\x02" * 32)
TRUE = ("/ip4/192.0.2.7/tcp/4001",)
FALSE = ("/ip4/192.0.2.66/tcp/9",)
PREFIX = "secret"


def signed(key: SigningKey, *, subkey: str, value: object = 7, expire: float = 1e9) -> DHTRecord:
    plain = DHTRecord(b"k", MSGPackSerializer.dumps(subkey), MSGPackSerializer.dumps(value), expire)
    return dataclasses.replace(plain, value=OwnRecordsOnly(key).sign_value(plain))


def test_only_the_owner_writes_its_record() -> None:
    rule = OwnRecordsOnly(None)
    good = signed(OWNER, subkey=OWNER.peer_id)
    assert rule.validate(good)
    assert MSGPackSerializer.loads(rule.strip_value(good)) == 7
    assert not rule.validate(signed(STRANGER, subkey=OWNER.peer_id))
    for change in (
        {"key": b"other"},
        {"subkey": MSGPackSerializer.dumps(STRANGER.peer_id)},
        {"subkey": MSGPackSerializer.dumps(None)},  # a plain value in place of the dictionary
        {"value": good.value[:-1] + b"\x08"},
        {"value": STRANGER.public_key + good.value[32:]},
        {"value": b""},
        {"value": good.value[:96]},
        {"expiration_time": 2e9},
        {"value": good.value + bytes(9000)},
    ):
        assert not rule.validate(dataclasses.replace(good, **change)), change


@pytest.mark.parametrize(
    "value", [b"\xc1", b"\x81\x01", b"\x81\x90\x01", b"\xc7\x01\x50\x07", b"\xc7\x01\x40\x07"]
)
def test_a_value_that_no_reader_gets_through_is_refused_though_its_owner_signed_it(
    value: bytes,
) -> None:
    """The search would never end, for nobody: one record would hide all others."""
    plain = DHTRecord(b"k", MSGPackSerializer.dumps(str(STRANGER.peer_id)), value, 1e9)
    rule = OwnRecordsOnly(STRANGER)
    assert not rule.validate(dataclasses.replace(plain, value=rule.sign_value(plain)))


def record_of(key: SigningKey, addresses: tuple[str, ...]) -> PresenceRecord:
    return PresenceRecord(
        peer_id=key.peer_id, p2p_peer_id="Qm", addresses=addresses, incarnation=1, outer_step=1
    )


async def _store_what_nobody_reads(node: DHTNode, key: str, expiration_time: float) -> None:
    """Under the stranger's own name, rightly signed."""
    subkey = MSGPackSerializer.dumps(str(STRANGER.peer_id))
    key_id = DHTID.generate(source=key)
    plain = DHTRecord(key_id.to_bytes(), subkey, b"\xc1", expiration_time)
    value = OwnRecordsOnly(STRANGER).sign_value(plain)
    for peer in list(node.protocol.routing_table.uid_to_peer_id.values()):
        await node.protocol.call_store(
            peer, [key_id], [value], [expiration_time], subkeys=[str(STRANGER.peer_id)]
        )


async def _poison(folder: Path) -> None:
    hosts = [await start_host(folder / name) for name in ("owner", "reader", "stranger")]
    owner = await Dht.create(hosts[0], dht_prefix=PREFIX, initial_peers=(), key=OWNER)
    meeting = await hosts[0].addresses()
    reader = await Dht.create(hosts[1], dht_prefix=PREFIX, initial_peers=meeting)
    stranger = await DHTNode.create(p2p=hosts[2].p2p, ensure_bootstrap_success=False, strict=False)
    for host in hosts[:2]:
        for address in await host.addresses():
            await hosts[2].connect_address(address)
            await stranger.protocol.call_ping(host.p2p.peer_id, validate=False)
    assert await owner.publish(record_of(OWNER, TRUE))
    later = time.time() + 1000.0
    false, key = record_of(OWNER, FALSE).to_plain(), presence_key(PREFIX)
    copied = MSGPackSerializer.dumps(false)
    for value in (false, OWNER.public_key + bytes(64) + copied):
        await stranger.store(key, value, expiration_time=later, subkey=OWNER.peer_id)
    await stranger.store(key, false, expiration_time=later)
    await _store_what_nobody_reads(stranger, key, later)
    for dht in (owner, reader):
        found = await dht.lookup()
        assert {peer: record.addresses for peer, record in found.items()} == {OWNER.peer_id: TRUE}
    moved = record_of(OWNER, FALSE)  # its owner may
    await owner.publish(moved)  # what the stranger says of its own copy does not count
    assert (await reader.lookup())[OWNER.peer_id] == moved
    await stranger.shutdown()
    for dht in (owner, reader):
        await dht.close()
    for host in hosts:
        await host.close()


def test_a_stranger_does_not_poison_the_dht(tmp_path: Path) -> None:
    asyncio.run(asyncio.wait_for(_poison(tmp_path), 60.0))


def test_no_record_displaces_the_rosters_addresses() -> None:
    book = AddressBook()
    book.note("peer", TRUE, source=AddressSource.ROSTER)
    for number in range(50):
        many = [f"/ip4/192.0.2.66/tcp/{1 + number * 20 + i}" for i in range(20)]
        book.note("peer", many, source=AddressSource.PRESENCE)
    found = book.addresses_of("peer")
    assert found[0] == TRUE[0] and len(found) == 17
    assert found[1:] == many[:16], "the newest record alone counts"
    book.note("peer", ["no address"], source=AddressSource.ROSTER)
    assert book.addresses_of("peer") == found
    assert book.addresses_of("stranger") == []
