"""Tables of runs for `study` and `plan`: from a path, with what a person says of columns."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from coordinator.scaling.columns import Selection
    from coordinator.scaling.observations import Observations

_LARGEST_TABLE_BYTES = 64 * 2**20

Columns = Annotated[
    list[str] | None,
    typer.Option("--column", help="NAME=TITLE, e.g. N=params: which column is which; repeatable."),
]
Where = Annotated[
    list[str] | None,
    typer.Option("--where", help="TITLE=VALUE: only rows with it; repeatable."),
]


def selection_of(columns: list[str] | None, where: list[str] | None) -> "Selection":
    """Of --column and --where. Raises UsageError."""
    from coordinator.scaling.columns import Selection

    return Selection.of(columns or (), where or ())


def read_table(path: Path) -> str:
    """Text of a table. Raises UsageError when it cannot be read."""
    from protos.contract.errors import UsageError

    try:
        if path.stat().st_size > _LARGEST_TABLE_BYTES:
            raise UsageError(
                f"{path} has {path.stat().st_size} bytes",
                allowed=f"tables of at most {_LARGEST_TABLE_BYTES} bytes",
                remedy="thin the curves out",
            )
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"cannot read {path}: {error}",
            allowed="a text file with the columns N,D,C,loss",
            remedy="check the path",
        ) from error


def read_observations(path: Path, selection: "Selection") -> "Observations":
    """A table in CSV, or in JSON by its ending. Raises UsageError."""
    from coordinator.scaling.observations import observations_from_csv, observations_from_json

    text = read_table(path)
    if path.suffix.lower() == ".json":
        return observations_from_json(text, name=str(path), selection=selection)
    return observations_from_csv(text, name=str(path), selection=selection)
