"""Options and output that commands share."""

import json
import logging
import math
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from peer.config import MAX_THREADS
from protos.contract.errors import UsageError


def require_effect(is_given_by_option: dict[str, bool], *, without: str, remedy: str) -> None:
    """Raise UsageError for options that were given and change nothing. `without` says what they
    need, for people.
    """
    useless = [option for option, is_given in is_given_by_option.items() if is_given]
    if useless:
        raise UsageError(
            f"{' and '.join(useless)} {without}",
            allowed="options that change what the command does",
            remedy=remedy,
        )


AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object to standard output.")]
HomeDir = Annotated[
    Path | None,
    typer.Option(
        "--home",
        help="The peer's directory: identity, cache, logs. [default: ~/.local/share/muster]",
        readable=False,  # left to us: what cannot be read has its own message and exit code
    ),
]
ConfigPath = Annotated[
    Path | None,
    typer.Option("--config", help="TOML file. [default: peer.toml in the home]", readable=False),
]

DeviceNames = Annotated[
    str | None, typer.Option(help="Several devices: cpu:N (shares of the CPU) or cuda:0,1.")
]
LayoutName = Annotated[
    str | None,
    typer.Option(help="How a model lies on them: auto, or such as tp=2,pp=2. [default: auto]"),
]
ExecutionName = Annotated[
    str | None, typer.Option(help="auto, eager, native or compiled. [default: auto]")
]
StepCache = Annotated[
    Path | None,
    typer.Option(help="Directory for kernels and step plans. [default: step in the home]"),
]
Checkpoint = Annotated[
    Path,
    typer.Argument(help="State file (*.safetensors), or a folder that `export` wrote."),
]
SpecPath = Annotated[
    Path | None, typer.Option("--spec", help="Run spec, if it does not lie above the checkpoint.")
]
DatasetDir = Annotated[Path | None, typer.Option("--dataset", help="Dataset directory of the run.")]
Threads = Annotated[int, typer.Option(help="CPU threads; 0: all.", min=0, max=MAX_THREADS)]

JoinFile = Annotated[
    Path | None,
    typer.Option("--join-file", help="File whose first line is the join string.", readable=False),
]
STDIN_MARK = "-"


def read_join_text(text: str, join_file: Path | None) -> str:
    """The join string of the argument, of standard input for `-`, or of a file, none of which but
    the first shows in `ps`. Raises UsageError.
    """
    if join_file is None:
        return sys.stdin.readline().strip() if text == STDIN_MARK else text
    if text:
        raise UsageError(
            "a join string and --join-file",
            allowed="one of STRING, - (standard input) and --join-file PATH",
            remedy="leave one out",
        )
    try:
        with join_file.open(encoding="utf-8") as file:
            line = file.readline().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"--join-file {join_file} cannot be read: {error}",
            allowed="a text file that this user may read",
            remedy="check its path and mode",
        ) from error
    if not line:
        raise UsageError(
            f"the first line of {join_file} is empty",
            allowed="the line that `muster-coordinator token create` printed",
            remedy="write the join string into it",
        )
    return line


def finite_or_null(plain: Any) -> Any:
    """The same with None for numbers that JSON cannot say: infinities and not-a-number."""
    if isinstance(plain, dict):
        return {key: finite_or_null(value) for key, value in plain.items()}
    if isinstance(plain, list | tuple):
        return [finite_or_null(value) for value in plain]
    return None if isinstance(plain, float) and not math.isfinite(plain) else plain


def print_json(plain: Any) -> None:
    """One object on one line, at once."""
    print_part(json.dumps(finite_or_null(plain)) + "\n")


def print_line(text: str) -> None:
    """A line of output, at once."""
    print_part(text + "\n")


def print_part(text: str) -> None:
    """A piece of a line, at once. Raises MachineError if it cannot be written, ReaderGoneError if
    nobody reads any more.
    """
    sys.stdout.write(text)
    sys.stdout.flush()


def set_up_logging(level: str) -> None:
    """Log lines on standard error."""
    logging.basicConfig(
        level=level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s"
    )
