"""Keeps the own presence record fresh in the DHT, and learns the other members' addresses from
theirs.
"""

import asyncio
import logging

from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError, P2PHandlerError

from peer.swarm.address_book import AddressSource
from peer.swarm.dht import Dht
from peer.swarm.records import PRESENCE_EXPIRE_SECONDS, PresenceRecord
from peer.swarm.replica import Replica
from peer.swarm.transport import Transport

logger = logging.getLogger(__name__)

_RETRY_SECONDS = 5.0


async def keep_presence(dht: Dht, transport: Transport, replica: Replica, own_peer_id: str) -> None:
    """Publish and look up at a third of a record's life, for ever; sooner after a failure of p2pd
    or the network.
    """
    while True:
        try:
            await _renew(dht, transport, replica, own_peer_id)
            await asyncio.sleep(PRESENCE_EXPIRE_SECONDS / 3)
        except (P2PDaemonError, P2PHandlerError, OSError, TimeoutError) as error:
            logger.warning("presence was not renewed: %s", error or type(error).__name__)
            await asyncio.sleep(_RETRY_SECONDS)


async def _renew(dht: Dht, transport: Transport, replica: Replica, own_peer_id: str) -> None:
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
        if transport.is_member(peer_id):
            transport.add_addresses(peer_id, found.addresses, source=AddressSource.PRESENCE)
