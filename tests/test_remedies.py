"""Every option that an error's remedy names is one that the command at hand has.

Read from the sources: the string constants of `remedy=`. Where a remedy quotes a command of its own
(`muster-peer import FOLDER DIR --eos-token-id N`), that command must have the options after it.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer

from coordinator.cli.main import app as coordinator_app
from peer.cli.main import app as peer_app
from protos.contract.errors import MusterError
from tests.source_tree import ROOT

_OPTION = re.compile(r"--[a-z][a-z0-9-]+")
_QUOTED = re.compile(r"`([^`]*)`")
_OF_CHECKPOINTS = ("eval", "generate", "finetune", "export")
_COMMANDS_BY_PEER_FILE = {
    "checkpoint/hf_import.py": (*_OF_CHECKPOINTS, "import"),
    "cli/checkpoints.py": _OF_CHECKPOINTS,
    "cli/evaluate.py": ("eval",),
    "cli/transfer.py": ("export", "import"),
    "eval/harness.py": ("eval",),
    "train/finetune_data.py": ("finetune",),
    "train/finetune.py": ("finetune",),
    "train/lora.py": ("finetune",),
    "daemon/": ("join",),
    "parallel/": ("join",),
    "swarm/": ("join",),
    "train/workbench.py": ("join",),
}
"""Those that can show the errors of a file; of others, any command of the program."""


def _flat(app: typer.Typer) -> dict[str, click.Command]:
    """Every command by its words, such as "run create"."""

    def walk(command: click.Command, words: str) -> Iterator[tuple[str, click.Command]]:
        yield words, command
        for name, inner in getattr(command, "commands", {}).items():
            yield from walk(inner, f"{words} {name}".strip())

    return dict(walk(typer.main.get_command(app), ""))


PEER, COORDINATOR = _flat(peer_app), _flat(coordinator_app)


def _options(command: click.Command) -> set[str]:
    return {o for p in command.params for o in (*p.opts, *p.secondary_opts)} | {"--help"}


def _remedies() -> list[tuple[str, str]]:
    found = []
    for package in ("peer", "coordinator", "protos/contract"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.keyword) and node.arg == "remedy":
                    parts = [c for c in ast.walk(node.value) if isinstance(c, ast.Constant)]
                    parts.sort(key=lambda c: (c.lineno, c.col_offset))
                    text = "".join(str(c.value) for c in parts)
                    if _OPTION.search(text):
                        found.append((str(path.relative_to(ROOT)), text))
    return found


def _problems(file: str, text: str) -> list[str]:
    problems = []
    for quoted in _QUOTED.findall(text):
        words = quoted.removeprefix("muster-peer ").removeprefix("muster-coordinator ").split()
        trees = [COORDINATOR] if "muster-coordinator" in quoted else [PEER, COORDINATOR]
        names = (" ".join(words[:2]), " ".join(words[:1]))
        commands = [tree[name] for tree in trees for name in names if name and name in tree]
        if commands:
            missing = set(_OPTION.findall(quoted)) - _options(commands[0])
            problems += [f"`{quoted}` has no {option}" for option in missing]
            text = text.replace(f"`{quoted}`", "")
    named = set(_OPTION.findall(text))
    own, _, rest = file.partition("/")
    inner = next((c for prefix, c in _COMMANDS_BY_PEER_FILE.items() if rest.startswith(prefix)), ())
    if own == "peer" and inner:
        for name in inner:
            problems += [f"{name} has no {o}" for o in named - _options(PEER[name])]
    else:
        trees = {"peer": [PEER], "coordinator": [COORDINATOR, PEER]}.get(own, [PEER, COORDINATOR])
        known = set().union(*(_options(c) for tree in trees for c in tree.values()))
        problems += [f"no command has {option}" for option in named - known]
    return problems


def test_remedies_name_options_that_are_there() -> None:
    remedies = _remedies()
    assert len(remedies) > 100
    problems = [f"{file}: {text!r}: {p}" for file, text in remedies for p in _problems(file, text)]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    "text", ["name it with --eos-token-id", "`muster-peer eval X --eos-token-id 3`", "--nonsense"]
)
def test_what_is_not_there_is_found(text: str) -> None:
    assert _problems("peer/checkpoint/hf_import.py", text)
    assert Path(ROOT / "peer/checkpoint/hf_import.py").is_file()


def test_every_error_says_what_is_allowed_and_what_to_do() -> None:
    """Short are only those that another error takes up."""
    short = ("peer/daemon/duties.py", "peer/model/kernels.py")
    names = {error.__name__ for error in MusterError.__subclasses__()}
    incomplete = []
    for package in ("peer", "coordinator", "protos/contract"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
                    continue
                given = {keyword.arg for keyword in node.keywords}
                is_whole = None in given or {"allowed", "remedy"} <= given
                where = str(path.relative_to(ROOT))
                if node.func.id in names and not is_whole and where not in short:
                    incomplete.append(f"{where}:{node.lineno}")
    assert not incomplete, incomplete
