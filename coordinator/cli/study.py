"""`study create|status` (study_swarm.py), `fit|replay|laws`: sweeps on the swarm, laws from a table
or a study, forecasts of a recorded run, the published constants.

Fits run on numpy; pictures are refused by name where the extra [scaling] is missing.
"""

import importlib.util
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coordinator.cli import study_swarm
from coordinator.cli.options import DEFAULT_DATA_DIR, AsJson, DataDir, print_json, print_table
from coordinator.cli.tables import Columns, Where, read_observations, read_table, selection_of
from protos.contract.command_line import say

if TYPE_CHECKING:
    from coordinator.scaling.columns import Selection
    from coordinator.scaling.observations import Observations
    from coordinator.scaling.study_fit import StudyFit

app = typer.Typer(no_args_is_help=True, help="Scaling laws: small runs, fits, forecasts.")

app.command("create")(study_swarm.create)
app.command("status")(study_swarm.status)


_NearRatio = Annotated[
    float | None,
    typer.Option(
        help="Keep rows within this share of the best loss at their compute (inf: all). "
        "Default: all for additive and tied, 0.15 otherwise."
    ),
]
_Forced = Annotated[
    bool,
    typer.Option(
        "--force-extrapolation",
        help="Beyond x1000 of the largest compute, or x100,000 below the smallest.",
    ),
]
_MANY_ROWS = 2_000
"""From here a fit is long enough to be followed."""


@app.callback()
def _group() -> None:
    pass


def need_scaling_extra(command: str, *packages: str) -> None:
    """Raises MachineError when a package of the extra [scaling] is missing."""
    from protos.contract.errors import MachineError

    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise MachineError(
            f"{command} needs {' and '.join(missing)}, not installed here",
            allowed="an installation with the extra [scaling]",
            remedy="pip install '.[scaling]' (with -c ops/constraints.txt)",
        )


def make_plot_directory(directory: Path) -> None:
    """Before the work is done for it. Raises MachineError where nothing can be written."""
    from protos.contract.errors import MachineError

    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise MachineError(
            f"cannot write plots to {directory}: {error}",
            allowed="a directory that can be written",
            remedy="name another with --plot",
        ) from error


def write_plots(directory: Path, pictures: dict[str, dict[str, bytes]]) -> list[str]:
    """Write NAME.png and NAME.svg; returns the paths. Raises MachineError."""
    from protos.contract.errors import MachineError

    paths = []
    try:
        for name, by_format in pictures.items():
            for ending, content in by_format.items():
                path = directory / f"{name}.{ending}"
                path.write_bytes(content)
                paths.append(str(path))
    except OSError as error:
        raise MachineError(
            f"cannot write plots to {directory}: {error}",
            allowed="a directory that can be written",
            remedy="name another with --plot",
        ) from error
    return paths


@app.command("fit")
def fit(
    observations: Annotated[
        Path | None, typer.Option(help="Table N,D,C,loss (C optional: 6 N D).", readable=False)
    ] = None,
    columns: Columns = None,
    where: Where = None,
    study_id: Annotated[
        str, typer.Option("--study", help="Instead of a table: a study of this coordinator.")
    ] = "",
    export: Annotated[
        Path | None, typer.Option(help="Write the fitted table as CSV.", readable=False)
    ] = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    form: Annotated[
        str, typer.Option(help="additive, tied, general, general-tied or auto.")
    ] = "auto",
    loss: Annotated[str, typer.Option(help="huber (knee 1e-3), lad or ls.")] = "huber",
    max_flop: Annotated[float, typer.Option(help="Fit rows up to this compute only.")] = float(
        "inf"
    ),
    predict: Annotated[
        Path | None, typer.Option(help="Rows whose loss is predicted.", readable=False)
    ] = None,
    flop: Annotated[
        list[float] | None, typer.Option(help="Compute whose best N and D are shown; repeatable.")
    ] = None,
    near_ratio: _NearRatio = None,
    convention: Annotated[
        str, typer.Option(help="Convert the table first: matmul or non-embedding.")
    ] = "",
    bootstrap: Annotated[
        int, typer.Option(help="Draws behind the intervals; fewer than 20 give none.")
    ] = 400,
    seed: Annotated[int, typer.Option(help="Of starts and draws.", min=0)] = 0,
    is_forced: _Forced = False,
    plot: Annotated[
        Path | None, typer.Option(help="Directory for PNG and SVG.", readable=False)
    ] = None,
    is_json: AsJson = False,
) -> None:
    """Fit scaling laws to any table: constants with intervals, N_opt and D_opt, predictions."""
    from coordinator.scaling.laws import Form
    from coordinator.scaling.parametric import Loss
    from coordinator.scaling.report import chosen_value, fit_report, predict_rows
    from coordinator.scaling.study_fit import AUTO, fit_observations

    if plot is not None:
        need_scaling_extra("study fit --plot", "matplotlib")
    chosen = chosen_value("--form", form, [*(item.value for item in Form), AUTO])
    _check_numbers(bootstrap=bootstrap, near_ratio=near_ratio, flop=flop or [], max_flop=max_flop)
    selection = selection_of(columns, where)
    table = _table(observations, study_id, data_dir, convention=convention, selection=selection)
    if export is not None:
        _write_table(export, table)
    if plot is not None:
        make_plot_directory(plot)
    study = fit_observations(
        table,
        form=None if chosen == AUTO else Form(chosen),
        loss=Loss(chosen_value("--loss", loss, [item.value for item in Loss])),
        max_flop=max_flop,
        near_ratio=near_ratio,
        num_draws=bootstrap,
        seed=seed,
        progress=say if len(table) > _MANY_ROWS else lambda _: None,
    )
    computes = flop or [study.largest_flop * factor for factor in (1.0, 10.0, 100.0)]
    report = fit_report(study, computes, is_forced=is_forced)
    if predict is not None:
        rows = predict_rows(
            study, read_table(predict), name=str(predict), is_forced=is_forced, selection=selection
        )
        report["warnings"] += rows.pop("warnings")
        report.update(rows)
    if plot is not None:
        report["plots"] = write_plots(plot, _pictures(study, max(computes), report))
    if is_json:
        print_json(report)
    else:
        _show_fit(report)


