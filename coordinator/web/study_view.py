"""What the page shows of a run's studies: trials by size, measured curves, and the law fitted to
them.

A fit takes up to a second, so it is made once for every number of results and kept; numpy is all
that it needs. A study that cannot be fitted yet has the reason instead.
"""

import threading
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import numpy as np

from coordinator.domain.duties import DutyState
from coordinator.operations.requests_studies import StudyStatus, TrialStatus
from coordinator.scaling.observations import Observations
from coordinator.scaling.report import constants_of
from coordinator.scaling.study_fit import StudyFit, fit_observations
from protos.contract.errors import UsageError

_NUM_FRONTIER_POINTS = 24
_MAX_KEPT_FITS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeRow:
    """Trials of one size."""

    params_n: float
    num_done: int
    """With a usable result."""
    num_open: int
    """Open or with somebody."""
    num_failed: int
    """Given up."""
    num_diverged: int
    loss_nats: float
    """At the end of the size's own trial; 0 before it has a result."""
    peers: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyView:
    """One study."""

    study_id: str
    stage: str
    stage_reason: str
    waiting_reason: str
    num_trials: int
    num_done: int
    seed_noise_ratio: float
    sizes: tuple[SizeRow, ...]
    curves: tuple[dict[str, Any], ...]
    """{params_n, points: [[compute_flop, loss_nats], ...]} of every size with a result."""
    fit: dict[str, Any] | None
    """{form, constants, n_opt_exponent, reasons, frontier: [[compute, loss, n_opt], ...]}; the
    frontier only where the best size is among those fitted."""
    fit_reason: str
    """Why there is no fit; "" if there is one."""


def size_rows(trials: tuple[TrialStatus, ...]) -> tuple[SizeRow, ...]:
    """Trials by size, smallest first."""
    rows = []
    for params_n in sorted({trial.params_n for trial in trials}):
        own = [trial for trial in trials if trial.params_n == params_n]
        count = Counter("DIVERGED" if trial.divergence else trial.state for trial in own)
        rows.append(
            SizeRow(
                params_n=params_n,
                num_done=count[DutyState.DONE],
                num_open=count[DutyState.OPEN] + count[DutyState.ASSIGNED],
                num_failed=count[DutyState.FAILED],
                num_diverged=count["DIVERGED"],
                loss_nats=max((t.loss_nats for t in own if t.purpose == "SIZE"), default=0.0),
                peers=tuple(sorted({t.peer_name for t in own if t.peer_name})),
            )
        )
    return tuple(rows)


def curves_of(table: Observations) -> tuple[dict[str, Any], ...]:
    """Loss against compute, a curve for every size."""
    return tuple(
        {
            "params_n": float(params_n),
            "points": sorted(
                [float(compute), float(loss)]
                for compute, loss in zip(
                    table.compute_flop[table.params_n == params_n],
                    table.loss_nats[table.params_n == params_n],
                    strict=True,
                )
            ),
        }
        for params_n in np.unique(table.params_n)
    )


def fit_view(fit: StudyFit) -> dict[str, Any]:
    """The law and its frontier over the measured computes, where sizes were tried round it."""
    measured, sizes = fit.observations.compute_flop, fit.observations.params_n
    computes = np.geomspace(measured.min(), measured.max(), _NUM_FRONTIER_POINTS)
    frontier = [
        [float(compute), best.loss_nats, best.params_n]
        for compute in computes
        for best in (fit.optimum(float(compute)).optimum,)
    ]
    is_tried = [sizes.min() <= row[2] <= sizes.max() for row in frontier]
    reasons = [*(f"warning: {said}" for said in fit.warnings), *fit.reasons]
    if np.isfinite(frontier).all() and not all(is_tried):
        reasons.append(
            f"the best size lies outside those fitted ({sizes.min():.4g} to {sizes.max():.4g} "
            "parameters) at some computes, where no frontier is drawn: try more sizes"
        )
        frontier = [row for row, kept in zip(frontier, is_tried, strict=True) if kept]
    return {
        "form": fit.fit.form.value,
        "constants": constants_of(fit.fit.law),
        "n_opt_exponent": fit.allocation.law.params_exponent,
        "reasons": reasons,
        "frontier": frontier,
    }


class StudyViews:
    """Views with fits that are made once; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: dict[tuple[str, int], tuple[dict[str, Any] | None, str]] = {}

    def view(self, study: StudyStatus, table: Observations | UsageError) -> StudyView:
        """The view of a study with its observations, or why there are none."""
        curves: tuple[dict[str, Any], ...] = ()
        if isinstance(table, UsageError):
            fit, why = None, table.found
        else:
            curves = curves_of(table)
            fit, why = self._fit(study.study_id, table)
        shared = ("study_id", "stage", "stage_reason", "waiting_reason", "num_trials", "num_done")
        return StudyView(
            **{name: getattr(study, name) for name in shared},
            seed_noise_ratio=study.seed_noise_ratio,
            sizes=size_rows(study.trials),
            curves=curves,
            fit=fit,
            fit_reason=why,
        )

    def _fit(self, study_id: str, table: Observations) -> tuple[dict[str, Any] | None, str]:
        key = (study_id, len(table))
        with self._lock:  # one fit at a time: it is the page that waits, not the run
            if key not in self._kept:
                if len(self._kept) >= _MAX_KEPT_FITS:
                    self._kept.clear()
                self._kept[key] = _fit_or_reason(table)
            return self._kept[key]


def _fit_or_reason(table: Observations) -> tuple[dict[str, Any] | None, str]:
    """Whatever the table, an answer: the rest of the page must not wait for a better one."""
    try:
        with np.errstate(all="ignore"):  # what comes of it is looked at below
            fit = fit_view(fit_observations(table, num_draws=0))
    except UsageError as error:
        return None, f"{error.found}; {error.allowed}"
    except (ArithmeticError, ValueError, np.linalg.LinAlgError) as error:
        return None, f"the fit failed: {error}; losses that fall with size and compute are needed"
    numbers = [*fit["constants"].values(), fit["n_opt_exponent"], *chain(*fit["frontier"])]
    if not np.isfinite(numbers).all():
        return None, "the fit has no finite optimum; losses that fall with compute are needed"
    return fit, ""


def plain_views(views: tuple[StudyView, ...]) -> dict[str, Any]:
    """For JSON."""
    return {"studies": [asdict(view) for view in views]}
