"""Options and output that commands share."""

import json
import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from protos.contract.errors import MusterError

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


def print_json(plain: Any) -> None:
    """One object on one line, at once."""
    sys.stdout.write(json.dumps(plain) + "\n")
    sys.stdout.flush()


def print_line(text: str) -> None:
    """A line of output, at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


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


def set_up_logging(level: str) -> None:
    """Log lines on standard error."""
    logging.basicConfig(
        level=level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s"
    )
