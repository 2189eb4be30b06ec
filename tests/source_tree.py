"""Reads the source tree for the layer and budget tests: files, modules, imports. Nothing is
imported or run.
"""

import ast
import contextlib
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PRODUCT_PACKAGES = ("protos", "coordinator", "peer")
GENERATED_PREFIX = "protos/muster/"


@dataclass(frozen=True, slots=True, kw_only=True)
class Import:
    """One imported module: inside this repository as exactly as it can be known, e.g.
    `peer.model.init`.
    """

    module: str
    line: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """One parsed file."""

    path: str
    """Relative to the root, with slashes."""
    text: str
    tree: ast.Module

    @property
    def module(self) -> str:
        """Dotted name."""
        name = self.path.removesuffix(".py").replace("/", ".")
        return name.removesuffix(".__init__")

    def at(self, line: int) -> str:
        """Place for a message."""
        return f"{self.path}:{line}"


def source_paths(*packages: str) -> list[Path]:
    """All hand-written Python files of some top-level packages."""
    paths = [path for package in packages for path in sorted((ROOT / package).rglob("*.py"))]
    return [p for p in paths if not p.relative_to(ROOT).as_posix().startswith(GENERATED_PREFIX)]


@cache
def load_source_files(*packages: str) -> tuple[SourceFile, ...]:
    """The same, parsed. Files that do not parse are left out; a test of its own names them."""
    files = []
    for path in source_paths(*packages):
        relative, text = path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
        with contextlib.suppress(SyntaxError):
            files.append(SourceFile(path=relative, text=text, tree=ast.parse(text)))
    gc.freeze()  # millions of nodes that stay: no collection need look at them
    return tuple(files)


@cache
def is_repository_module(module: str) -> bool:
    """True if a dotted name is a module or package of this repository."""
    path = ROOT / module.replace(".", "/")
    return path.with_suffix(".py").is_file() or path.is_dir()


def imports_of(file: SourceFile) -> Iterator[Import]:
    """Every import anywhere in the file: in functions, under TYPE_CHECKING, by importlib."""
    for node in ast.walk(file.tree):
        yield from _imports_of_node(file, node)


def imports_at_load(file: SourceFile) -> Iterator[Import]:
    """Imports that happen when the module is imported: not those in functions or for types only."""
    waiting: list[ast.AST] = [file.tree]
    while waiting:
        node = waiting.pop()
        yield from _imports_of_node(file, node)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting += ast.iter_child_nodes(node)


def _imports_of_node(file: SourceFile, node: ast.AST) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield Import(module=alias.name, line=node.lineno)
    elif isinstance(node, ast.ImportFrom):
        base = _absolute_base(file, node)
        for alias in node.names:
            longer = f"{base}.{alias.name}"
            module = longer if is_repository_module(longer) else base
            yield Import(module=module, line=node.lineno)
    elif isinstance(node, ast.Call) and dotted_name(node.func).endswith("import_module"):
        yield Import(module=_literal_module(node), line=node.lineno)


def _literal_module(call: ast.Call) -> str:
    """Module that import_module is called with; the fixed package of f"package.{name}"; else
    "<computed>".
    """
    argument: ast.AST | None = call.args[0] if call.args else None
    if isinstance(argument, ast.JoinedStr) and argument.values:
        argument = argument.values[0]
    if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
        return argument.value.rstrip(".")
    return "<computed>"


def _absolute_base(file: SourceFile, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    parts = file.path.removesuffix(".py").split("/")[: -node.level]
    return ".".join([*parts, *([node.module] if node.module else [])])


def dotted_name(node: ast.AST) -> str:
    """`a.b.c` of an attribute chain, or "" for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = dotted_name(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""


def is_within(module: str, package: str) -> bool:
    """True if a dotted name is the package or lies inside it."""
    return module == package or module.startswith(package + ".")
