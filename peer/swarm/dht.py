"""The run's DHT: a hivemind DHTNode on the transport's p2pd, in-process.

It survives the loss of any address it started from; new ones can be added at any time. Records are
signed by their owners (signed_records.py). Storing or finding a record took 30-40 ms with 16 nodes
on one machine.
"""

import asyncio
import logging
import time
from collections.abc import Iterable

from hivemind.dht.node import DHTNode
from hivemind.p2p import PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError, P2PHandlerError

from peer.swarm.records import (
    PRESENCE_EXPIRE_SECONDS,
    PresenceRecord,
    presence_from_plain,
    presence_key,
)
from peer.swarm.signed_records import OwnRecordsOnly
from peer.swarm.transport import PeerCallError, Transport
from protos.contract.signing import SigningKey

logger = logging.getLogger(__name__)

_LOOKUP_SECONDS = 10.0


class Dht:
    """Presence of members, published and looked up."""

    def __init__(self, node: DHTNode, transport: Transport, *, dht_prefix: str) -> None:
        self._node, self._transport = node, transport
        self._key = presence_key(dht_prefix)
        self._known_addresses: set[str] = set()

    @classmethod
    async def create(
        cls,
        transport: Transport,
        *,
        dht_prefix: str,
        initial_peers: Iterable[str],
        key: SigningKey | None = None,
    ) -> "Dht":
        """Start a node and introduce it to whoever of `initial_peers` can be reached; `key` signs
        the own record, None: publishes none.
        """
        node = await DHTNode.create(
            p2p=transport.p2p,
            ensure_bootstrap_success=False,
            strict=False,
            record_validator=OwnRecordsOnly(key),
        )
        dht = cls(node, transport, dht_prefix=dht_prefix)
        await dht.add_peers(initial_peers)
        return dht

    async def add_peers(self, addresses: Iterable[str]) -> int:
        """Introduce the node to more peers; returns how many answered."""
        new = [address for address in addresses if address not in self._known_addresses]
        answered = await asyncio.gather(*(self._introduce(address) for address in new))
        self._known_addresses.update(
            address for address, is_known in zip(new, answered, strict=True) if is_known
        )
        return sum(answered)

    async def _introduce(self, address: str) -> bool:
        try:
            identity = PeerID.from_base58(await self._transport.connect_address(address))
            if identity == self._transport.p2p.peer_id:
                return True
            answer = await self._node.protocol.call_ping(identity, validate=False)
        except (PeerCallError, P2PDaemonError, P2PHandlerError, ValueError, KeyError) as error:
            logger.debug("%s does not answer: %s", address, error)
            return False
        return answer is not None

    async def publish(self, record: PresenceRecord) -> bool:
        """Store the own record for a while; False if nobody took it."""
        stored: bool = await self._node.store(
            self._key,
            record.to_plain(),
            expiration_time=time.time() + PRESENCE_EXPIRE_SECONDS,
            subkey=record.peer_id,
        )
        return stored

    async def lookup(self) -> dict[str, PresenceRecord]:
        """Records of all members that are known now, by peer_id."""
        try:
            found = await asyncio.wait_for(self._node.get(self._key, latest=True), _LOOKUP_SECONDS)
        except TimeoutError:
            return {}
        if found is None or not isinstance(found.value, dict):
            return {}
        records = [presence_from_plain(key, item.value) for key, item in found.value.items()]
        return {record.peer_id: record for record in records if record is not None}

    async def close(self) -> None:
        """Stop the node; the transport stays."""
        await self._node.shutdown()
