"""`muster-peer`: registers every command and turns errors into messages and exit codes.

This is the command line's broad-exception border: a MusterError becomes its three parts on standard
error and its exit code, anything else a traceback and exit code 1.
"""

import errno
import io
import logging
import sys
from typing import Annotated, NoReturn

import typer

from peer.cli import (
    begin_normal_interrupts,
    doctor,
    evaluate,
    finetune,
    generate,
    hold_standard_descriptors,
    join,
    reference,
    rendezvous,
    status,
    transfer,
)
from peer.cli.options import forget_stdout, report_error, say, unwritable_stdout
from protos.contract.errors import INTERRUPTED_EXIT_CODE, MusterError

_EPILOG = (
    "Exit codes: 0 done; 1 internal error; 2 wrong flags, files or join strings; 3 refused "
    "(token, version, clock, CA); "
    "4 this machine (port, disk, permissions, lock, memory, missing package); 5 corrupt data; 6 "
    "cannot be reached or not "
    "ready; 7 the run cannot go on; 130 interrupted twice."
)

app = typer.Typer(
    rich_markup_mode=None,  # rich costs 0.3 CPU s to import, more than all the rest of --help
    name="muster-peer",
    help="Lends this machine to a swarm that trains a language model.",
    epilog=_EPILOG,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)


def _show_version(is_wanted: bool) -> None:
    if is_wanted:
        from peer.daemon.membership import package_version

        typer.echo(f"muster-peer {package_version()}")
        raise typer.Exit


@app.callback()
def _root(
    is_version_wanted: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and exit.", callback=_show_version, is_eager=True
        ),
    ] = False,
    dies_with_parent: Annotated[
        bool,
        typer.Option("--die-with-parent", hidden=True, help="For programs that start this one."),
    ] = False,
) -> None:
    if dies_with_parent:
        import signal

        from peer.parent_death import die_with_parent

        die_with_parent(signal.SIGTERM)


app.command("join")(join.join)
app.command("status")(status.status)
app.command("doctor")(doctor.doctor)
app.command("rendezvous")(rendezvous.rendezvous)
app.command("generate")(generate.generate)
app.command("eval")(evaluate.evaluate)
app.command("export")(transfer.export)
app.command("finetune")(finetune.finetune)
app.command("import")(transfer.import_model)
app.command("reference", hidden=True)(reference.reference)


def main() -> None:
    """Entry point of the console script."""
    hold_standard_descriptors()
    begin_normal_interrupts()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # where an encoding lacks a character
    try:
        app()
    except MusterError as error:
        report_error(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        say("interrupted")
        sys.exit(INTERRUPTED_EXIT_CODE)
    except BrokenPipeError:
        forget_stdout()  # the reader is gone
        sys.exit(0)
    except OSError as error:
        if error.errno != errno.ENOSPC or error.filename is not None:
            _give_up()
        full = unwritable_stdout(error)  # help and version go past print_part
        report_error(full)
        sys.exit(full.exit_code)
    except Exception:
        _give_up()


def _give_up() -> NoReturn:
    """Within an except clause: the traceback, and exit code 1."""
    logging.getLogger(__name__).exception("internal error")
    say("error: internal error, please report it with the lines above")
    sys.exit(1)


if __name__ == "__main__":
    main()
