"""Budgets that keep the code readable: sizes, broad handlers, sleeps in tests, units in names,
comments in protos.
"""

import ast
import re
from pathlib import Path

import pytest

from tests.source_tree import (
    PRODUCT_PACKAGES,
    ROOT,
    SourceFile,
    dotted_name,
    load_source_files,
    source_paths,
)

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 80
MAX_LOOP_LINES = 250
LOOP_FILE = "peer/train/loop.py"

# The borders that may catch everything; each re-raises or records. (file, how many handlers)
BROAD_HANDLERS = {
    "protos/contract/command_line.py": 1,  # of both programs
    "coordinator/api/interceptor.py": 2,  # unary calls, streams
    "coordinator/repeating.py": 1,  # a turn's border: the next one is tried
    "peer/swarm/__main__.py": 1,  # the process's border
    "peer/swarm/allreduce.py": 1,  # a thread's border: its error ends the attempt
    "coordinator/operations/writer.py": 2,  # the first try, and the batch that cannot be saved
}

NAMES_WITHOUT_UNIT = re.compile(r"(.*_)?(timeout|interval|delay|size|limit|budget)")


def all_files() -> tuple[SourceFile, ...]:
    """Hand-written Python files, tests included."""
    return load_source_files(*PRODUCT_PACKAGES, "tests")


