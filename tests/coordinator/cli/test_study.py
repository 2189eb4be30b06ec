"""`study fit` and `study replay` as a person uses them."""

import json
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from coordinator.cli import study
from protos.contract.errors import MachineError
from tests.coordinator.cli.test_cli import ask, run_here
from tests.coordinator.scaling.tables import CHINCHILLA_CSV, PORIAN_CSV, TINY_CSV

QUICK = ("--bootstrap", "20")
NO_PLOTS = "cannot write plots" if find_spec("matplotlib") else "needs matplotlib"


def fit(path: Path, *arguments: str) -> Any:
    """What `study fit --json` prints; nothing in it is outside JSON."""
    report = ask("study", "fit", "--observations", str(path), *QUICK, *arguments)
    json.dumps(report, allow_nan=False)
    return report


def test_besiroglus_constants_from_the_command_line(tmp_path: Path) -> None:
    lines = [x for x in CHINCHILLA_CSV.read_text().splitlines() if x[0].isdigit()]
    lines.sort(key=lambda line: float(line.split(",")[2]))
    table = tmp_path / "points.csv"
    table.write_text("N,C,loss\n" + "\n".join(lines[:-5]) + "\n")
    export = ("--export", str(tmp_path / "fitted.csv"))
    report = fit(table, "--form", "additive", "--loss", "lad", "--flop", "5.76e23", *export)
    assert len((tmp_path / "fitted.csv").read_text().splitlines()) == 241
    found = [report["constants"][name] for name in ("A", "B", "E", "alpha", "beta")]
    assert found == pytest.approx([482.01, 2085.4, 1.8169, 0.34781, 0.36585], rel=1e-3)
    assert report["num_fitted"] == 240
    assert report["optima"][0]["n_opt"] == pytest.approx(72.3e9, rel=0.02)
    assert report["optima"][0]["n_opt_low"] < report["optima"][0]["n_opt"]
    assert set(report["intervals"]) == set(report["constants"]) - {"kappa"}
    assert report["assumed"] == ["kappa"]


def test_auto_predicts_rows() -> None:
    report = fit(PORIAN_CSV, "--max-flop", "4e17", "--predict", str(PORIAN_CSV))
    assert report["largest_flop"] <= 4e17
    assert len(report["predictions"]) == 121
    assert report["prediction_summary"]["coverage_ratio"] >= 0.85
    assert {"form", "reasons", "approach1", "approach2", "band"} <= set(report)
    assert report["approach2"]["exponent"] == pytest.approx(0.5, abs=0.1)


@pytest.mark.slow
def test_pictures(tmp_path: Path) -> None:
    report = fit(PORIAN_CSV, "--predict", str(PORIAN_CSV), "--plot", str(tmp_path))
    names = {Path(path).name for path in report["plots"]}
    for picture in ("isoflop", "loss-against-compute", "surface", "forecast"):
        assert {f"{picture}.png", f"{picture}.svg"} <= names
    assert all((tmp_path / name).stat().st_size > 5000 for name in names)


def test_the_same_seed_says_the_same() -> None:
    flags = ("--form", "general-tied", "--seed", "5")
    assert fit(PORIAN_CSV, *flags) == fit(PORIAN_CSV, *flags)


def test_a_fit_for_people() -> None:
    done = run_here("study", "fit", "--observations", str(PORIAN_CSV), "--form", "tied", *QUICK)
    assert done.returncode == 0, done.stderr
    for word in ("alpha", "N_opt", "approach2", "- bands"):
        assert word in done.stdout


def test_export_overwrites_nothing(tmp_path: Path) -> None:
    table = tmp_path / "own.csv"
    table.write_text(PORIAN_CSV.read_text())
    done = run_here("study", "fit", "--observations", str(table), "--export", str(table), *QUICK)
    assert done.returncode == 2 and "is there already" in done.stderr
    assert table.read_text() == PORIAN_CSV.read_text()


def curve_table(tmp_path: Path) -> Path:
    """Our own curves up to 200 k parameters, every second point."""
    lines = [x for x in TINY_CSV.read_text().splitlines() if x[0] == "N" or x[0].isdigit()]
    table = tmp_path / "curve.csv"
    kept = [lines[0], *[x for x in lines[1:] if float(x.split(",")[0]) < 200_000][::2]]
    table.write_text("\n".join(kept) + "\n")
    return table