def _table(
    path: Path | None, study_id: str, data_dir: Path, *, convention: str, selection: "Selection"
) -> "Observations":
    from coordinator.scaling.observations import Convention
    from coordinator.scaling.report import chosen_value
    from protos.contract.errors import UsageError

    if (path is None) == (not study_id):
        raise UsageError(
            "both --observations and --study" if study_id else "neither table nor study",
            allowed="--observations FILE, or --study ID",
            remedy="give one of them",
        )
    if path is None:
        table = study_swarm.load_observations(study_id, data_dir)
    else:
        table = read_observations(path, selection)
    if not convention:
        return table
    allowed = [Convention.MATMUL.value, Convention.NON_EMBEDDING.value]
    return table.converted(Convention(chosen_value("--convention", convention, allowed)))


def _write_table(path: Path, table: "Observations") -> None:
    from coordinator.scaling.observations import observations_to_csv
    from protos.contract.errors import MachineError, UsageError

    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(observations_to_csv(table))
    except FileExistsError as error:
        raise UsageError(
            f"{path} is there already", allowed="a new file", remedy="name another --export"
        ) from error
    except OSError as error:
        raise MachineError(
            f"cannot write {path}: {error.strerror}",
            allowed="a file in a folder that this user may write to",
            remedy="name another --export",
        ) from error


def _check_numbers(
    *, bootstrap: int, near_ratio: float | None, flop: list[float], max_flop: float
) -> None:
    from coordinator.scaling.extrapolation import LEAST_FLOP
    from protos.contract.errors import UsageError

    checks = (
        ("--bootstrap", float(bootstrap), 0 <= bootstrap <= 100_000, "0 to 100,000 draws"),
        ("--near-ratio", near_ratio, near_ratio is None or near_ratio > 0, "a share above 0"),
        ("--max-flop", max_flop, max_flop > 0, "FLOP above 0"),
        *(
            ("--flop", one, LEAST_FLOP <= one <= 1e40, "6 (one parameter, one token) to 1e40 FLOP")
            for one in flop
        ),
    )
    for name, value, is_good, allowed in checks:
        if not is_good:
            raise UsageError(f"{name} {value}", allowed=allowed, remedy="correct the flag")


def _pictures(
    study: "StudyFit", farthest_flop: float, report: dict[str, Any]
) -> dict[str, dict[str, bytes]]:
    from coordinator.scaling.plots import (
        envelope_plot,
        forecast_plot,
        isoflop_plot,
        surface_plot,
    )
    from coordinator.scaling.report import isoflop_or_reason

    pictures = {
        "loss-against-compute": envelope_plot(study, farthest_flop),
        "surface": surface_plot(study),
    }
    isoflop, why = isoflop_or_reason(study.observations)
    if isoflop is not None:
        pictures["isoflop"] = isoflop_plot(study, isoflop)
    else:
        say(f"no IsoFLOP picture: {why}")
    known = [row for row in report.get("predictions", []) if row.get("loss") is not None]
    if known:
        import numpy as np

        known.sort(key=lambda row: row["C"])
        pictures["forecast"] = forecast_plot(
            np.array([row["C"] for row in known]),
            np.array([row["loss"] for row in known]),
            [(row["C"], row["loss_predicted"], row["low"], row["high"]) for row in known],
            x_title="training compute (FLOP)",
            title="predicted rows against the truth",
        )
    return pictures


