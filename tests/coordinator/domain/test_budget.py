"""Round budgets: whole windows, right sums, proportional to speed; run budgets: rounded and refused
with numbers.
"""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.domain.budget import (
    are_budgets_off,
    follow_pool,
    plan_round_tokens,
    plan_run_budget,
)

SPEEDS = st.dictionaries(
    st.text("abcdef", min_size=1, max_size=3),
    st.one_of(st.just(0.0), st.floats(1e-3, 1e9)),
    min_size=1,
    max_size=12,
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(speeds=SPEEDS, batch_windows=st.integers(1, 200), seq_len=st.sampled_from([1, 4, 256]))
def test_round_tokens_are_whole_windows_with_the_right_sum(
    speeds: dict[str, float], batch_windows: int, seq_len: int
) -> None:
    tokens = plan_round_tokens(speeds, global_batch_tokens=batch_windows * seq_len, seq_len=seq_len)
    assert set(tokens) == set(speeds)
    assert all(count >= seq_len and count % seq_len == 0 for count in tokens.values())
    assert sum(tokens.values()) == max(batch_windows, len(speeds)) * seq_len
    known = sorted((speed, peer) for peer, speed in speeds.items() if speed > 0)
    for (slow, slow_peer), (fast, fast_peer) in zip(known, known[1:], strict=False):
        assert tokens[fast_peer] + seq_len >= tokens[slow_peer], (slow, fast)


@pytest.mark.parametrize(
    ("speeds", "windows", "expected"),
    [
        ({}, 8, {}),
        ({"a": 0.0, "b": 0.0}, 8, {"a": 4, "b": 4}),
        ({"a": 300.0, "b": 100.0}, 8, {"a": 6, "b": 2}),
        ({"a": 300.0, "b": 100.0, "c": 0.0}, 12, {"a": 6, "b": 2, "c": 4}),
        ({"a": 1e9, "b": 1.0}, 8, {"a": 7, "b": 1}),
        ({"a": 1.0, "b": 1.0, "c": 1.0}, 2, {"a": 1, "b": 1, "c": 1}),
        ({"a": 1.0, "b": 1.0, "c": 1.0}, 4, {"a": 2, "b": 1, "c": 1}),
    ],
)
def test_round_tokens_by_example(
    speeds: dict[str, float], windows: int, expected: dict[str, int]
) -> None:
    assert plan_round_tokens(speeds, global_batch_tokens=windows, seq_len=1) == expected


def test_budgets_are_off_only_beyond_a_fifth() -> None:
    assert are_budgets_off({"a": 100, "b": 100}, {"a": 119, "b": 81}) == ""
    assert "121" in are_budgets_off({"a": 100, "b": 100}, {"a": 121, "b": 100})


def test_run_budget_is_rounded_down_and_refused_above_the_pass_cap() -> None:
    limits = {"seq_len": 10, "pass_tokens": 100, "max_tokens": 400, "max_data_passes": 4}
    plan = plan_run_budget(257, **limits)
    assert plan.budget_tokens == 250
    assert "25 windows" in plan.reason and "257" in plan.reason and "2.50 passes" in plan.reason
    assert plan_run_budget(409, **limits).budget_tokens == 400
    refused = plan_run_budget(410, **limits)
    assert refused.budget_tokens == 0
    assert "410 tokens are 4.1 passes over 100" in refused.reason and "400" in refused.reason
    assert plan_run_budget(9, **limits).budget_tokens == 0


POOL: dict[str, Any] = {
    "budget_tokens": 1000,
    "credited_tokens": 300,
    "granted_tokens": 340,
    "schedule_tokens": 300,
    "cooldown_ratio": 0.2,
    "tokens_per_second": 7.0,
    "left_seconds": 100.0,
    "seq_len": 10,
    "max_tokens": 4000,
}


def test_a_budget_follows_its_pool_while_the_rate_is_constant() -> None:
    same = follow_pool(**POOL)
    assert (same.budget_tokens, same.is_changed) == (1000, False)
    grown = follow_pool(**POOL | {"tokens_per_second": 14.0})
    assert (grown.budget_tokens, grown.cooldown_start_tokens) == (1700, 1360)
    assert "from 1,000 to 1,700" in grown.reason and "14 tokens/s for 100 s" in grown.reason
    shrunk = follow_pool(**POOL | {"tokens_per_second": 2.5})
    assert (shrunk.budget_tokens, shrunk.cooldown_start_tokens) == (550, 440)
    assert follow_pool(**POOL | {"tokens_per_second": 1e6}).budget_tokens == 4000
    unknown = follow_pool(**POOL | {"tokens_per_second": 0.0})
    assert not unknown.is_changed and "not known" in unknown.reason


def test_the_cooldown_begins_when_a_quarter_of_the_spent_remains() -> None:
    late = POOL | {"credited_tokens": 750, "granted_tokens": 790, "schedule_tokens": 750}
    cooling = follow_pool(**late | {"left_seconds": 20.0})
    assert cooling.is_cooling and cooling.is_changed
    assert (cooling.budget_tokens, cooling.cooldown_start_tokens) == (890, 750)
    assert "the cooldown begins" in cooling.reason
    over = follow_pool(**late | {"left_seconds": -5.0})
    assert (over.budget_tokens, over.cooldown_start_tokens) == (790, 750)
    assert not follow_pool(**late | {"left_seconds": 60.0}).is_cooling


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    credited=st.integers(0, 400),
    held=st.integers(0, 40),
    speed=st.floats(0, 1e4),
    left=st.floats(-10, 1e4),
)
def test_a_budget_never_falls_below_what_was_granted(
    credited: int, held: int, speed: float, left: float
) -> None:
    granted = (credited + held) * 10
    change = follow_pool(
        **POOL
        | {
            "budget_tokens": 4000 if granted <= 4000 else granted + 1000,
            "credited_tokens": credited * 10,
            "granted_tokens": granted,
            "schedule_tokens": credited * 10,
            "max_tokens": 8000,
            "tokens_per_second": speed,
            "left_seconds": left,
        }
    )
    assert change.budget_tokens % 10 == 0
    assert change.budget_tokens >= granted
    assert change.cooldown_start_tokens <= change.budget_tokens
    assert change.reason