def functions_of(file: SourceFile) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Functions and methods at any depth."""
    nodes = ast.walk(file.tree)
    return [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def complain(problems: list[str]) -> None:
    """Fail with all problems, one per line."""
    assert not problems, "\n" + "\n".join(sorted(problems))


def test_files_parse() -> None:
    loaded = {file.path for file in all_files()}
    paths = source_paths(*PRODUCT_PACKAGES, "tests")
    complain(
        [
            f"{path.relative_to(ROOT)} does not parse on this Python"
            for path in paths
            if path.relative_to(ROOT).as_posix() not in loaded
        ]
    )


def test_files_are_short() -> None:
    problems = []
    for file in all_files():
        num_lines = len(file.text.splitlines())
        allowed = MAX_LOOP_LINES if file.path == LOOP_FILE else MAX_FILE_LINES
        if num_lines > allowed:
            problems.append(f"{file.path} has {num_lines} lines; {allowed} are allowed: split it")
    complain(problems)


def test_functions_are_short() -> None:
    problems = []
    for file in all_files():
        for function in functions_of(file):
            num_lines = (function.end_lineno or function.lineno) - function.lineno + 1
            if num_lines > MAX_FUNCTION_LINES:
                problems.append(
                    f"{file.at(function.lineno)} {function.name} has {num_lines} lines; "
                    f"{MAX_FUNCTION_LINES} are allowed: split it"
                )
    complain(problems)


def test_the_loop_has_no_modes() -> None:
    files = [file for file in all_files() if file.path == LOOP_FILE]
    for file in files:
        branches = [node for node in ast.walk(file.tree) if isinstance(node, ast.If | ast.IfExp)]
        words = ("mode", "strategy.name", "objective")
        found = [
            file.at(branch.lineno)
            for branch in branches
            if any(word in ast.unparse(branch.test) for word in words)
        ]
        complain([f"{place} switches on a mode; use a strategy object" for place in found])


def test_broad_handlers_are_at_the_borders() -> None:
    """A handler that ends in a bare `raise` swallows nothing and is free."""
    problems = []
    for file in load_source_files(*PRODUCT_PACKAGES):
        broad = []
        for node in ast.walk(file.tree):
            if not isinstance(node, ast.ExceptHandler) or not is_broad(node):
                continue
            last = node.body[-1]
            if not (isinstance(last, ast.Raise) and last.exc is None):
                broad.append(node)
        for node in broad[BROAD_HANDLERS.get(file.path, 0) :]:
            problems.append(f"{file.at(node.lineno)} catches everything; name what you expect")
    complain(problems)


def is_broad(handler: ast.ExceptHandler) -> bool:
    """True for `except:`, `except Exception`, `except BaseException`, alone or in a tuple."""
    if handler.type is None:
        return True
    types = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(dotted_name(kind) in ("Exception", "BaseException") for kind in types)


def test_tests_do_not_sleep() -> None:
    """Time is an input; `asyncio.sleep(0)` only lets others run."""
    problems = []
    for file in load_source_files("tests"):
        for node in ast.walk(file.tree):
            if not isinstance(node, ast.Call) or not dotted_name(node.func).endswith("sleep"):
                continue
            if ast.unparse(node) != "asyncio.sleep(0)":
                problems.append(f"{file.at(node.lineno)} sleeps; wait for an event with a deadline")
    complain(problems)


def test_parameters_carry_their_unit() -> None:
    """Free: texts (a flag such as "8GiB" carries its unit), functions, and the glossary's
    vocab_size.
    """
    problems = []
    for file in load_source_files(*PRODUCT_PACKAGES):
        for function in functions_of(file):
            arguments = function.args
            for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
                annotation = ast.unparse(argument.annotation) if argument.annotation else ""
                is_free = re.match(r"(Annotated\[)?(str|Callable)\b", annotation) is not None
                is_free = is_free or argument.arg == "vocab_size"
                if NAMES_WITHOUT_UNIT.fullmatch(argument.arg) and not is_free:
                    problems.append(f"{file.at(argument.lineno)} {argument.arg}: in what unit?")
    complain(problems)


def test_files_begin_with_their_idea() -> None:
    complain(
        [
            f"{file.path} has no docstring at its top"
            for file in all_files()
            if file.text.strip() and ast.get_docstring(file.tree) is None
        ]
    )


def test_classes_and_public_functions_are_explained() -> None:
    """Free: private names, functions inside functions, and methods that a class nearby explains (an
    interface).
    """
    unexplained: dict[str, list[tuple[str, str]]] = {}
    explained: dict[str, set[str]] = {}
    for file in load_source_files(*PRODUCT_PACKAGES):
        folder = str(Path(file.path).parent)
        waiting: list[ast.AST] = list(file.tree.body)
        while waiting:
            node = waiting.pop()
            if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if ast.get_docstring(node) is not None:
                explained.setdefault(folder, set()).add(node.name)
            elif not node.name.startswith("_"):
                unexplained.setdefault(folder, []).append((node.name, file.at(node.lineno)))
            if isinstance(node, ast.ClassDef):
                waiting += node.body
    complain(
        [
            f"{place} {name} has no docstring"
            for folder, items in unexplained.items()
            for name, place in items
            if name not in explained.get(folder, set())
        ]
    )


def test_code_is_plain() -> None:
    problems = []
    for file in all_files():
        for number, line in enumerate(file.text.splitlines(), start=1):
            if not line.isascii():
                problems.append(f"{file.at(number)} is not ASCII")
            if re.search(r"#.*\b(TO" + r"DO|FIX" + r"ME|X" + r"XX)\b", line):
                problems.append(f"{file.at(number)} leaves work undone")
            if line.startswith("from __future__"):
                problems.append(f"{file.at(number)} needs nothing from the future")
    complain(problems)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "protos/muster/v1").glob("*.proto")), ids=lambda path: path.name
)
def test_every_word_of_the_protocol_is_explained(path: Path) -> None:
    """A comment above each message, field, enum, value, service and method; each enum begins with
    UNSPECIFIED = 0.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    declaration = re.compile(
        r"\s*(message|enum|service|oneof|rpc)\s+\w+|\s*(repeated |optional )?[\w.<>, ]+\s\w+ = \d+;"
        r"|\s*[A-Z][A-Z0-9_]+ = \d+;"
    )
    problems = []
    for number, line in enumerate(lines, start=1):
        if declaration.match(line) and not lines[number - 2].strip().startswith("//"):
            problems.append(f"{path.name}:{number} has no comment: {line.strip()}")
        if line.startswith("enum "):
            values = [text for text in lines[number:] if " = " in text]
            if not values[0].strip().endswith("_UNSPECIFIED = 0;"):
                problems.append(f"{path.name}:{number} does not begin with *_UNSPECIFIED = 0")
    complain(problems)
