"""Laws against brute force, and against the numbers that the literature prints."""

import numpy as np
import pytest

from coordinator.scaling.constants import (
    ALLOCATIONS,
    COMPUTE_WORTH,
    GROUPS,
    LOSS_LAWS,
    NINE_ROWS,
    REPETITIONS,
    REPLICAS,
)
from coordinator.scaling.laws import Form, LossLaw, RepetitionLaw, efficiency_of_ratio

LAWS = [
    LOSS_LAWS["besiroglu"].law,
    LOSS_LAWS["muennighoff"].law,
    LOSS_LAWS["kaplan-joint"].law,
    LossLaw(e_nats=1.2, a=3e6, b=2e8, alpha=0.9, beta=0.9, kappa=0.4),
    LossLaw(e_nats=0.0, a=5.0, b=90.0, alpha=0.2, beta=0.5, kappa=1.7),
]


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("compute_flop", [1e15, 1e21, 5.76e23])
def test_optimum_is_the_minimum(law: LossLaw, compute_flop: float) -> None:
    best = law.optimum(compute_flop, flop_per_param_token=6.5)
    params = best.params_n * np.exp(np.linspace(-3, 3, 6001))
    losses = law.loss_nats(params, compute_flop / 6.5 / params)
    assert params[int(np.argmin(losses))] == pytest.approx(best.params_n, rel=2e-3)
    assert best.loss_nats == pytest.approx(float(losses.min()), rel=1e-9)
    assert 6.5 * best.params_n * best.tokens_d == pytest.approx(compute_flop)


@pytest.mark.parametrize("law", LAWS)
def test_questions_about_loss_answer_each_other(law: LossLaw) -> None:
    best = law.optimum(1e20)
    assert law.compute_for_loss(best.loss_nats) == pytest.approx(1e20, rel=1e-6)
    assert law.params_for_tokens(best.tokens_d) == pytest.approx(best.params_n, rel=1e-6)
    assert law.tokens_for_loss(best.params_n, best.loss_nats) == pytest.approx(best.tokens_d)
    assert law.params_for_loss(best.tokens_d, best.loss_nats) == pytest.approx(best.params_n)
    assert law.tokens_for_loss(1.0, best.loss_nats) == np.inf
    if law.e_nats:
        assert law.compute_for_loss(law.e_nats) == np.inf


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("ratio", [0.25, 0.5, 2.0, 4.0])
def test_efficiency_is_what_the_optimum_would_need(law: LossLaw, ratio: float) -> None:
    params_n = ratio * law.optimum(1e20).params_n
    reached = law.loss_nats(params_n, 1e20 / 6 / params_n)
    computes = np.exp(np.linspace(np.log(1e18), np.log(1e20), 4001))
    losses = np.array([law.optimum(compute).loss_nats for compute in computes])
    needed = float(np.interp(-reached, -losses, computes))
    assert law.efficiency(params_n, 1e20) == pytest.approx(needed / 1e20, rel=2e-3)
    if law.form.is_tied:
        predicted = efficiency_of_ratio(ratio, law.alpha)
        assert law.efficiency(params_n, 1e20) == pytest.approx(predicted, rel=1e-9)


def test_efficiency_has_the_figures_of_the_reference() -> None:
    assert efficiency_of_ratio(2.0, 0.36) == pytest.approx(0.84, abs=0.005)
    assert efficiency_of_ratio(4.0, 0.36) == pytest.approx(0.52, abs=0.015)


def test_forms_name_themselves() -> None:
    assert [law.form for law in LAWS] == [
        Form.ADDITIVE, Form.TIED, Form.GENERAL, Form.GENERAL_TIED, Form.GENERAL
    ]  # fmt: skip
    assert [form.num_constants for form in Form] == [5, 4, 6, 5]


def test_kaplan_joint_is_kaplans_formula() -> None:
    params_n, tokens_d = 1e9, 2e10
    written = ((8.8e13 / params_n) ** (0.076 / 0.095) + 5.4e13 / tokens_d) ** 0.095
    assert LOSS_LAWS["kaplan-joint"].law.loss_nats(params_n, tokens_d) == pytest.approx(written)


