"""Presence records in the DHT: where a member can be reached and how far it is.

They are signed by their owner (signed_records.py), and hints all the same: whoever answers at an
address proves its libp2p identity in the handshake and is checked against the signed roster. The
key holds the run's secret prefix.
"""

from dataclasses import dataclass

from protos.contract.addresses import problem_of_address
from protos.contract.ids import PeerId

PRESENCE_EXPIRE_SECONDS = 90.0
"""A record lives this long; it is renewed at a third of that."""

_MAX_ADDRESSES = 16
_MAX_ADDRESS_CHARS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class PresenceRecord:
    """What a member publishes about itself."""

    peer_id: str
    p2p_peer_id: str
    addresses: tuple[str, ...]
    incarnation: int
    outer_step: int

    def to_plain(self) -> dict[str, object]:
        """Form that travels in the DHT."""
        return {
            "p2p_peer_id": self.p2p_peer_id,
            "addresses": list(self.addresses),
            "incarnation": self.incarnation,
            "outer_step": self.outer_step,
        }


def presence_key(dht_prefix: str) -> str:
    """DHT key under which all members of a run publish; subkeys are peer_ids."""
    return f"{dht_prefix}.presence"


def presence_from_plain(peer_id: object, plain: object) -> PresenceRecord | None:
    """Record from what was found in the DHT, or None if it is anything else."""
    if not isinstance(peer_id, str) or not isinstance(plain, dict):
        return None
    p2p_peer_id, addresses = plain.get("p2p_peer_id"), plain.get("addresses")
    incarnation, outer_step = plain.get("incarnation"), plain.get("outer_step")
    if not isinstance(p2p_peer_id, str) or not isinstance(addresses, list):
        return None
    if not isinstance(incarnation, int) or not isinstance(outer_step, int):
        return None
    usable = [
        address
        for address in addresses
        if isinstance(address, str)
        and len(address) <= _MAX_ADDRESS_CHARS
        and not problem_of_address(address)
    ]
    return PresenceRecord(
        peer_id=PeerId(peer_id),
        p2p_peer_id=p2p_peer_id,
        addresses=tuple(usable[:_MAX_ADDRESSES]),
        incarnation=incarnation,
        outer_step=outer_step,
    )
