"""A rendezvous: a DHT node with a stable address and a circuit relay; it trains nothing and knows
no run.

Peers meet here first and find one another through the DHT; a running swarm does not need it any
more.
"""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

from peer.swarm.dht import Dht
from peer.swarm.transport import Transport

AddressesCallback = Callable[[list[str]], Awaitable[None]]


async def run_rendezvous(
    *,
    host: str,
    port: int,
    home: Path,
    on_addresses: AddressesCallback,
    announce: tuple[str, ...] = (),
    dht_prefix: str = "rendezvous",
    stop: asyncio.Event | None = None,
) -> None:
    """Run until `stop` is set or the task is cancelled; `on_addresses` is told the multiaddresses
    once.

    The identity under `home` (p2p.key, made at first use) keeps the address the same over restarts.
    """
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    transport = await Transport.create(
        home=home,
        identity_path=home / "p2p.key",
        prefix=dht_prefix,
        host=host,
        listen_port=port,
        announce=announce,
        is_relay=True,
    )
    try:
        dht = await Dht.create(transport, dht_prefix=dht_prefix, initial_peers=())
        await on_addresses(await transport.addresses())
        await (stop or asyncio.Event()).wait()
        await dht.close()
    finally:
        await transport.close()