def test_replay(tmp_path: Path) -> None:
    table = curve_table(tmp_path)
    report = ask("study", "replay", "--curve", str(table))
    assert report["forecasts"] and report["by_horizon"]
    assert all(math.isfinite(row["loss_predicted"]) for row in report["forecasts"])


def test_a_curve_that_rises(tmp_path: Path) -> None:
    table = tmp_path / "curve.csv"

    def write(losses: list[float]) -> None:
        rows = [f"1e6,{k + 1}e6,{loss}" for k, loss in enumerate(losses)]
        table.write_text("N,D,loss\n" + "\n".join(rows) + "\n")

    write([2 + k / 10 for k in range(12)])
    done = run_here("study", "replay", "--curve", str(table))
    assert done.returncode == 2 and "a curve whose loss goes from 2.1" in done.stderr
    write([*(4 - k / 10 for k in range(12)), 3.2, 3.4])
    done = run_here("study", "replay", "--curve", str(table))
    assert done.returncode == 0 and "warning: the loss rises from 2.9000" in done.stderr
    assert "RuntimeWarning" not in done.stderr
    report = ask("study", "replay", "--curve", str(table))
    assert "the loss rises" in report["warnings"][0]


@pytest.mark.slow
def test_replay_for_people(tmp_path: Path) -> None:
    table = curve_table(tmp_path)
    done = run_here("study", "replay", "--curve", str(table), "--plot", str(tmp_path / "plots"))
    assert done.returncode == 0 and "90 % band" in done.stdout
    assert (tmp_path / "plots" / "forecast.svg").exists()


@pytest.mark.parametrize(
    ("table", "flags", "exit_code", "words"),
    [
        (None, (), 2, "cannot read"),
        ("N,D,loss\n1e8,2e9,-1\n", (), 2, "the loss of observation 1 is -1"),
        ("N,D,loss\n1e8,2e9,nan\n", (), 2, "nan"),
        ("N,D,loss\n1e8,2e9,3\n2e8,2e9,2.9\n", (), 2, "2 different points"),
        ("N,D,loss,convention\n1e8,2e9,3,matmul\n1e8,1e9,3,unstated\n", (), 2, "mixes"),
        ("N,D,loss\n" + "".join(f"1e8,{k}e9,{4 - k / 20}\n" for k in range(1, 20)), (), 2, "N in"),
        ("good", ("--form", "cubic"), 2, "--form cubic"),
        ("good", ("--loss", "l3"), 2, "--loss l3"),
        ("good", ("--max-flop", "1"), 2, "no row with at most"),
        ("good", ("--max-flop", "-1"), 2, "--max-flop -1"),
        ("good", ("--bootstrap", "-1"), 2, "--bootstrap -1"),
        ("good", ("--flop", "1e30"), 2, "times the largest compute"),
        ("good", ("--flop", "1e-5"), 2, "--flop 1e-05"),
        ("good", ("--flop", "1e10"), 2, "less than the smallest compute"),
        ("good", ("--plot", "/dev/null/x"), 4, NO_PLOTS),
        ("good", ("--where", "tag=x"), 2, "0 columns 'tag'"),
        ("good", ("--predict", "nowhere.csv"), 2, "cannot read"),
        ("good", ("--convention", "matmul"), 2, "head_params"),
    ],
)
def test_bad_input_is_explained(
    tmp_path: Path, table: str | None, flags: tuple[str, ...], exit_code: int, words: str
) -> None:
    path = PORIAN_CSV if table == "good" else tmp_path / "table.csv"
    if table not in (None, "good"):
        path.write_text(table)
    done = run_here("study", "fit", "--observations", str(path), *QUICK, *flags)
    assert (done.returncode, "Traceback" in done.stderr) == (exit_code, False), done.stderr
    assert words in done.stderr
    assert "allowed:" in done.stderr and "remedy:" in done.stderr


def test_every_published_law_is_shown_with_its_source() -> None:
    rows = ask("study", "laws")["laws"]
    assert len(rows) > 40
    assert all(row["source"] and row["confidence"] and row["constants"] for row in rows)
    found = next(row for row in rows if row["name"] == "besiroglu" and "a" in row["constants"])
    assert found["constants"]["a"] == 482.006
    assert "Besiroglu" in run_here("study", "laws").stdout


def test_missing_packages_are_named() -> None:
    study.need_scaling_extra("study fit", "json")
    with pytest.raises(MachineError, match="needs no_such_package") as caught:
        study.need_scaling_extra("study fit --plot", "no_such_package")
    assert ".[scaling]" in caught.value.remedy
