"""Closed forms of sizing against brute force, to the digits that the literature's laws give."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.scaling.constants import LOSS_LAWS, NUMBERS
from coordinator.scaling.laws import LossLaw, RepetitionLaw, efficiency_of_ratio
from coordinator.scaling.sizing import (
    Demand,
    anchored,
    best_size,
    clairvoyant_regret_nats,
    memorised_ratio,
    near_optimal_interval,
    restart_pays,
    serving_optimum,
    tokens_to_serve,
    uncertainty_factor,
)

BESIROGLU = LOSS_LAWS["besiroglu"].law
TIED = LossLaw(e_nats=1.8, a=500.0, b=900.0, alpha=0.35, beta=0.35)
GENERAL = LossLaw(e_nats=0.5, a=20.0, b=60.0, alpha=0.3, beta=0.4, kappa=0.5)
C = 1e20


def brute_compute_for_loss(law: LossLaw, loss_nats: float) -> float:
    """Least 6 N D over a fine grid of N."""
    params = np.exp(np.linspace(math.log(1e6), math.log(1e12), 400_001))
    with np.errstate(over="ignore", divide="ignore"):
        return float(np.min(6 * params * law.tokens_for_loss(params, loss_nats)))


@pytest.mark.parametrize("law", [BESIROGLU, TIED, GENERAL])
@pytest.mark.parametrize("ratio", [0.25, 0.5, 2.0, 4.0])
def test_efficiency_of_a_missized_model_is_what_brute_force_finds(
    law: LossLaw, ratio: float
) -> None:
    params_n = ratio * law.optimum(C).params_n
    loss = float(law.loss_nats(params_n, C / (6 * params_n)))
    brute = brute_compute_for_loss(law, loss) / C
    assert float(law.efficiency(params_n, C)) == pytest.approx(brute, rel=1e-6)
    if law is TIED:
        assert float(efficiency_of_ratio(ratio, 0.35)) == pytest.approx(brute, rel=1e-6)


def test_known_digits_of_the_efficiency() -> None:
    exponent = (BESIROGLU.alpha + BESIROGLU.beta) / 2
    assert round(float(efficiency_of_ratio(2.0, exponent)), 2) == 0.84
    assert round(float(efficiency_of_ratio(4.0, exponent)), 2) == 0.52
    best = BESIROGLU.optimum(C).params_n
    for efficiency, low, high in ((0.95, 0.68, 1.46), (0.9, 0.58, 1.72)):
        found = near_optimal_interval(BESIROGLU, C, efficiency_ratio=efficiency)
        assert found[0] / best == pytest.approx(low, abs=0.006)
        assert found[1] / best == pytest.approx(high, abs=0.006)
    # committed for C, four times or a quarter of it came: 84 % of it is used
    for came in (4 * C, C / 4):
        assert float(BESIROGLU.efficiency(best, came)) == pytest.approx(0.84, abs=0.006)


@pytest.mark.parametrize(
    ("log_std", "factor", "regret"),
    [(0.5, 0.978, 0.003), (1.0, 0.911, 0.013), (1.5, 0.81, 0.029), (2.0, 0.69, 0.054)],
)
def test_uncertain_compute(log_std: float, factor: float, regret: float) -> None:
    ours = uncertainty_factor(BESIROGLU, log_std)
    assert ours == pytest.approx(factor, abs=0.003)
    optimum = BESIROGLU.optimum(C).params_n
    nodes, weights = np.polynomial.hermite_e.hermegauss(61)
    flop = C * np.exp(log_std * nodes)
    ratios = np.exp(np.linspace(-1.0, 0.5, 3001))
    losses = [
        float(np.sum(weights * BESIROGLU.loss_nats(r * optimum, flop / (6 * r * optimum))))
        for r in ratios
    ]
    assert ours == pytest.approx(float(ratios[int(np.argmin(losses))]), rel=6e-4)
    found = clairvoyant_regret_nats(BESIROGLU, ours * optimum, C, log_std)
    assert found == pytest.approx(regret, abs=6e-4)
    sized = best_size(BESIROGLU, Demand(compute_flop=C, compute_log_std=log_std))
    assert sized.params_n / optimum == pytest.approx(ours, rel=1e-9)


@pytest.mark.parametrize("log_std", [0.5, 1.0, 2.0])
def test_uncertain_compute_of_a_general_law(log_std: float) -> None:
    optimum = GENERAL.optimum(C).params_n
    nodes, weights = np.polynomial.hermite_e.hermegauss(61)
    flop = C * np.exp(log_std * nodes)
    params = optimum * np.exp(np.linspace(-1.5, 0.5, 4001))[:, None]
    losses = np.sum(weights * GENERAL.loss_nats(params, flop / (6 * params)), axis=1)
    best = float(params[int(np.argmin(losses)), 0])
    sized = best_size(GENERAL, Demand(compute_flop=C, compute_log_std=log_std))
    assert sized.params_n == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize(
    ("serve", "params", "tokens", "total"),
    [(1e10, 0.84, 1.21, -0.01), (1e11, 0.52, 2.4, -0.22), (1e12, 0.31, 7.8, -0.57)],
)
def test_serving(serve: float, params: float, tokens: float, total: float) -> None:
    plain = BESIROGLU.optimum(C)
    found, flop = serving_optimum(BESIROGLU, plain.loss_nats, serve)
    assert found.params_n / plain.params_n == pytest.approx(params, abs=0.006)
    assert found.tokens_d / plain.tokens_d == pytest.approx(tokens, rel=0.02)
    before = C + 2 * plain.params_n * serve
    assert flop / before - 1 == pytest.approx(total, abs=0.006)
    grid = np.exp(np.linspace(math.log(plain.params_n) - 2.0, math.log(plain.params_n), 200_001))
    with np.errstate(over="ignore", divide="ignore"):
        text = BESIROGLU.tokens_for_loss(grid, plain.loss_nats)
        totals = 6 * grid * text + 2 * grid * serve
    assert flop == pytest.approx(float(np.min(totals)), rel=1e-8)
    assert found.params_n == pytest.approx(float(grid[int(np.argmin(totals))]), rel=1e-4)
    assert tokens_to_serve(BESIROGLU, found.params_n, serve) == pytest.approx(
        found.tokens_d, rel=1e-6
    )
    # at a given training compute the balance is the same, on 6 N D = C
    size = best_size(BESIROGLU, Demand(compute_flop=found.compute_flop, serve_tokens=serve))
    assert size.params_n == pytest.approx(found.params_n, rel=1e-6)


@pytest.mark.parametrize("law", [BESIROGLU, TIED, GENERAL])
@pytest.mark.parametrize("unique", [2e9, 4e9, 1e10, 1e12])
def test_repetition_balances_where_the_law_is_least(law: LossLaw, unique: float) -> None:
    ours = best_size(law, Demand(compute_flop=C, unique_tokens=unique))
    searched = RepetitionLaw(law=law).optimum(C, unique)
    if searched.tokens_d <= 16 * unique:
        assert ours.params_n == pytest.approx(searched.params_n, rel=1e-5)
        assert ours.spent_flop == pytest.approx(C)
    else:
        assert ours.tokens_d == 16 * unique
        assert ours.spent_flop <= C * (1 + 1e-9)


def test_scarce_text_leaves_compute_unused() -> None:
    size = best_size(BESIROGLU, Demand(compute_flop=1e22, unique_tokens=1e7))
    assert size.tokens_d == 1.6e8
    assert size.spent_flop < 0.01 * 1e22


@settings(max_examples=60, deadline=None)
@given(
    flop=st.floats(1e12, 1e26),
    log_std=st.floats(0.0, 2.0),
    serve=st.floats(0.0, 1e14),
    unique=st.floats(1e5, 1e14),
)
def test_any_demand_has_a_size(flop: float, log_std: float, serve: float, unique: float) -> None:
    demand = Demand(
        compute_flop=flop, compute_log_std=log_std, serve_tokens=serve, unique_tokens=unique
    )
    size = best_size(BESIROGLU, demand)
    assert size.params_n > 0 and size.tokens_d > 0
    assert size.spent_flop <= flop * (1 + 1e-9)
    assert size.tokens_d <= 16 * unique * (1 + 1e-9)


def test_anchoring_moves_the_optimum_and_nothing_else() -> None:
    law = anchored(BESIROGLU, TIED.optimum(C))
    there, before = law.optimum(C), BESIROGLU.optimum(C)
    assert there.params_n == pytest.approx(TIED.optimum(C).params_n)
    assert there.loss_nats == pytest.approx(before.loss_nats)
    ratio = there.params_n / before.params_n
    assert float(law.efficiency(2 * there.params_n, C)) == pytest.approx(
        float(BESIROGLU.efficiency(2 * there.params_n / ratio, C))
    )


def test_a_restart_pays_early_only() -> None:
    """Half-way known digits: r = 1/4 below 48 % spent, r = 1/2 below 16 %."""
    for ratio, limit in ((4.0, 0.48), (2.0, 0.16)):
        eta = float(efficiency_of_ratio(1 / ratio, 0.3565))
        assert restart_pays(eta, spent_flop=limit - 0.01, remaining_flop=1 - limit + 0.01)
        assert not restart_pays(eta, spent_flop=limit + 0.01, remaining_flop=1 - limit - 0.01)


def test_memorisation() -> None:
    bits = NUMBERS["memorised-bits-per-parameter"].law
    loss = 3.6 * math.log(2) / 0.9  # at which 0.9 tokens per parameter fill the model
    assert memorised_ratio(1e9, 0.9e9, loss, bits_per_param=bits) == pytest.approx(1.0)
    assert memorised_ratio(1e9, 20e9, 2.5, bits_per_param=bits) == pytest.approx(0.05, abs=0.002)
