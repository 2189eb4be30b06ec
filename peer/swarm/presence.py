"""Keeps the own presence record fresh in the DHT, and learns the other members' addresses from
theirs.
"""

import asyncio

from peer.swarm.dht import Dht
from peer.swarm.records import PRESENCE_EXPIRE_SECONDS, PresenceRecord
from peer.swarm.replica import Replica
from peer.swarm.transport import Transport


async def keep_presence(dht: Dht, transport: Transport, replica: Replica, own_peer_id: str) -> None:
    """Publish and look up at a third of a record's life, for ever."""
    while True:
        incarnation, outer_step = replica.position
        record = PresenceRecord(
            peer_id=own_peer_id,
            p2p_peer_id=transport.p2p_peer_id,
            addresses=tuple(await transport.addresses()),
            incarnation=max(incarnation, 0),
            outer_step=max(outer_step, 0),
        )
        await dht.publish(record)
        for peer_id, found in (await dht.lookup()).items():
            if peer_id != own_peer_id:
                transport.add_addresses(peer_id, found.addresses)
        await asyncio.sleep(PRESENCE_EXPIRE_SECONDS / 3)
