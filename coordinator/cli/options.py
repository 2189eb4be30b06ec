"""Options and output that command groups share."""

import errno
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, TextIO, cast

import typer

from protos.contract.errors import ErrorCode, MachineError, MusterError, UsageError

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
RunId = Annotated[str, typer.Option("--run", help="Which run; not needed when there is one.")]


class CheckedOutput:
    """A stream for results that turns what the machine refuses into a MachineError; whatever prints
    (print, typer.echo, sys.stdout.write) goes through it once it is sys.stdout.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """As a text stream does. Raises MachineError where the machine refuses."""
        with self._explained():
            return self._stream.write(text)

    def flush(self) -> None:
        """As a text stream does. Raises MachineError where the machine refuses."""
        with self._explained():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:  # a reader that has seen enough is no error
            raise
        except OSError as error:
            is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise MachineError(
                f"cannot write to standard output: {error.strerror}",
                allowed="a terminal, pipe or file that takes what is printed",
                remedy="free space there, or send the output elsewhere",
                code=ErrorCode.DISK_FULL if is_full else ErrorCode.PERMISSION_DENIED,
            ) from error


@contextmanager
def checked_output() -> Iterator[None]:
    """sys.stdout as CheckedOutput, flushed at the end: what cannot be written is said, once."""
    before = sys.stdout
    if before is None:  # closed by whoever called
        yield
        return
    checked = sys.stdout = cast(TextIO, CheckedOutput(before))
    try:
        try:
            yield
        except SystemExit:
            sys.stdout.flush()
            raise
        sys.stdout.flush()
    finally:
        if sys.stdout is checked:  # click puts its own in place for a reader that is gone
            sys.stdout = before


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


def say(text: str) -> None:
    """A line on standard error, for people."""
    sys.stderr.write(text + "\n")


def report_error(error: MusterError) -> None:
    """Found, allowed, remedy: one line each."""
    say(f"error: {error.found}")
    if error.allowed:
        say(f"  allowed: {error.allowed}")
    if error.remedy:
        say(f"  remedy:  {error.remedy}")


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
