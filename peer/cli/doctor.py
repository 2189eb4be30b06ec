"""`muster-peer doctor`: can this machine take part, and if not, what would change that."""

from typing import Annotated

import typer

from peer.cli.options import (
    AsJson,
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
)


def doctor(
    join_string: Annotated[
        str,
        typer.Argument(
            metavar="[STRING]",
            help="Join string of the coordinator to check; - reads it from standard input. "
            "[default: the last one]",
        ),
    ] = "",
    join_file: JoinFile = None,
    home: HomeDir = None,
    config_path: ConfigPath = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads for the probe.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")] = None,
    devices: DeviceNames = None,
    layout: LayoutName = None,
    execution: ExecutionName = None,
    step_cache: StepCache = None,
    listen_port: Annotated[int | None, typer.Option(help="Port to try.")] = None,
    memory_limit: Annotated[str | None, typer.Option(help="As for join.")] = None,
    disk_limit: Annotated[str | None, typer.Option(help="As for join.")] = None,
    has_probe: Annotated[
        bool,
        typer.Option("--probe/--no-probe", help="Measure training speed (some seconds, once)."),
    ] = True,
    is_fresh: Annotated[bool, typer.Option("--fresh", help="Measure again.")] = False,
    is_json: AsJson = False,
) -> None:
    """Check this machine; exit code 4 if something of it stands in the way, 6 if only the
    coordinator cannot be reached.
    """
    from dataclasses import asdict

    from peer.config import load_config, quiet_libraries

    quiet_libraries()
    from peer.cli.doctor_checks import all_checks, exit_code_of
    from protos.contract.channel import JoinString

    flags = {
        "home": home,
        "threads": threads,
        "device": device,
        "devices": devices,
        "layout": layout,
        "execution": execution,
        "step_cache": step_cache,
        "listen_port": listen_port,
        "memory_limit": memory_limit,
        "disk_limit": disk_limit,
    }
    config = load_config(flags=flags, config_path=config_path)
    text = read_join_text(join_string, join_file)
    decoded = JoinString.decode(text) if text else None
    checks = all_checks(config, decoded, has_probe=has_probe, is_fresh=is_fresh)
    exit_code = exit_code_of(checks)
    if is_json:
        print_json({"is_ok": not exit_code, "checks": [asdict(check) for check in checks]})
    else:
        for check in checks:
            print_line(f"{'ok ' if check.is_ok else 'BAD'}  {check.name:<12} {check.found}")
            if not check.is_ok:
                print_line(f"     {'':<12} allowed: {check.allowed}")
                print_line(f"     {'':<12} remedy:  {check.remedy}")
    raise typer.Exit(exit_code)
