"""`up`: corpus, coordinator and peers on this machine until the budget is credited; the work is in
up.py.
"""

from pathlib import Path
from typing import Annotated

import typer

from coordinator.cli.options import DEFAULT_DATA_DIR, DataDir


def up(
    num_peers: Annotated[int, typer.Option("--peers", help="Peers on this machine.")] = 3,
    budget_tokens: Annotated[
        int | None, typer.Option("--budget-tokens", help="Tokens to credit.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="PRESET or key=value[,key=value].")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Any key of the spec, e.g. strategy.name=diloco; may be repeated."
        ),
    ] = None,
    corpus: Annotated[
        list[str] | None,
        typer.Option(
            "--corpus", help="Text file, folder or stdlib: source; may be given several times."
        ),
    ] = None,
    more_corpus: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SOURCE]...", help="More sources, after --corpus SOURCE."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Initial values and order of data.")
    ] = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    port: Annotated[
        int | None, typer.Option("--port", help="Port for peers; 0 or none: any.")
    ] = None,
    is_kept_serving: Annotated[
        bool, typer.Option("--keep-serving", help="Keep page and coordinator up after the end.")
    ] = False,
    is_fresh: Annotated[
        bool, typer.Option("--fresh", help="Delete the data directory first.")
    ] = False,
    is_json: Annotated[
        bool, typer.Option("--json", help="Print the summary as the last line.")
    ] = False,
) -> None:
    """Build a corpus, start a swarm here, train to the budget, evaluate, export. Resumes an
    unfinished run.
    """
    from coordinator.cli.up import UpOptions, run_up

    options = UpOptions(
        num_peers=num_peers,
        budget_tokens=budget_tokens,
        model=model,
        settings=tuple(settings or ()),
        corpus=(*(corpus or ()), *(more_corpus or ())),
        seed=seed,
        data_dir=Path(data_dir),
        port=port,
        is_kept_serving=is_kept_serving,
        is_fresh=is_fresh,
        is_json=is_json,
    )
    raise typer.Exit(run_up(options))
