"""Pictures of a fit, as bytes: IsoFLOP parabolas, loss against compute, surface, forecast.

matplotlib is imported when a figure is drawn, without a display or global state.
"""

import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from coordinator.scaling.approach2 import IsoFlopFit
from coordinator.scaling.study_fit import StudyFit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = NDArray[np.float64]

FORMATS = ("png", "svg")
_DOTS_PER_INCH = 120


def _figure() -> tuple["Figure", Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _bytes_by_format(figure: "Figure") -> dict[str, bytes]:
    out = {}
    for kind in FORMATS:
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, dpi=_DOTS_PER_INCH)
        out[kind] = buffer.getvalue()
    return out


def _colour(values: Array) -> Callable[[float], Any]:
    import matplotlib

    low, high = float(np.log(values.min())), float(np.log(values.max()))
    scale = matplotlib.colormaps["viridis"]
    return lambda value: scale((np.log(value) - low) / max(high - low, 1e-9) * 0.9)


def isoflop_plot(study: StudyFit, fit: IsoFlopFit) -> dict[str, bytes]:
    """Loss against N at every budget, its parabola and its minimum; rejected budgets are dashed.
    Bytes by format."""
    figure, axes = _figure()
    table = study.observations
    colour = _colour(np.array([budget.compute_flop for budget in fit.budgets]))
    for budget in fit.budgets:
        near = np.abs(np.log(table.compute_flop / budget.compute_flop)) <= 0.06
        shade = colour(budget.compute_flop)
        axes.plot(table.params_n[near], table.loss_nats[near], ".", color=shade)
        if np.isfinite(budget.curvature) and near.any():
            log_n = np.linspace(
                np.log(table.params_n[near].min()), np.log(table.params_n[near].max()), 60
            )
            parabola = budget.loss_nats + budget.curvature * (log_n - np.log(budget.params_n)) ** 2
            axes.plot(
                np.exp(log_n), parabola, "-" if budget.is_accepted else ":", color=shade,
                label=f"{budget.compute_flop:.2g} FLOP" + ("" if budget.is_accepted else " (no)"),
            )  # fmt: skip
        if budget.is_accepted:
            axes.plot([budget.params_n], [budget.loss_nats], "v", color=shade)
    axes.set(xscale="log", xlabel="parameters N", ylabel="loss (nats)")
    axes.set_title(f"IsoFLOP: N_opt ~ C^{fit.law.exponent:.3f} +- {fit.exponent_error:.3f}")
    figure.legend(fontsize="x-small", loc="outside right upper")
    return _bytes_by_format(figure)


def envelope_plot(study: StudyFit, farthest_flop: float) -> dict[str, bytes]:
    """Loss against compute, the frontier of the law and its band. Bytes by format."""
    figure, axes = _figure()
    table = study.observations
    colour = _colour(table.params_n)
    axes.scatter(
        table.compute_flop, table.loss_nats, s=8, c=[colour(size) for size in table.params_n]
    )
    computes = np.geomspace(table.compute_flop.min(), max(farthest_flop, study.largest_flop), 24)
    best = [study.optimum(float(compute)) for compute in computes]
    axes.plot(computes, [b.optimum.loss_nats for b in best], "k-", label="best by the law")
    axes.fill_between(
        computes, [b.loss_low_nats for b in best], [b.loss_high_nats for b in best],
        color="k", alpha=0.15, label="90 % band",
    )  # fmt: skip
    axes.axvline(study.largest_flop, color="grey", linestyle=":", label="largest measured")
    axes.axhline(study.fit.law.e_nats, color="grey", linestyle="--", label="floor E")
    axes.set(xscale="log", xlabel="training compute (FLOP)", ylabel="loss (nats)")
    axes.legend(fontsize="x-small")
    return _bytes_by_format(figure)


def surface_plot(study: StudyFit) -> dict[str, bytes]:
    """Contours of the fitted loss over (N, D), the observations and the best path. Bytes."""
    figure, axes = _figure()
    table, law = study.observations, study.fit.law
    sizes = np.geomspace(table.params_n.min() / 2, table.params_n.max() * 2, 80)
    tokens = np.geomspace(table.tokens_d.min() / 2, table.tokens_d.max() * 2, 80)
    surface = law.loss_nats(sizes[None, :], tokens[:, None])
    lines = axes.contour(sizes, tokens, surface, levels=14, cmap="viridis")
    axes.clabel(lines, fontsize="x-small")
    axes.plot(table.params_n, table.tokens_d, ".", color="grey", markersize=3)
    computes = np.geomspace(table.compute_flop.min(), table.compute_flop.max(), 40)
    best = [study.optimum(float(compute)).optimum for compute in computes]
    axes.plot([b.params_n for b in best], [b.tokens_d for b in best], "r-", label="best path")
    axes.set(
        xscale="log", yscale="log", xlabel="parameters N", ylabel="tokens D",
        xlim=(sizes[0], sizes[-1]), ylim=(tokens[0], tokens[-1]),
        title=f"{study.fit.form.value} law, loss in nats",
    )  # fmt: skip
    axes.legend(fontsize="x-small")
    return _bytes_by_format(figure)


def forecast_plot(
    x: Array,
    truth: Array,
    said: Sequence[tuple[float, float, float, float]],
    *,
    x_title: str,
    title: str,
) -> dict[str, bytes]:
    """Measured losses against `x`, and forecasts (x, loss, low, high) beside them. Bytes."""
    figure, axes = _figure()
    axes.plot(x, truth, "k.-", linewidth=0.8, label="measured")
    if said:
        at, loss, low, high = (np.array(column) for column in zip(*said, strict=True))
        axes.errorbar(
            at, loss, yerr=[loss - low, high - loss], fmt="r_", capsize=3, label="forecast, 90 %"
        )
    axes.set(xscale="log", xlabel=x_title, ylabel="loss (nats)", title=title)
    axes.legend(fontsize="x-small")
    return _bytes_by_format(figure)
