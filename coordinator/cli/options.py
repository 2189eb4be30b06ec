"""Options and output that command groups share."""

import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from protos.contract.errors import UsageError

DEFAULT_DATA_DIR = Path("muster-data")

DataDir = Annotated[
    Path,
    typer.Option(
        "--data-dir",
        help="The coordinator's directory.",
        envvar="MUSTER_COORDINATOR_DATA_DIR",
        readable=False,  # left to us: what cannot be read has its own message and exit code
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object to standard output.")]
RunId = Annotated[str, typer.Option("--run", help="Which run; not needed when one is not over.")]


def print_json(plain: Any) -> None:
    """One object on one line."""
    sys.stdout.write(json.dumps(plain) + "\n")


MAX_CELL_CHARACTERS = 100
"""A longer reason is cut in tables; `--json` has it whole."""


def print_table(titles: list[str], rows: list[list[str]]) -> None:
    """Columns as wide as their contents, one line a row; plain text, so that it can be piped."""
    rows = [[_cut(text) for text in row] for row in rows]
    widths = [max(len(row[i]) for row in [titles, *rows]) for i in range(len(titles))]
    for row in [titles, *rows]:
        line = "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True))
        sys.stdout.write(line.rstrip() + "\n")


def _cut(text: str) -> str:
    line = " ".join(text.split())
    short = line[: MAX_CELL_CHARACTERS - 3].rstrip() + "..."
    return line if len(line) <= MAX_CELL_CHARACTERS else short


def time_text(unix_seconds: float) -> str:
    """Instant in UTC; - for never."""
    if not unix_seconds:
        return "-"
    return datetime.fromtimestamp(unix_seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")


def parse_duration_seconds(text: str) -> float:
    """Seconds of 90s, 30m, 24h, 7d; 0 for `never`. Raises UsageError."""
    if text == "never":
        return 0.0
    factor = {"s": 1, "m": 60, "h": 3600, "d": 86_400}.get(text[-1:])
    number = text[:-1]
    if factor is None or not (number.isascii() and number.isdigit()) or int(number) == 0:
        raise UsageError(
            f"duration {text!r}",
            allowed="90s, 30m, 24h, 7d or never",
            remedy="write it in one of these forms",
        )
    return float(int(number) * factor)
