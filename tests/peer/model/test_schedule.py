"""The learning rate over the run."""

import math

import pytest

from peer.model.schedule import learning_rate, lr_ratio, planned_cooldown_start_tokens
from tests.peer.model.tiny import SPEC


def ratio_at(position_tokens: float) -> float:
    return lr_ratio(
        position_tokens=position_tokens,
        lr_warmup_tokens=100,
        cooldown_start_tokens=800,
        budget_tokens=1000,
    )


def test_phases() -> None:
    assert ratio_at(0) == 0.0
    assert ratio_at(50) == 0.5
    assert ratio_at(100) == ratio_at(800) == 1.0
    assert ratio_at(850) == pytest.approx(1 - math.sqrt(0.25))
    assert ratio_at(1000) == ratio_at(2000) == 0.0


def test_no_warmup_and_no_cooldown() -> None:
    kwargs = {"lr_warmup_tokens": 0, "cooldown_start_tokens": 1000, "budget_tokens": 1000}
    assert lr_ratio(position_tokens=0, **kwargs) == 1.0
    assert lr_ratio(position_tokens=1000, **kwargs) == 1.0


def test_first_and_last_update_move() -> None:
    batch = SPEC.strategy.global_batch_tokens
    start = planned_cooldown_start_tokens(SPEC, budget_tokens=SPEC.budget_tokens)
    assert start == SPEC.budget_tokens * 4 // 5
    for tokens in (0, SPEC.budget_tokens - batch):
        lr = learning_rate(
            SPEC,
            schedule_tokens=tokens,
            cooldown_start_tokens=start,
            budget_tokens=SPEC.budget_tokens,
        )
        assert 0.0 < lr < SPEC.optimizer.peak_lr
