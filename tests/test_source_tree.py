"""The reader under the layer tests sees all imports; pyproject.toml lists every package."""

import ast
import tomllib

from tests.source_tree import (
    PRODUCT_PACKAGES,
    ROOT,
    SourceFile,
    imports_at_load,
    imports_of,
    is_within,
)

TEXT = """
import numpy as np, os.path
from protos.contract import digest, ids
from protos.contract.ids import PeerId
from . import config
from .model.init import x
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import torch
try:
    import hivemind
except ImportError:
    pass
class C:
    import rich
    def f(self):
        import sqlite3
        importlib.import_module("typer.main")
        importlib.import_module(f"peer.model.{name}")
        importlib.import_module(name)
"""


def parse(text: str) -> SourceFile:
    """A file of the package peer."""
    return SourceFile(path="peer/example.py", text=text, tree=ast.parse(text))


def test_every_form_of_import_is_seen() -> None:
    assert {imported.module for imported in imports_of(parse(TEXT))} == {
        "numpy",
        "os.path",
        "protos.contract.digest",
        "protos.contract.ids",
        "peer.config",
        "peer.model.init",
        "typing",
        "torch",
        "hivemind",
        "rich",
        "sqlite3",
        "typer.main",
        "peer.model",
        "<computed>",
    }


def test_imports_at_load_leave_out_functions_and_types() -> None:
    loaded = {imported.module for imported in imports_at_load(parse(TEXT))}
    assert {"hivemind", "rich", "numpy"} <= loaded
    assert not loaded & {"torch", "sqlite3", "typer.main", "<computed>"}


def test_names_are_compared_by_parts() -> None:
    assert is_within("torch.distributed.nn", "torch.distributed")
    assert not is_within("torchvision", "torch")


def test_every_package_and_every_data_file_is_installed() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found, unlisted = set(), []
    for package in PRODUCT_PACKAGES:
        for path in (ROOT / package).rglob("*"):
            if "__pycache__" in path.parts or not path.is_file() or path.name == "README.md":
                continue
            if path.name == "__init__.py":
                found.add(".".join(path.relative_to(ROOT).parts[:-1]))
            elif path.suffix != ".py" and not is_data_file(path.relative_to(ROOT), setuptools):
                unlisted.append(str(path.relative_to(ROOT)))
    assert sorted(found) == sorted(setuptools["packages"]), "pyproject.toml: packages"
    assert not unlisted, "pyproject.toml: package-data does not name them"


def is_data_file(path: object, setuptools: dict[str, dict[str, list[str]]]) -> bool:
    """True if package-data installs the file."""
    for package, patterns in setuptools["package-data"].items():
        folder = package.replace(".", "/") + "/"
        if not str(path).startswith(folder):
            continue
        suffix = "." + str(path).rsplit(".", 1)[-1]
        if any(pattern.endswith("*" + suffix) for pattern in patterns):
            return True
    return False