def _show_fit(report: dict[str, Any]) -> None:
    law = report["constants"]
    typer.echo(
        f"L = E + (A / N^alpha + B / D^beta)^kappa, {report['form']}, "
        f"{report['num_fitted']} of {report['num_rows']} rows, {report['loss']}"
    )
    intervals = report["intervals"]
    print_table(
        ["constant", "value", "95 % interval"],
        [
            [
                name, f"{value:.6g}",
                "assumed by the form" if name in report["assumed"]
                else "{:.4g} to {:.4g}".format(*intervals[name]) if name in intervals else "-",
            ]
            for name, value in law.items()
        ],
    )  # fmt: skip
    print_table(
        ["FLOP", "N_opt", "95 % interval", "D_opt", "D/N", "loss", "90 % band"],
        [
            [f"{row['flop']:.3g}", "not determined", "-", "-", "-", "-", "-"]
            if not row["is_determined"] else [
                f"{row['flop']:.3g}", f"{row['n_opt']:.4g}",
                "-" if row["n_opt_low"] is None
                else f"{row['n_opt_low']:.3g} to {row['n_opt_high']:.3g}",
                f"{row['d_opt']:.4g}", f"{row['tokens_per_param']:.3g}",
                f"{row['loss']:.4f}", f"{row['loss_low']:.4f} to {row['loss_high']:.4f}",
            ]
            for row in report["optima"]
        ],
    )  # fmt: skip
    for row in report.get("predictions", []):
        typer.echo(
            f"N {row['N']:.4g} D {row['D']:.4g}: {row['loss_predicted']:.4f} "
            f"({row['low']:.4f} to {row['high']:.4f})"
            + (f", measured {row['loss']:.4f}" if row.get("loss") is not None else "")
        )
    if "prediction_summary" in report:
        summary = report["prediction_summary"]
        typer.echo(
            f"mean error {summary['mean_abs_error_percent']:.2f} %, "
            f"{100 * summary['coverage_ratio']:.0f} % inside the band"
        )
    for name in ("approach1", "approach2"):
        said = report[name]
        typer.echo(
            f"{name}: "
            + (said.get("refused") or f"N_opt ~ C^{said['exponent']:.3f}; {said['reason']}")
        )
    for reason in report["reasons"]:
        typer.echo(f"- {reason}")
    for path in report.get("plots", []):
        typer.echo(f"plot: {path}")
    for warning in report["warnings"]:
        say(f"warning: {warning}")


@app.command("replay")
def replay(
    curve: Annotated[
        Path,
        typer.Option(
            help="Recorded curve N,D,C,loss; the largest N is the run, others its study.",
            readable=False,
        ),
    ],
    observations: Annotated[
        Path | None, typer.Option(help="Observations of other sizes.", readable=False)
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Directory for PNG and SVG.", readable=False)
    ] = None,
    columns: Columns = None,
    where: Where = None,
    is_json: AsJson = False,
) -> None:
    """Forecast a recorded run from every point of it, as it would have been done live."""
    from coordinator.scaling.report import replay_report

    if plot is not None:
        need_scaling_extra("study replay --plot", "matplotlib")
    selection = selection_of(columns, where)
    others = None if observations is None else read_observations(observations, selection)
    table = read_observations(curve, selection)
    if plot is not None:
        make_plot_directory(plot)
    report, points = replay_report(table, others)
    if plot is not None:
        from coordinator.scaling.plots import forecast_plot

        said = [
            (row["seen_tokens"], row["loss_predicted"], row["low"], row["high"])
            for row in report["forecasts"]
        ]
        picture = forecast_plot(
            points.tokens_d, points.loss_nats, said, x_title="tokens",
            title="the final loss as forecast at each point",
        )  # fmt: skip
        report["plots"] = write_plots(plot, {"forecast": picture})
    if is_json:
        print_json(report)
        return
    typer.echo(
        f"{report['params_n']:.4g} parameters, {report['final_tokens']:.4g} tokens, "
        f"final loss {report['final_loss']:.4f}"
    )
    print_table(
        ["seen tokens", "share", "forecast", "90 % band", "error"],
        [
            [
                f"{row['seen_tokens']:.4g}", f"{100 * row['seen_ratio']:.0f} %",
                f"{row['loss_predicted']:.4f}", f"{row['low']:.4f} to {row['high']:.4f}",
                f"{row['error_percent']:+.2f} %",
            ]
            for row in report["forecasts"]
        ],
    )  # fmt: skip
    for row in report["by_horizon"]:
        typer.echo(
            f"{row['method']}, x{row['horizon_ratio']:g} tokens ahead: {row['num_forecasts']} "
            f"forecasts of the run of {report['params_n']:.4g} parameters, "
            f"median error {row['median_abs_error_percent']:.2f} %"
        )
    for note in report["notes"]:
        typer.echo(f"- {note}")
    for warning in report["warnings"]:
        say(f"warning: {warning}")
    for path in report.get("plots", []):
        typer.echo(f"plot: {path}")


@app.command("laws")
def laws(is_json: AsJson = False) -> None:
    """Published constants of every law, with their sources and how sure we are of them."""
    from coordinator.scaling.report import published_rows

    rows = published_rows()
    if is_json:
        print_json({"laws": rows})
        return
    print_table(
        ["group", "name", "constants", "sure", "counts", "source"],
        [
            [
                row["group"], row["name"],
                ", ".join(f"{name} {value:g}" for name, value in row["constants"].items()),
                row["confidence"], row["counting"],
                row["source"] + (f" ({row['note']})" if row["note"] else ""),
            ]
            for row in rows
        ],
    )  # fmt: skip
