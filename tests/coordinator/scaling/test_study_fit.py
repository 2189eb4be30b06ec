"""Fits of whole tables: the form by extrapolation, bands that cover, odd tables survived."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from coordinator.scaling import bands, parametric
from coordinator.scaling.bands import bootstrap
from coordinator.scaling.laws import Form, LossLaw
from coordinator.scaling.observations import Convention, Observation, Observations
from coordinator.scaling.parametric import Loss, fit_law
from coordinator.scaling.plan_observed import observed_law
from coordinator.scaling.report import fit_report, predict_rows
from coordinator.scaling.selection import (
    form_weights,
    impossible_rows,
    row_weights,
)
from coordinator.scaling.study_fit import StudyFit, fit_observations
from protos.contract.errors import UsageError
from tests.coordinator.scaling.tables import PORIAN_CSV, TRUTH, chinchilla_240, made_up, read


def errors_above(study: StudyFit, table: Observations) -> tuple[np.ndarray, float]:
    """(errors, share inside the band) of the rows dearer than the fit saw."""
    dear = table.where(table.compute_flop > study.largest_flop * 1.01)
    said = study.predict(dear.params_n, dear.tokens_d, dear.compute_flop)
    is_inside = (dear.loss_nats >= said.low_nats) & (dear.loss_nats <= said.high_nats)
    return np.log(said.loss_nats / dear.loss_nats), float(is_inside.mean())


def test_auto_predicts_the_dearer_half() -> None:
    table = made_up(num_budgets=10)
    cut = float(np.median(table.compute_flop))
    study = fit_observations(table, max_flop=cut, num_draws=50)
    errors, coverage = errors_above(study, table)
    assert np.abs(errors).mean() < 0.01
    assert coverage >= 0.9
    best = study.optimum(float(table.compute_flop.max()))
    truth = TRUTH.optimum(float(table.compute_flop.max()))
    assert best.optimum.params_n == pytest.approx(truth.params_n, rel=0.25)
    assert best.loss_low_nats <= truth.loss_nats <= best.loss_high_nats
    assert any("cuts of the table" in reason for reason in study.reasons)
    assert sum(study.weights.values()) == pytest.approx(1.0)


def test_porian_predicts_the_dearer_half() -> None:
    table = read(PORIAN_CSV)
    budgets = np.unique(table.compute_flop)
    study = fit_observations(table, max_flop=float(budgets[5]), num_draws=50)
    dear = table.where(table.compute_flop > budgets[5])
    errors, coverage = errors_above(study, table)
    best = np.array([dear.loss_nats[dear.compute_flop == c].min() for c in dear.compute_flop])
    is_near = dear.loss_nats <= 1.15 * best
    assert np.abs(errors[is_near]).mean() < 0.04
    assert coverage >= 0.9
    assert study.allocation.form is Form.GENERAL_TIED


def test_a_named_classic_form_is_the_literatures_fit() -> None:
    study = fit_observations(chinchilla_240(), form=Form.ADDITIVE, loss=Loss.LAD, num_draws=20)
    assert len(study.observations) == 240
    assert study.fit.law.a == pytest.approx(482.01, rel=1e-3)
    assert study.weights == {Form.ADDITIVE: 1.0}


def test_odd_rows_do_not_move_a_fit() -> None:
    table = made_up(num_budgets=10)
    rows = list(table.rows)
    for index, factor in ((5, 0.5), (20, 1.7), (33, 0.8)):
        row = rows[index]
        rows[index] = Observation(
            params_n=row.params_n, tokens_d=row.tokens_d, compute_flop=row.compute_flop,
            loss_nats=row.loss_nats * factor,
        )  # fmt: skip
    rows += [rows[40]] * 30
    dirty = Observations.of(rows)
    assert impossible_rows(dirty.compute_flop, dirty.loss_nats)[[5, 33]].all()
    assert not impossible_rows(table.compute_flop, table.loss_nats).any()
    cut = float(np.median(table.compute_flop))
    study = fit_observations(dirty, max_flop=cut, num_draws=0)
    errors, _ = errors_above(study, table)
    assert np.abs(errors).mean() < 0.015
    assert any("mistakes" in reason for reason in study.reasons)


@pytest.mark.parametrize("unit_n", [1e-6, 1e3])
def test_units_do_not_matter(unit_n: float) -> None:
    table, other = made_up(num_budgets=6), made_up(num_budgets=6, unit_n=unit_n)
    plain, scaled = (
        fit_observations(t, form=Form.GENERAL_TIED, num_draws=0) for t in (table, other)
    )
    first = plain.predict(table.params_n, table.tokens_d, table.compute_flop)
    second = scaled.predict(other.params_n, other.tokens_d, other.compute_flop)
    assert first.loss_nats == pytest.approx(second.loss_nats, rel=1e-5)
    best, also = plain.optimum(1e20).optimum, scaled.optimum(1e20).optimum
    assert also.params_n == pytest.approx(best.params_n * unit_n, rel=1e-3)


def test_a_small_table_says_that_it_is_untested() -> None:
    table = made_up(num_budgets=2, num_sizes=4)
    study = fit_observations(table, num_draws=20)
    assert any("too few" in reason for reason in study.reasons)
    said = study.predict(table.params_n * 3, table.tokens_d * 3, table.compute_flop * 9)
    assert (said.high_nats > said.loss_nats).all() and (said.low_nats < said.loss_nats).all()


def test_rows_of_one_ratio_predict_their_line_and_warn() -> None:
    sizes = np.geomspace(3e7, 3e9, 24)
    rows = [
        Observation(
            params_n=n, tokens_d=20 * n, compute_flop=120 * n * n,
            loss_nats=float(TRUTH.loss_nats(n, 20 * n)),
        )
        for n in sizes.tolist()
    ]  # fmt: skip
    study = fit_observations(Observations.of(rows), num_draws=20)
    said = study.predict(np.array([1e10]), np.array([2e11]), np.array([1.2e22]))
    assert said.loss_nats[0] == pytest.approx(TRUTH.loss_nats(1e10, 2e11), rel=0.02)
    assert "rise together" in study.undetermined_reason
    row = fit_report(study, [1.2e22])["optima"][0]
    assert (row["is_determined"], row["n_opt"], row["n_opt_low"]) == (False, None, None)
    assert any("rise together" in warning for warning in study.warnings)
    with pytest.raises(UsageError, match="does not say what N is best"):
        observed_law(Observations.of(rows), name="own.csv")


def test_the_optimum_is_of_the_form_that_the_rows_pick_clearly() -> None:
    law = LossLaw(e_nats=1.8, a=480.0, b=2000.0, alpha=0.35, beta=0.45)
    study = fit_observations(made_up(law, noise_ratio=0.0), num_draws=20)
    assert study.allocation.form is study.fit.form and not study.allocation.form.is_tied
    found = study.optimum(1e22)
    assert found.optimum.params_n == pytest.approx(law.optimum(1e22).params_n, rel=1e-3)
    assert fit_report(study, [1e22])["allocation"]["is_exponent_assumed"] is False


def test_intervals_hold_all_forms_of_the_mix_and_need_draws() -> None:
    table = read(PORIAN_CSV)
    study = fit_observations(table, max_flop=1e18, num_draws=40)
    assert study.allocation.form is Form.GENERAL_TIED
    own = study.boots[Form.GENERAL_TIED].log_optimal_params(2.56e19, study.flop_per_param_token)
    found = study.optimum(2.56e19)
    assert found.params_low is not None and found.params_high is not None
    assert math.log(found.params_high / found.params_low) > 1.5 * float(np.ptp(own))
    assert any("assumption here, not a finding" in reason for reason in study.reasons)
    report = fit_report(study, [1e18])
    assert "params_exponent" in report["assumed"] and "alpha" in report["intervals"]
    for num_draws in (0, 1, 19):
        few = fit_report(fit_observations(table, form=Form.TIED, num_draws=num_draws), [1e18])
        assert few["optima"][0]["n_opt_low"] is None and few["intervals"] == {}


def test_rows_to_predict_are_counted_as_the_fitted_table_counts() -> None:
    rows = [replace(row, convention=Convention.MATMUL) for row in made_up(num_budgets=4).rows]
    study = fit_observations(Observations.of(rows), form=Form.TIED, num_draws=0)

    def predicted(text: str) -> tuple[float, list[str]]:
        found = predict_rows(study, text, name="p.csv", is_forced=False)
        return found["predictions"][0]["loss_predicted"], found["warnings"]

    whole, warnings = predicted("N,D,convention\n1.1e8,1e9,matmul\n")
    assert warnings == []
    converted, warnings = predicted("N,D,convention,head_params\n1e8,1e9,non-embedding,1e7\n")
    assert converted == pytest.approx(whole) and "converted from" in warnings[0]
    assert "taken as the same" in predicted("N,D\n1.1e8,1e9\n")[1][0]
    with pytest.raises(UsageError, match="head_params 0"):
        predicted("N,D,convention\n1e8,1e9,non-embedding\n")


def test_refusals() -> None:
    table = made_up(num_budgets=3)
    with pytest.raises(UsageError, match="no row with at most"):
        fit_observations(table, max_flop=1.0)
    one_size = Observations.of(
        [
            Observation(params_n=1e8, tokens_d=1e9 * k, compute_flop=6e17 * k, loss_nats=3 - k / 99)
            for k in range(1, 30)
        ]
    )
    with pytest.raises(UsageError, match="different N"):
        fit_observations(one_size)


def grid(loss_of: Callable[[float, float], float]) -> Observations:
    """Four sizes, five token counts."""
    return Observations.of(
        Observation(params_n=n, tokens_d=d, compute_flop=6 * n * d, loss_nats=loss_of(n, d))
        for n in np.geomspace(1e7, 1e9, 4).tolist()
        for d in np.geomspace(3e8, 3e10, 5).tolist()
    )


@pytest.mark.parametrize("form", [None, Form.TIED])
def test_losses_without_a_law_are_refused(form: Form | None) -> None:
    generator = np.random.default_rng(0)
    for loss_of, words in (
        (lambda n, d: 3.0, "20 losses between 3 and 3"),
        (lambda n, d: 1 + 0.2 * math.log(n * d), "rows"),
        (lambda n, d: float(generator.uniform(2, 5)), "rows"),
    ):
        with pytest.raises(UsageError, match=words):
            fit_observations(grid(loss_of), form=form, num_draws=0)


def test_an_optimum_far_from_every_size_is_not_shown() -> None:
    of_tokens = grid(lambda n, d: 2 + 1e-4 * n**-0.3 + 600 * d**-0.3)
    study = fit_observations(of_tokens, form=Form.TIED, num_draws=0)
    assert "far from every size" in study.undetermined_reason
    row = fit_report(study, [1e20])["optima"][0]
    assert (row["is_determined"], row["n_opt"], row["loss"]) == (False, None, None)
    assert any("not determined" in text for text in fit_report(study, [1e20])["warnings"])
    with pytest.raises(UsageError, match="does not say what N is best"):
        observed_law(of_tokens, name="own.csv")
    clear = fit_observations(made_up(num_budgets=4), form=Form.TIED, num_draws=0)
    assert clear.undetermined_reason == "" and clear.warnings == ()


def test_the_filter_is_named_when_it_leaves_too_few() -> None:
    with pytest.raises(UsageError, match="rows were left out because") as caught:
        fit_observations(made_up(num_budgets=3), near_ratio=1e-6, num_draws=0)
    assert "of 21 rows" in caught.value.found and "--near-ratio" in caught.value.remedy


def test_many_rows_are_screened_quickly() -> None:
    generator = np.random.default_rng(0)
    compute = np.sort(np.exp(generator.uniform(0, 12, 20_000)))
    loss = 2 + compute**-0.1 * np.exp(0.001 * generator.standard_normal(20_000))
    loss[[500, 19_999]] *= 0.5
    assert np.flatnonzero(impossible_rows(compute, loss)).tolist() == [500, 19_999]


def test_a_long_table_is_fitted_by_way_of_drawn_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    table = made_up(num_budgets=8, num_sizes=600)
    rows = table.params_n, table.tokens_d, table.loss_nats
    quick = fit_law(*rows, form=Form.GENERAL_TIED)
    drawn = bootstrap(quick, *rows, num_draws=60, seed=0).log_optimal_params(1e21, 6.0)
    for module in (parametric, bands):
        monkeypatch.setattr(module, "MANY_ROWS", 10**9)
    whole = fit_law(*rows, form=Form.GENERAL_TIED)
    assert (quick.num_starts, whole.num_starts) == (3, 24)
    assert quick.objective == pytest.approx(whole.objective, rel=1e-4)
    assert quick.law.optimum(1e21).params_n == pytest.approx(
        whole.law.optimum(1e21).params_n, rel=1e-3
    )
    full = bootstrap(whole, *rows, num_draws=60, seed=0).log_optimal_params(1e21, 6.0)
    assert drawn.std() == pytest.approx(full.std(), rel=0.4)
    assert drawn.mean() == pytest.approx(full.mean(), abs=full.std())


def test_weights() -> None:
    errors = {Form.ADDITIVE: 0.02, Form.GENERAL: 0.01}
    weights = form_weights(errors, num_rows=29)
    assert weights == pytest.approx({Form.ADDITIVE: 0.2, Form.GENERAL: 0.8})
    assert form_weights(errors, num_rows=30)[Form.GENERAL] > 0.9
    nan = float("nan")
    weights = form_weights({Form.ADDITIVE: nan, Form.GENERAL: nan}, num_rows=10)
    assert weights == pytest.approx({Form.ADDITIVE: 0.5, Form.GENERAL: 0.5})
    by_row = row_weights(
        np.array([1.0, 1.0, 1.0]), np.array([1.0, 1.0, 100.0]), np.array([1.0, 1.0, 100.0])
    )
    assert by_row == pytest.approx([0.05, 0.05, 1.0])


def test_dense_sizes_are_no_duplicates_of_one_another() -> None:
    generator = np.random.default_rng(0)
    params, tokens = np.exp(generator.uniform(0, 4, (2, 5_000)))
    weights = row_weights(params, tokens, np.ones(5_000))
    assert weights.sum() ** 2 / (weights**2).sum() > 4_000, "not a few rows at the edges alone"
