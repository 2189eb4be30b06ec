"""`serve`: a coordinator until SIGTERM or Ctrl+C. Once = stop in good order; twice = at once."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coordinator.cli import end_at_once
from coordinator.cli.options import AsJson, print_json
from protos.contract.command_line import say

if TYPE_CHECKING:
    from coordinator.config import CoordinatorConfig

_LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"


def serve(
    data_dir: Annotated[
        Path | None,
        typer.Option(
            "--data-dir",
            help="Everything that must survive.",
            show_default="muster-data",
            readable=False,
        ),
    ] = None,
    config_path: Annotated[
        Path | None, typer.Option("--config", help="TOML file with these settings.", readable=False)
    ] = None,
    host: Annotated[str | None, typer.Option("--host", help="Interface for peers.")] = None,
    port: Annotated[int | None, typer.Option("--port", help="Port for peers; 0: any.")] = None,
    advertise: Annotated[
        str | None, typer.Option("--advertise", help="HOST:PORT that join strings name.")
    ] = None,
    http_host: Annotated[
        str | None, typer.Option("--http-host", help="Interface of the page.")
    ] = None,
    http_port: Annotated[
        int | None, typer.Option("--http-port", help="Port of the page; 0: any.")
    ] = None,
    rendezvous: Annotated[
        list[str] | None,
        typer.Option(
            "--rendezvous", help="Multiaddress of a rendezvous elsewhere, instead of starting one."
        ),
    ] = None,
    rendezvous_port: Annotated[
        int | None,
        typer.Option("--rendezvous-port", help="Port of the started rendezvous; 0: any."),
    ] = None,
    has_rendezvous: Annotated[
        bool | None,
        typer.Option("--with-rendezvous/--no-rendezvous", help="Whether there is one at all."),
    ] = None,
    checkpoint_mirrors: Annotated[
        list[str] | None,
        typer.Option(
            "--checkpoint-mirror",
            help="Where a copy of DATA_DIR/checkpoints lies (http, https, file); may be repeated.",
        ),
    ] = None,
    log_level: Annotated[
        str, typer.Option("--log-level", help="DEBUG, INFO, WARNING or ERROR.")
    ] = "INFO",
    is_json: AsJson = False,
) -> None:
    """Serve the runs of a data directory until interrupted."""
    import asyncio

    from coordinator.config import load_config
    from protos.contract.channel import split_address
    from protos.contract.errors import UsageError

    if log_level.upper() not in ("DEBUG", "INFO", "WARNING", "ERROR"):
        raise UsageError(
            f"--log-level {log_level}", allowed="DEBUG, INFO, WARNING, ERROR", remedy="choose one"
        )
    logging.basicConfig(level=log_level.upper(), format=_LOG_FORMAT)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    flags: dict[str, Any] = {
        "data_dir": data_dir,
        "host": host,
        "port": port,
        "advertise": advertise,
        "http_host": http_host,
        "http_port": http_port,
        "rendezvous": tuple(rendezvous) if rendezvous else None,
        "rendezvous_port": rendezvous_port,
        "has_rendezvous": has_rendezvous,
        "checkpoint_mirrors": tuple(checkpoint_mirrors) if checkpoint_mirrors else None,
    }
    config = load_config(config_path=config_path, flags=flags)
    if config.advertise:
        split_address(config.advertise)
    asyncio.run(_serve(config, is_json=is_json))


async def _serve(config: "CoordinatorConfig", *, is_json: bool) -> None:
    import asyncio
    import signal
    import sys

    from coordinator.app import Coordinator

    coordinator = Coordinator(config)
    stop_asked, loop = asyncio.Event(), asyncio.get_running_loop()

    def on_signal() -> None:
        if stop_asked.is_set():
            say("interrupted")
            end_at_once()
        stop_asked.set()

    for caught in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(caught, on_signal)
    await coordinator.start()
    if is_json:
        print_json(
            {
                "address": coordinator.address,
                "local_address": coordinator.local_address,
                "http_address": coordinator.http_address,
                "ca_fingerprint": coordinator.ca_fingerprint,
                "data_dir": str(config.data_dir),
            }
        )
        sys.stdout.flush()
    say(f"peers:           {coordinator.address}")
    say(f"page:            {coordinator.http_address}")
    say(f"CA fingerprint:  {coordinator.ca_fingerprint}")
    say(f"data directory:  {config.data_dir}")
    await stop_asked.wait()
    say("stopping (again: at once)")
    await coordinator.stop()