def test_nine_rows() -> None:
    power, ratio = ALLOCATIONS["hoffmann-a1"].law, ALLOCATIONS["chinchilla-ratio"].law
    by_power = [abs(power.optimum(c).params_n / n - 1) for n, c, _ in NINE_ROWS]
    by_ratio = [abs(ratio.optimum(c).params_n / n - 1) for n, c, _ in NINE_ROWS]
    assert np.mean(by_power) <= 0.005
    assert max(by_ratio) <= 0.042
    assert ratio.optimum(1.92e19).params_n == pytest.approx(np.sqrt(1.92e19 / 120))
    n_67, c_67, d_67 = NINE_ROWS[3]
    assert 20 * n_67 / d_67 - 1 == pytest.approx(-0.107, abs=0.001)
    assert c_67 / (6 * n_67 * d_67) == pytest.approx(0.955, abs=0.001)
    for name, mean_miss in (("hoffmann-a3-unrounded", 0.389), ("hoffmann-a3", 0.509)):
        law = LOSS_LAWS[name].law
        misses = [law.optimum(c).params_n / n - 1 for n, c, _ in NINE_ROWS]
        assert np.mean(np.abs(misses)) == pytest.approx(mean_miss, abs=0.002)


def test_growth_of_kaplan_and_chinchilla() -> None:
    for name, params_growth, tokens_growth in (
        ("kaplan", 5.4, 1.9), ("hoffmann-a1", 3.15, 3.18), ("chinchilla-ratio", 3.16, 3.16)
    ):  # fmt: skip
        law = ALLOCATIONS[name].law
        small, large = law.optimum(1e21), law.optimum(1e22)
        assert large.params_n / small.params_n == pytest.approx(params_growth, abs=0.05)
        assert large.tokens_d / small.tokens_d == pytest.approx(tokens_growth, abs=0.05)


def test_llama_tokens() -> None:
    best = ALLOCATIONS["llama3"].law.optimum(3.8e25)
    assert best.tokens_d == pytest.approx(16.55e12, rel=0.02)
    assert best.params_n == pytest.approx(402e9, rel=0.06)


def test_repetition_has_the_figures_of_the_reference() -> None:
    repetition = REPETITIONS["muennighoff"].law
    law = repetition.law
    assert law.params_for_tokens(1e9) == pytest.approx(0.051 * 1e9, rel=0.01)
    assert repetition.effective_tokens(3.0, 5.0) == 3.0
    assert repetition.effective_tokens(1e6, 1.0) == pytest.approx(16.4, abs=0.02)
    for passes, worth in ((1, 1.0), (2, 0.98), (4, 0.93), (8, 0.83), (16, 0.66), (40, 0.38)):
        assert repetition.mean_token_worth(passes) == pytest.approx(worth, abs=0.02)
    assert repetition.loss_nats(1e8, 2e9, 1e12) == pytest.approx(law.loss_nats(1e8, 2e9))


def test_repetition_moves_the_optimum() -> None:
    law = LOSS_LAWS["besiroglu"].law
    repetition = RepetitionLaw(law=law)
    free, bound = repetition.optimum(1e20, 1e13), repetition.optimum(1e20, 1e9)
    assert free.params_n == pytest.approx(law.optimum(1e20).params_n, rel=1e-4)
    assert bound.loss_nats > free.loss_nats
    params = bound.params_n * np.exp(np.linspace(-2, 2, 801))
    losses = repetition.loss_nats(params, 1e20 / 6 / params, 1e9)
    assert bound.loss_nats <= float(losses.min()) * (1 + 1e-9)


def test_replicas_have_the_figures_of_the_reference() -> None:
    penalty = REPLICAS["charles-by-size"].law
    for params_n, percent in ((1e8, 3.1), (1e9, 1.8), (1e10, 1.0)):
        assert 100 * (penalty.loss_factor(params_n, 8) - 1) == pytest.approx(percent, abs=0.1)
    worth = COMPUTE_WORTH["replicas"].law
    for num_replicas, ratio in ((1, 1.0), (2, 0.89), (4, 0.79), (8, 0.70), (64, 0.50)):
        assert worth.value(num_replicas=num_replicas) == pytest.approx(ratio, abs=0.01)


def test_every_constant_has_source_and_confidence() -> None:
    for group, table in GROUPS.items():
        assert table, group
        for name, published in table.items():
            assert published.source and published.confidence, (group, name)
