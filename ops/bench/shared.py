"""What all benchmarks share: which Python runs them, what they ran on, how figures are shown and
kept.

A benchmark is an executable of its own beside this file. It collects `Figure`s and calls `report`,
which prints a table and, with --json, one object as the last line; with --record it appends a dated
section to NAME.md. Nothing here imports anything but the standard library, so that a benchmark can
first change over to the repository's own virtual environment (`use_project_python`).
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BENCH_DIR = ROOT / "ops" / "bench"
_VERSIONED_PACKAGES = (
    "grpcio",
    "protobuf",
    "numpy",
    "cryptography",
    "torch",
    "hivemind",
    "safetensors",
    "tokenizers",
    "scipy",
)
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


def use_project_python() -> None:
    """Run the script again with .venv's Python if there is one; make the repository importable.

    Without .venv the Python that started the script goes on.
    """
    python = ROOT / ".venv" / "bin" / "python"
    if python.exists() and Path(sys.prefix).resolve() != (ROOT / ".venv").resolve():
        os.execv(python, [str(python), *sys.argv])
    sys.path.insert(0, str(ROOT))
    os.environ["PYTHONPATH"] = str(ROOT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One measured number, beside the aim if the design names one."""

    name: str
    value: float | None
    """None: could not be measured; `note` says why."""
    unit: str
    at_least: float | None = None
    at_most: float | None = None
    note: str = ""

    @property
    def is_met(self) -> bool | None:
        """True or False against the aim, None without one."""
        if self.at_least is None and self.at_most is None:
            return None
        if self.value is None:
            return False
        above = self.at_least is None or self.value >= self.at_least
        return above and (self.at_most is None or self.value <= self.at_most)

    @property
    def aim(self) -> str:
        """The aim in words, empty without one."""
        if self.at_least is not None:
            return f">= {_number(self.at_least)}"
        return "" if self.at_most is None else f"<= {_number(self.at_most)}"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    if value == int(value) and abs(value) < 1e12:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def argument_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the flags of every benchmark."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--json", action="store_true", help="one JSON object as the last line of standard output"
    )
    parser.add_argument(
        "--record", action="store_true", help="append a dated section to the .md file beside"
    )
    return parser


def machine() -> dict[str, Any]:
    """What the figures depend on: processor, memory, system, Python."""
    memory_kib = next(
        (int(v.split()[0]) for k, v in _proc_pairs("/proc/meminfo") if k == "MemTotal"), 0
    )
    return {
        "num_cores": len(os.sched_getaffinity(0)),
        "cpu_model": _cpu_model(),
        "memory_gib": round(memory_kib / 2**20, 1),
        "system": _system_name(),
        "python": platform.python_version(),
    }


def _proc_pairs(path: str) -> Iterable[tuple[str, str]]:
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        yield name.strip(), value.strip()


def _cpu_model() -> str:
    """The model's name; virtual machines often hide it, then family and model number as well."""
    pairs = dict(_proc_pairs("/proc/cpuinfo"))
    name = pairs.get("model name", platform.machine())
    numbers = f"family {pairs.get('cpu family', '?')}, model {pairs.get('model', '?')}"
    return f"{name} ({numbers}, {pairs.get('cpu MHz', '?').split('.')[0]} MHz)"


def _system_name() -> str:
    try:
        name = platform.freedesktop_os_release().get("PRETTY_NAME", platform.system())
    except OSError:
        name = platform.system()
    return f"{name}, Linux {platform.release().split('-')[0]}"


def versions() -> dict[str, str]:
    """Installed packages that the figures depend on."""
    found = {}
    for name in _VERSIONED_PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def code_revision() -> str:
    """Commit, with "+changes" if tracked or new source files differ from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, check=False)
        return done.stdout.decode().strip()

    revision = git("rev-parse", "--short=12", "HEAD") or "unknown"
    return revision + ("+changes" if git("status", "--porcelain") else "")


def cpu_seconds(pid: int) -> float:
    """User and system time of a process with all of its threads, children not included."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_SECOND


def spread(values: Iterable[float]) -> str:
    """Median, smallest and largest in words."""
    sorted_values = sorted(values)
    if not sorted_values:
        return "no values"
    middle = statistics.median(sorted_values)
    return (
        f"median {_number(middle)}, {_number(sorted_values[0])} to {_number(sorted_values[-1])}, "
        f"n = {len(sorted_values)}"
    )


def report(
    name: str,
    figures: Iterable[Figure],
    *,
    arguments: argparse.Namespace,
    details: Mapping[str, Any] | None = None,
) -> int:
    """Print the figures beside their aims; returns 0 if every aim is met, else 1.

    `details` go into the JSON object only: what the figures were made from.
    """
    listed = list(figures)
    moment = datetime.datetime.now(datetime.UTC).replace(microsecond=0).isoformat()
    for line in _table(listed):
        print(line)
    if arguments.record:
        _record(name, listed, moment)
    if arguments.json:
        plain = {
            "benchmark": name,
            "time": moment,
            "figures": {figure.name: figure.value for figure in listed},
            "aims": {figure.name: figure.aim for figure in listed if figure.aim},
            "are_aims_met": {f.name: f.is_met for f in listed if f.is_met is not None},
            "figure_details": [asdict(figure) for figure in listed],
            "versions": {**versions(), "code": code_revision()},
            "machine": machine(),
            "details": dict(details or {}),
        }
        print(json.dumps(plain, sort_keys=True), flush=True)
    return int(any(figure.is_met is False for figure in listed))


def _table(figures: list[Figure]) -> list[str]:
    rows = [("figure", "value", "unit", "aim", "met", "note")]
    rows += [
        (
            figure.name,
            _number(figure.value),
            figure.unit,
            figure.aim,
            {True: "yes", False: "NO", None: ""}[figure.is_met],
            figure.note,
        )
        for figure in figures
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = []
    for row in rows:
        cells = [text.ljust(width) for text, width in zip(row[:5], widths, strict=True)]
        lines.append("| " + " | ".join([*cells, row[5]]) + " |")
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in [*widths, 3]) + "|")
    return lines


def _record(name: str, figures: list[Figure], moment: str) -> None:
    path = BENCH_DIR / f"{name}.md"
    text = path.read_text(encoding="utf-8") if path.exists() else f"# {name}\n"
    where = machine()
    command = shlex.join([f"ops/bench/{name}", *(a for a in sys.argv[1:] if a != "--record")])
    lines = [
        "",
        f"## {moment[:10]}",
        "",
        f"- Machine: {where['num_cores']} cores, {where['cpu_model']}, {where['memory_gib']} GiB, "
        f"{where['system']}, Python {where['python']}",
        f"- Command: `{command}`",
        f"- Code: {code_revision()}; "
        + ", ".join(f"{package} {version}" for package, version in versions().items()),
        "",
        *_table(figures),
        "",
    ]
    path.write_text(text.rstrip("\n") + "\n" + "\n".join(lines), encoding="utf-8")
    print(f"recorded in {path.relative_to(ROOT)}", file=sys.stderr)


def say(text: str) -> None:
    """Progress, on standard error."""
    print(text, file=sys.stderr, flush=True)
