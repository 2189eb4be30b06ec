"""Round budgets: whole windows, right sums, proportional to speed; run budgets: rounded and refused
with numbers.
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.domain.budget import are_budgets_off, plan_round_tokens, plan_run_budget

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
