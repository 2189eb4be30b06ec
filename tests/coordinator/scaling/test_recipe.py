"""Batch, learning rate, weight decay, steps."""

import pytest

from coordinator.scaling.recipe import (
    HIGHEST_LR,
    LOWEST_LR,
    WEIGHT_DECAY_RANGE,
    anchor_timescale_ratio,
    critical_batch_of_loss,
    critical_batch_tokens,
    learning_rates,
    mu_transfer,
    outer_settings,
    plan_recipe,
    timescale_ratio,
    token_cost_ratio,
)


def recipe(**changes: object):  # type: ignore[no-untyped-def]
    asked = {
        "params_n": 1e9,
        "tokens_d": 20e9,
        "compute_flop": 1.2e20,
        "seq_len": 2048,
        "num_peers": 8,
        "num_replicas": 0,
    }
    return plan_recipe(**(asked | changes))  # type: ignore[arg-type]


def test_rules_give_the_published_values() -> None:
    found = learning_rates(1e9, 20e9, 1.2e20)
    assert found["step-law"] == pytest.approx(1.79 * 1e9**-0.713 * 20e9**0.307)
    assert found["deepseek"] == pytest.approx(0.3118 * 1.2e20**-0.125)
    assert found["porian"] == pytest.approx(3.7 * 1e9**-0.36)
    assert found["bjorck"] == pytest.approx(1.55e-3 * 20**-0.32, rel=1e-6)


def test_critical_batch() -> None:
    assert critical_batch_tokens(20e9) == pytest.approx(93.2 * 1000**0.47 * 512)
    assert token_cost_ratio(1.0, 1.0) == 2, "half the tokens wasted"
    assert 1 - 1 / token_cost_ratio(1.0, 4.0) == pytest.approx(0.2), "a fifth at a quarter"
    assert critical_batch_of_loss(3.0) == pytest.approx(2e8 / 3.0 ** (1 / 0.21))


def test_batch_lies_between_a_window_per_peer_and_the_critical_batch() -> None:
    plain = recipe()
    assert plain.global_batch_tokens % 2048 == 0
    assert plain.global_batch_tokens == pytest.approx(0.58 * 20e9**0.571, rel=0.01)
    assert plain.steps == -(-20e9 // plain.global_batch_tokens)
    crowd = recipe(num_peers=1000)
    assert crowd.global_batch_tokens == 1000 * 2048
    assert "raised to one window" in crowd.batch_reason
    assert crowd.peak_lr > plain.peak_lr, "the square root of the batch"
    huge = recipe(params_n=1e12, tokens_d=20e12)
    assert huge.global_batch_tokens <= huge.critical_batch_tokens * 1.01


def test_weight_decay_keeps_the_timescale() -> None:
    anchor = anchor_timescale_ratio()
    assert anchor == pytest.approx(0.22, abs=0.005)
    for found, tokens in ((recipe(), 20e9), (recipe(tokens_d=80e9), 80e9)):
        kept = timescale_ratio(found.global_batch_tokens, found.peak_lr, found.weight_decay, tokens)
        assert kept == pytest.approx(anchor)
    assert recipe().weight_decay == pytest.approx(0.1, rel=0.02)


def test_diloco_uses_its_own_laws() -> None:
    found = recipe(num_replicas=8, params_n=1e9)
    assert found.peak_lr == pytest.approx(22256 * 1e9**-0.8827 * 8**0.2929, rel=0.01)


def test_outer_steps_have_momentum_only_if_there_are_many_of_them() -> None:
    assert [outer_settings(m, 100)[:2] for m in (1, 3, 7, 64)] == [
        (0.4, 0.9),
        (0.6, 0.9),
        (0.6, 0.9),
        (0.8, 0.9),
    ]
    rate, momentum, reason = outer_settings(4, 99)
    assert (rate, momentum) == (1.0, 0.0)
    assert "99 outer steps" in reason and "plain averages" in reason


def test_small_models_are_held() -> None:
    tiny = recipe(params_n=1e5, tokens_d=2e6, compute_flop=1.2e12, seq_len=128, num_peers=2)
    assert tiny.peak_lr == HIGHEST_LR
    assert "outside its grid" in tiny.lr_reason


def test_rules_are_held_where_they_mean_something() -> None:
    short = recipe(params_n=1e7, tokens_d=5e5, compute_flop=3e13, seq_len=1024, num_peers=1)
    assert short.weight_decay == WEIGHT_DECAY_RANGE[1]
    assert "held at 0.5" in short.weight_decay_reason
    starved = recipe(params_n=1e10, tokens_d=1e5, compute_flop=6e15, seq_len=1024, num_peers=1)
    assert starved.peak_lr == LOWEST_LR and "held at 1e-05" in starved.lr_reason
    assert "held" not in recipe().weight_decay_reason + recipe().lr_reason


def test_mu_transfer() -> None:
    assert mu_transfer(5e-3, trial_width=128, width=1024) == pytest.approx(6.25e-4)
    assert recipe(tuned_lr=1e-3, tuned_reason="tuned").lr_reason.startswith("tuned")
