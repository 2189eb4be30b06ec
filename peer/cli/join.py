"""`muster-peer join`: lend this machine until Ctrl+C, SIGTERM or the end of the run."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from peer.cli.options import (
    ConfigPath,
    DeviceNames,
    ExecutionName,
    HomeDir,
    JoinFile,
    LayoutName,
    StepCache,
    print_json,
    print_line,
    read_join_text,
    set_up_logging,
)
from protos.contract.command_line import ReaderGoneError, say

if TYPE_CHECKING:
    from peer.config import PeerConfig
    from peer.daemon.reports import Report, Reporter
    from protos.contract.channel import JoinString


def join(
    join_string: Annotated[
        str,
        typer.Argument(
            metavar="[STRING]",
            help="Line that `muster-coordinator token create` printed; not needed to rejoin the "
            "last run. - reads it from standard input. Given here, others on this machine may see "
            "it in `ps`.",
        ),
    ] = "",
    join_file: JoinFile = None,
    name: Annotated[str | None, typer.Option(help="Name for people. [default: host name]")] = None,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads for training. [default: one per core]")
    ] = None,
    memory_limit: Annotated[
        str | None, typer.Option(help="Memory of all processes, such as 8GiB. [default: no limit]")
    ] = None,
    disk_limit: Annotated[
        str | None, typer.Option(help="Space for cached data, such as 20GiB. [default: 10 GiB]")
    ] = None,
    upload_limit_mbit: Annotated[
        float | None, typer.Option(help="Mbit/s for rounds; 0: no limit. Best: 0.9 of a home line.")
    ] = None,
    home: HomeDir = None,
    listen_host: Annotated[
        str | None, typer.Option(help="Address at which other peers connect. [default: 0.0.0.0]")
    ] = None,
    listen_port: Annotated[
        int | None, typer.Option(help="TCP port for other peers; 0: any. [default: 0]")
    ] = None,
    announce: Annotated[
        list[str] | None,
        typer.Option(help="Multiaddress at which others reach this peer; may be repeated."),
    ] = None,
    metrics_port: Annotated[
        int | None, typer.Option(help="Serve /metrics on this loopback port; 0: any.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")] = None,
    execution: ExecutionName = None,
    step_cache: StepCache = None,
    devices: DeviceNames = None,
    layout: LayoutName = None,
    config_path: ConfigPath = None,
    log_level: Annotated[
        str | None, typer.Option(help="DEBUG, INFO, WARNING or ERROR. [default: INFO]")
    ] = None,
    is_json: Annotated[
        bool, typer.Option("--json-events", help="Print events as JSON lines.")
    ] = False,
) -> None:
    """Join a run and train until it is over.

    Ctrl+C once finishes the micro-batch, returns the leases and leaves; twice ends at once.
    """
    from peer.config import load_config, quiet_libraries

    quiet_libraries()
    flags = {
        "name": name,
        "threads": threads,
        "memory_limit": memory_limit,
        "disk_limit": disk_limit,
        "upload_limit_mbit": upload_limit_mbit,
        "home": home,
        "listen_host": listen_host,
        "listen_port": listen_port,
        "announce": tuple(announce) if announce else None,
        "metrics_port": metrics_port,
        "device": device,
        "execution": execution,
        "step_cache": step_cache,
        "devices": devices,
        "layout": layout,
        "log_level": log_level,
    }
    config = load_config(flags=flags, config_path=config_path)
    set_up_logging(config.log_level)
    raise typer.Exit(_run(config, read_join_text(join_string, join_file), is_json=is_json))


def _run(config: "PeerConfig", text: str, *, is_json: bool) -> int:
    import asyncio

    from peer.cli.devices import require_devices
    from peer.cli.ports import require_free_port
    from peer.daemon.daemon import Daemon
    from peer.daemon.membership import check_machine
    from peer.home import Home
    from peer.identity import load_identity

    report = make_reporter(is_json=is_json)
    home = Home.open(config.home)
    try:
        for done in home.clean_leftovers():
            say(f"leftover of a dead peer: {done}")
        check_machine(config)
        require_devices(config)
        require_free_port(config.listen_host, config.listen_port)
        chosen = choose_join_string(text, config.home)
        identity = load_identity(config.home)

        async def run() -> int:
            daemon = Daemon(
                config=config, home=home, identity=identity, join_string=chosen, report=report
            )
            return await daemon.run()

        return asyncio.run(run())
    finally:
        home.close()


def choose_join_string(text: str, home: Path) -> "JoinString":
    """The given join string, or that of the last session. Raises UsageError if there is neither."""
    from peer.daemon.membership import load_membership
    from protos.contract.channel import JoinString
    from protos.contract.errors import UsageError

    if text:
        return JoinString.decode(text)
    saved = load_membership(home)
    if saved is None:
        raise UsageError(
            f"no join string, and {home} has not joined a run before",
            allowed="muster-peer join STRING; without STRING only to rejoin the last run",
            remedy="ask the operator for the line that `muster-coordinator token create` prints",
        )
    return saved.join_string


def make_reporter(*, is_json: bool) -> "Reporter":
    """How reports are printed: JSON lines, or plain lines with the time. When nobody reads them any
    more the peer is asked to leave, in good order.
    """
    import signal
    import time

    def report(entry: "Report") -> None:
        try:
            show(entry)
        except ReaderGoneError:  # once: what is printed after it goes nowhere
            signal.raise_signal(signal.SIGTERM)

    def show(entry: "Report") -> None:
        if is_json:
            print_json(
                {"event": entry.kind, "text": entry.text, "unix_seconds": time.time()}
                | {
                    key: value
                    for key, value in entry.fields.items()
                    if not isinstance(value, bytes)
                }
            )
            return
        if entry.kind == "attempt" and entry.fields["outcome"] == "committed":
            return  # the round's own line follows
        prefix = "warning: " if entry.kind == "warning" else ""
        print_line(f"{time.strftime('%H:%M:%S')}  {prefix}{entry.text}")

    return report
