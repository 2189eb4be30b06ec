"""`muster-peer rendezvous`: the first address of a swarm's DHT and a circuit relay; it trains
nothing.
"""

from pathlib import Path
from typing import Annotated

import typer

from peer.cli.options import AsJson, HomeDir, print_json, print_line, set_up_logging
from peer.cli.ports import require_free_port


def rendezvous(
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "0.0.0.0",
    port: Annotated[int, typer.Option(help="TCP port; 0: any.", min=0, max=65535)] = 0,
    announce: Annotated[
        list[str] | None, typer.Option(help="Multiaddress to announce; may be repeated.")
    ] = None,
    home: HomeDir = None,
    is_json: AsJson = False,
    log_level: Annotated[str, typer.Option(help="DEBUG, INFO, WARNING or ERROR.")] = "WARNING",
) -> None:
    """Run a meeting point for peers until SIGTERM.

    Its identity lies in its home, so the address stays the same over restarts.
    """
    import asyncio

    from peer.config import check_announced, load_config, mark_descendants
    from peer.home import Home
    from peer.parent_death import end_process

    config = load_config(flags={"home": home, "log_level": log_level})
    for address in announce or ():
        check_announced(address)
    require_free_port(host, port, host_flag="--host", port_flag="--port")
    set_up_logging(config.log_level)
    locked = Home.open(config.home)
    try:
        locked.clean_leftovers()
        mark_descendants(locked.owner_mark)
        asyncio.run(
            _serve(
                host=host,
                port=port,
                announce=tuple(announce or ()),
                home=config.home,
                is_json=is_json,
            )
        )
    finally:
        locked.close()
    end_process(0)


async def _serve(
    *, host: str, port: int, announce: tuple[str, ...], home: Path, is_json: bool
) -> None:
    import asyncio
    import signal

    from peer.swarm.rendezvous import run_rendezvous

    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)

    async def on_addresses(addresses: list[str]) -> None:
        if is_json:
            print_json({"addresses": addresses})
        else:
            for address in addresses:
                print_line(address)

    await run_rendezvous(
        host=host, port=port, home=home, on_addresses=on_addresses, announce=announce, stop=stop
    )
