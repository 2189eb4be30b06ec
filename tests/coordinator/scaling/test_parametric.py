"""Approach 3 against the published constants, and against laws whose constants are known."""

import numpy as np
import pytest

from coordinator.scaling.bands import bootstrap, percentile_interval
from coordinator.scaling.laws import Form, LossLaw, RepetitionLaw
from coordinator.scaling.parametric import Loss, anchored, fit_law, huber_objective
from protos.contract.errors import UsageError
from tests.coordinator.scaling.tables import TRUTH, chinchilla_240, made_up

CHINCHILLA = chinchilla_240()
ROWS = CHINCHILLA.params_n, CHINCHILLA.tokens_d, CHINCHILLA.loss_nats


def test_least_absolute_deviations_are_besiroglus_constants() -> None:
    law = fit_law(*ROWS, form=Form.ADDITIVE, loss=Loss.LAD).law
    found = [law.a, law.b, law.e_nats, law.alpha, law.beta]
    assert found == pytest.approx([482.01, 2085.4, 1.8169, 0.34781, 0.36585], rel=1e-3)


def test_huber_objective_is_the_best_known() -> None:
    fit = fit_law(*ROWS, form=Form.ADDITIVE, seed=3)
    assert fit.objective <= 1.0182741e-3
    assert fit.objective == pytest.approx(huber_objective(fit.law, *ROWS))
    assert fit.law.a == pytest.approx(477.83, rel=1e-3)
    assert fit.law.b == pytest.approx(2143.4, rel=1e-3)


@pytest.mark.parametrize("form", list(Form))
@pytest.mark.parametrize("loss", [Loss.HUBER, Loss.LS])
def test_all_starts_agree(form: Form, loss: Loss) -> None:
    fit = fit_law(*ROWS, form=form, loss=loss)
    assert (fit.num_starts, fit.num_starts_agreed) == (24, 24)
    warm = fit_law(*ROWS, form=form, loss=loss, warm=fit.law)
    assert warm.num_starts == 1
    assert warm.objective == pytest.approx(fit.objective, rel=1e-6)


def test_least_squares() -> None:
    law = fit_law(*ROWS, form=Form.ADDITIVE, loss=Loss.LS).law
    assert (law.a, law.b, law.e_nats) == pytest.approx((593, 4876, 1.865), rel=2e-3)


@pytest.mark.parametrize("unit_n", [1e-6, 1.0, 1e3])
def test_a_known_law_is_found_in_any_unit(unit_n: float) -> None:
    table = made_up(noise_ratio=0.0, unit_n=unit_n)
    law = fit_law(
        table.params_n, table.tokens_d, table.loss_nats, form=Form.GENERAL, loss=Loss.LS,
        tolerance=1e-14,
    ).law  # fmt: skip
    assert law.e_nats == pytest.approx(TRUTH.e_nats, rel=2e-3)
    assert law.kappa == pytest.approx(TRUTH.kappa, rel=0.02)
    predicted = law.loss_nats(table.params_n * 10, table.tokens_d * 10)
    truth = TRUTH.loss_nats(table.params_n / unit_n * 10, table.tokens_d * unit_n * 10)
    assert predicted == pytest.approx(truth, rel=1e-4)


def test_outliers_do_not_move_a_robust_fit() -> None:
    table = made_up(noise_ratio=0.001, seed=1)
    losses = table.loss_nats.copy()
    losses[::9] *= 1.3
    law = fit_law(table.params_n, table.tokens_d, losses, form=Form.ADDITIVE).law
    errors = np.log(law.loss_nats(table.params_n, table.tokens_d) / table.loss_nats)
    assert np.abs(errors).max() < 0.01


def test_bootstrap_has_the_published_width() -> None:
    fit = fit_law(*ROWS, form=Form.ADDITIVE)
    boot = bootstrap(fit, *ROWS, num_draws=400, seed=0)
    intervals = boot.intervals()
    assert intervals["alpha"] == pytest.approx((0.316, 0.373), abs=0.004)
    assert intervals["beta"] == pytest.approx((0.332, 0.416), abs=0.006)
    assert intervals["E"] == pytest.approx((1.771, 1.871), abs=0.006)
    assert intervals["params_exponent"] == pytest.approx((0.482, 0.556), abs=0.006)
    low, high = percentile_interval(np.exp(boot.log_optimal_params(5.76e23, 6.0)))
    assert (low, high) == pytest.approx((52e9, 112e9), rel=0.06)
    again = bootstrap(fit, *ROWS, num_draws=400, seed=0)
    assert np.array_equal(boot.alpha, again.alpha)


def test_re_anchoring_keeps_exponents_and_finds_the_scale() -> None:
    truth = RepetitionLaw(law=LossLaw(e_nats=1.5, a=300.0, b=900.0, alpha=0.3527, beta=0.3527))
    start = RepetitionLaw(law=LossLaw(e_nats=1.869, a=521.0, b=1488.0, alpha=0.3527, beta=0.3527))
    generator = np.random.default_rng(0)
    params = np.exp(generator.uniform(np.log(1e7), np.log(1e9), 60))
    unique = np.exp(generator.uniform(np.log(1e8), np.log(1e10), 60))
    tokens = unique * generator.uniform(0.5, 12, 60)
    losses = truth.loss_nats(params, tokens, unique)
    law = anchored(start, params, tokens, unique, losses).law
    assert (law.e_nats, law.a, law.b) == pytest.approx((1.5, 300.0, 900.0), rel=0.02)
    assert (law.alpha, law.beta) == (0.3527, 0.3527)


@pytest.mark.parametrize(
    ("num_rows", "is_one_size", "words"),
    [(4, False, "constants: 5"), (20, True, "different N")],
)
def test_rows_that_fix_nothing_are_refused(num_rows: int, is_one_size: bool, words: str) -> None:
    table = made_up()
    params = np.full(num_rows, 1e8) if is_one_size else table.params_n[:num_rows]
    with pytest.raises(UsageError) as caught:
        fit_law(params, table.tokens_d[:num_rows], table.loss_nats[:num_rows], form=Form.ADDITIVE)
    assert words in str(caught.value)
    assert caught.value.allowed and caught.value.remedy
