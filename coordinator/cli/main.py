"""`muster-coordinator`: registers every command and turns errors into messages and exit codes.

Commands import what they need when they run, so that --help stays quick. This is the command line's
broad-exception border: a MusterError becomes its three parts on standard error and its exit code,
anything else a traceback and exit code 1.
"""

import logging
import sys
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
from coordinator.cli.options import checked_output, report_error, say
from protos.contract.errors import INTERRUPTED_EXIT_CODE, MusterError

_EPILOG = (
    "Exit codes: 0 done; 1 internal error; 2 wrong flags, files or specs; 3 refused; "
    "4 this machine (port, disk, permissions, lock, missing package); 5 corrupt data; "
    "6 cannot be reached or not ready; 7 the run cannot go on; "
    "130 interrupted."
)

app = typer.Typer(
    rich_markup_mode=None,  # rich costs 0.3 CPU s to import, more than all the rest of --help
    name="muster-coordinator",
    help="Decides what a swarm trains, leases the work and keeps the books.",
    epilog=_EPILOG,
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
    try:
        with checked_output():
            app()
    except MusterError as error:
        report_error(error)
        _drop_unwritten()
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        say("interrupted")
        sys.exit(INTERRUPTED_EXIT_CODE)
    except BrokenPipeError:
        sys.stdout = None  # the reader is gone; nothing left to flush
        sys.exit(0)
    except Exception:
        logging.getLogger(__name__).exception("internal error")
        say("error: internal error, please report it with the lines above")
        sys.exit(1)


def _drop_unwritten() -> None:
    """The interpreter flushes once more at its end, and would call a full disk an exit code 120."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        sys.stdout = None


if __name__ == "__main__":
    main()
