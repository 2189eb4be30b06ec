"""Real libp2p hosts on loopback, for tests that need no swarm process."""

from pathlib import Path
from typing import Any

from peer.swarm.transport import Transport
from tests.peer.swarm.p2p_keys import write_p2p_key


async def start_host(home: Path, *, prefix: str = "test", **options: Any) -> Transport:
    """A host with an identity of its own in `home`, which is made if need be."""
    home.mkdir(exist_ok=True)
    write_p2p_key(home / "p2p.key")
    return await Transport.create(
        home=home,
        identity_path=home / "p2p.key",
        prefix=prefix,
        host="127.0.0.1",
        listen_port=0,
        **options,
    )


async def introduce(hosts: dict[str, Transport]) -> None:
    """Make every host, by name, a member for all others, which know its addresses."""
    for name, host in hosts.items():
        others = {other: found for other, found in hosts.items() if other != name}
        host.set_members({other: found.p2p_peer_id for other, found in others.items()})
        for other, found in others.items():
            host.add_addresses(other, await found.addresses())
