"""The base install: a coordinator on a machine that has neither torch nor hivemind nor scipy.

A fresh virtual environment without system packages gets `pip install -c ops/constraints.txt .` and
nothing else, from a copy of the files that a release would hold. It is made once per Python: the
one that runs these tests, and 3.12 where a machine has one (MUSTER_PYTHON312 names it, else
`python3.12` on PATH). pip's cache is used, so a second run is quick.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.source_tree import PRODUCT_PACKAGES, ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(420)]

MAX_ENVIRONMENT_BYTES = 230 * 10**6
FORBIDDEN = ("torch", "hivemind", "scipy", "transformers", "pandas")
TEST_PACKAGES = ("pytest", "pytest-timeout", "pytest-xdist", "hypothesis")
STOP_SECONDS = 15.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseInstall:
    """A virtual environment with the base install."""

    directory: Path

    def command(self, name: str) -> str:
        """Path of an executable in it."""
        return str(self.directory / "venv" / "bin" / name)

    def run(self, *command: str, timeout_seconds: float = 120) -> str:
        """Run one of its executables in its directory; returns standard output. Raises
        AssertionError with its errors.
        """
        done = subprocess.run(
            [self.command(command[0]), *command[1:]],
            cwd=self.directory,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
        )
        assert done.returncode == 0, (
            f"{command}: exit {done.returncode}\n{done.stdout}{done.stderr}"
        )
        return done.stdout

    def pip(self, *arguments: str) -> None:
        """Install something, at the tested versions."""
        constraints = str(ROOT / "ops" / "constraints.txt")
        more = os.environ.get("MUSTER_PIP_ARGS", "").split()
        quiet = ("--quiet", "--disable-pip-version-check")
        self.run(
            "pip", "install", *quiet, "-c", constraints, *more, *arguments, timeout_seconds=300
        )


def environment() -> dict[str, str]:
    """This process's environment without what would let the source tree in."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    return {name: text for name, text in os.environ.items() if name not in hidden}


def make_install(python: str, directory: Path) -> BaseInstall:
    """Copy the sources (pip builds in place and would leave files in the repository) and
    install.
    """
    source = directory / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for package in PRODUCT_PACKAGES:
        unwanted = shutil.ignore_patterns("__pycache__", "*.pyc")
        shutil.copytree(ROOT / package, source / package, ignore=unwanted)
    subprocess.run([python, "-m", "venv", str(directory / "venv")], check=True, env=environment())
    install = BaseInstall(directory=directory)
    install.pip(str(source))
    shutil.rmtree(source)
    return install


def size_bytes(directory: Path) -> int:
    """Bytes that the files below a directory occupy on disk, each file once."""
    stats = {(s.st_dev, s.st_ino): s for path in directory.rglob("*") for s in [path.lstat()]}
    return sum(stat.st_blocks * 512 for stat in stats.values())


@contextmanager
def serving(install: BaseInstall) -> Iterator[tuple["subprocess.Popen[str]", dict[str, str]]]:
    """`serve` on free ports without a rendezvous, and its addresses; killed at the end if alive."""
    flags = ["--host", "127.0.0.1", "--port", "0", "--http-port", "0", "--no-rendezvous", "--json"]
    data_dir = install.directory / "data"
    process = subprocess.Popen(
        [install.command("muster-coordinator"), "serve", "--data-dir", str(data_dir), *flags],
        cwd=install.directory,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        assert line, process.stderr.read()
        yield process, json.loads(line)
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=STOP_SECONDS)


def check_coordinator(install: BaseInstall) -> None:
    """It answers, serves, ends with exit code 0 on SIGTERM, and lacks what it must not need."""
    assert "serve" in install.run("muster-coordinator", "--help")
    assert install.run("muster-coordinator", "--version").startswith("muster-coordinator ")
    found = install.run(
        "python",
        "-c",
        "import importlib.util as u, sys; "
        f"print([name for name in {FORBIDDEN!r} if u.find_spec(name) is not None])",
    )
    assert found.strip() == "[]"
    with serving(install) as (process, addresses):
        with urllib.request.urlopen(addresses["http_address"] + "/metrics", timeout=10) as answer:
            assert b"muster_coordinator_state" in answer.read()
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=STOP_SECONDS)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors


@pytest.fixture(scope="module")
def base_install(tmp_path_factory: pytest.TempPathFactory) -> BaseInstall:
    """The base install on the Python that runs the tests."""
    return make_install(sys.executable, tmp_path_factory.mktemp("base"))


def test_environment_is_small(base_install: BaseInstall) -> None:
    """At most 230 MB, pip and setuptools included."""
    found_bytes = size_bytes(base_install.directory / "venv")
    assert found_bytes <= MAX_ENVIRONMENT_BYTES, f"{found_bytes / 1e6:.0f} MB"


def test_coordinator_starts_without_torch(base_install: BaseInstall) -> None:
    check_coordinator(base_install)


def test_rendezvous_without_hivemind_is_refused(base_install: BaseInstall) -> None:
    """Never a silent fallback: `serve` that would need hivemind says what to install."""
    command = [base_install.command("muster-coordinator"), "serve", "--port", "0"]
    done = subprocess.run(
        [*command, "--http-port", "0", "--data-dir", str(base_install.directory / "refused")],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 4, done.stderr
    assert "'.[peer]'" in done.stderr and "Traceback" not in done.stderr


def python_312() -> str | None:
    """An interpreter that really is 3.12 and can make virtual environments, or None."""
    check = "import sys, ensurepip, venv; sys.exit(sys.version_info[:2] != (3, 12))"
    for candidate in (os.environ.get("MUSTER_PYTHON312", ""), "python3.12"):
        path = shutil.which(candidate) if candidate else None
        if path is None:
            continue
        if subprocess.run([path, "-c", check], capture_output=True, timeout=30).returncode == 0:
            return path
    return None


def test_python_312_runs_coordinator_and_contract(tmp_path: Path) -> None:
    """The same on 3.12, and the fast tests of contract and coordinator on what was installed."""
    python = python_312()
    if python is None:
        pytest.skip("no Python 3.12 that runs: neither MUSTER_PYTHON312 nor python3.12 on PATH")
    install = make_install(python, tmp_path)
    check_coordinator(install)
    install.pip(*TEST_PACKAGES)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for part in ("contract", "coordinator"):
        shutil.copytree(ROOT / "tests" / part, tmp_path / "tests" / part)
    (tmp_path / "tests" / "__init__.py").touch()
    options = ("-q", "-n", "2", "-m", "not slow", "-p", "no:cacheprovider")
    command = ("python", "-m", "pytest", *options, "tests/contract", "tests/coordinator")
    outcome = install.run(*command, timeout_seconds=300)
    assert " passed" in outcome
