"""Where members may be reached: by the signed roster, and by their own signed presence records.

What the roster says is kept apart and dialled along with the rest, so no record can displace it. A
member's newer record replaces its older one, so nothing grows.
"""

import logging
from collections.abc import Iterable
from enum import StrEnum

from hivemind.utils.multiaddr import Multiaddr

logger = logging.getLogger(__name__)

_MAX_ADDRESSES = 16
"""Of one member from one source."""
_MAX_BAD_ADDRESSES = 256
"""Remembered, so that each is told once; beyond that they are dropped without a word."""


class AddressSource(StrEnum):
    """Who says that a member is there; in the order in which they are dialled."""

    ROSTER = "ROSTER"
    PRESENCE = "PRESENCE"


class AddressBook:
    """Addresses of members by source."""

    def __init__(self) -> None:
        self._by_peer: dict[str, dict[AddressSource, tuple[str, ...]]] = {}
        self._bad: set[str] = set()

    def note(self, peer_id: str, addresses: Iterable[str], *, source: AddressSource) -> None:
        """Replace what a source says of a member; what is no address is left out, and a source that
        knows nothing usable changes nothing.
        """
        usable = [address for address in addresses if self._is_usable(peer_id, address)]
        if usable:
            known = self._by_peer.setdefault(peer_id, {})
            known[source] = tuple(dict.fromkeys(usable))[:_MAX_ADDRESSES]

    def addresses_of(self, peer_id: str) -> list[str]:
        """All that is known of a member, the roster's first."""
        known = self._by_peer.get(peer_id, {})
        return list(dict.fromkeys(a for source in AddressSource for a in known.get(source, ())))

    def _is_usable(self, peer_id: str, address: str) -> bool:
        if address in self._bad:
            return False
        try:
            Multiaddr(address)
        except ValueError as error:
            if len(self._bad) < _MAX_BAD_ADDRESSES:
                self._bad.add(address)
                reason = (str(error) or repr(error)).splitlines()[0][:200]
                logger.warning("an address of %s is of no use: %s", peer_id, reason)
            return False
        return True
