"""`muster-peer`: registers every command."""

from typing import Annotated

import typer

from peer.cli import (
    begin_normal_interrupts,
    doctor,
    evaluate,
    finetune,
    generate,
    join,
    reference,
    rendezvous,
    status,
    transfer,
)
from protos.contract.command_line import EXIT_CODES, run_program

app = typer.Typer(
    rich_markup_mode=None,  # rich costs 0.3 CPU s to import, more than all the rest of --help
    name="muster-peer",
    help="Lends this machine to a swarm that trains a language model.",
    epilog=EXIT_CODES,
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
    begin_normal_interrupts()
    run_program(lambda: app(standalone_mode=False))


if __name__ == "__main__":
    main()
