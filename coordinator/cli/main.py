"""`muster-coordinator`: registers every command.

Commands import what they need when they run, so that --help stays quick.
"""

from typing import Annotated

import typer

from coordinator.cli import (
    begin_normal_interrupts,
    corpus,
    ledger,
    plan,
    runs,
    serve,
    status,
    study,
    tokens,
    up_command,
)
from protos.contract.command_line import EXIT_CODES, run_program

app = typer.Typer(
    rich_markup_mode=None,  # rich costs 0.3 CPU s to import, more than all the rest of --help
    name="muster-coordinator",
    help="Decides what a swarm trains, leases the work and keeps the books.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)


def _show_version(is_wanted: bool) -> None:
    if is_wanted:
        from coordinator.config import package_version

        typer.echo(f"muster-coordinator {package_version()}")
        raise typer.Exit


@app.callback()
def _root(
    is_version_wanted: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and exit.", callback=_show_version, is_eager=True
        ),
    ] = False,
) -> None:
    pass


app.command("up")(up_command.up)
app.command("serve")(serve.serve)
app.add_typer(corpus.app, name="corpus")
app.add_typer(runs.app, name="run")
app.add_typer(tokens.app, name="token")
app.command("plan")(plan.plan)
app.command("status")(status.status)
app.command("peers")(status.peers)
app.add_typer(ledger.app, name="ledger")
app.add_typer(study.app, name="study")


def main() -> None:
    """Entry point of the console script."""
    begin_normal_interrupts()
    run_program(lambda: app(standalone_mode=False))


if __name__ == "__main__":
    main()
