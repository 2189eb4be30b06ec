"""Designs of studies: sizes, marks, learning rates, and who gets which trial."""

import math
from dataclasses import replace

import pytest

from coordinator.study.design import (
    OpenTrial,
    Purpose,
    StudyDesign,
    StudyStage,
    best_rate,
    choose_trial,
    first_stage,
    mark_tokens,
    size_plans,
    sizes_of,
    uneven_reason,
)
from protos.contract.errors import UsageError
from protos.contract.model_shape import ModelShape

DESIGN = StudyDesign(dataset_id="ab" * 32, vocab_size=257)


def test_the_default_has_eight_sizes_of_equal_compute() -> None:
    stage, plans = first_stage(DESIGN)
    assert stage is StudyStage.SIZES
    sizes = [plan for plan in plans if plan.purpose is Purpose.SIZE]
    counts = [plan.shape.num_matmul_parameters for plan in sizes]
    assert len(counts) == 8 and counts == sorted(counts)
    for index, count in enumerate(counts):
        wanted = math.exp(math.log(8e3) + index / 7 * math.log(250 / 8))
        assert count == pytest.approx(wanted, rel=0.15)
    for plan in sizes:
        is_capped = plan.spec.budget_tokens > DESIGN.max_tokens * 0.7
        assert is_capped or plan.flop == pytest.approx(1e12, rel=0.02)
        assert plan.spec.schedule.cooldown_ratio == 0.0
        assert plan.mark_tokens[-1] == plan.spec.budget_tokens <= DESIGN.max_tokens
        assert all(mark % 1024 == 0 for mark in plan.mark_tokens)
    total = sum(plan.flop for plan in plans)
    assert 7e12 < total < 11e12


def test_sizes_share_their_computes() -> None:
    _, plans = first_stage(DESIGN)
    slices: dict[int, int] = {}
    for plan in plans[:8]:
        for mark in plan.mark_tokens:
            level = round(2 * math.log2(1e12 / (mark * plan.shape.flop_per_token())))
            slices[level] = slices.get(level, 0) + 1
    assert sum(count >= 6 for count in slices.values()) >= 4


def test_repeats_are_other_seeds_of_spread_sizes() -> None:
    plans = size_plans(DESIGN, 1e-2)
    repeats = [plan for plan in plans if plan.purpose is Purpose.REPEAT]
    assert [plan.original_number for plan in repeats] == [2, 6]
    for plan in repeats:
        original = plans[plan.original_number]
        assert plan.spec.model == original.spec.model
        assert plan.mark_tokens == original.mark_tokens
        assert plan.spec.seed != original.spec.seed
    assert {plan.spec.optimizer.peak_lr for plan in plans} == {1e-2}


def test_several_learning_rates_are_tried_at_two_widths_first() -> None:
    stage, plans = first_stage(replace(DESIGN, learning_rates=(2e-3, 5e-3, 1e-2)))
    assert stage is StudyStage.RATES and len(plans) == 6
    assert len({plan.shape.num_matmul_parameters for plan in plans}) == 2
    assert all(len(plan.mark_tokens) == 1 and plan.purpose is Purpose.RATE for plan in plans)
    assert plans[0].flop == pytest.approx(1.25e11, rel=0.03)


def test_the_best_rate_is_best_on_the_mean() -> None:
    losses = {(1e4, 1e-3): 2.2, (1e4, 3e-3): 2.0, (1e4, 1e-2): 2.1}
    losses |= {(1e5, 1e-3): 1.90, (1e5, 3e-3): 1.82, (1e5, 1e-2): 1.80}
    rate, why = best_rate(losses)
    assert rate == 3e-3 and "0.003 +0.56 %" in why and "edge" not in why
    assert "edge" in best_rate({(1e4, 1e-3): 2.0, (1e4, 1e-2): 1.9})[1]


def test_marks() -> None:
    marks = mark_tokens(1e6, flop=1e12, batch_tokens=1000, max_tokens=10**9, min_steps=60)
    assert marks[-1] == 10**6 and marks[-3] == 5 * 10**5 and len(marks) == 9
    assert mark_tokens(1e6, flop=1e12, batch_tokens=1000, max_tokens=300_000, min_steps=60)[-1] < (
        300_001
    )
    tiny = mark_tokens(1e6, flop=1e9, batch_tokens=1000, max_tokens=10**9, min_steps=60)
    assert tiny == (1000,)


def test_weak_peers_get_small_trials_and_repeats_go_elsewhere() -> None:
    trials = [OpenTrial(trial_id=f"t{i}", params_n=10.0 * (i + 1), flop=1.0) for i in range(5)]
    speeds = {"slow": 1e9, "middle": 2e9, "fast": 9e9}
    said = {peer: choose_trial(trials, peer, speeds) for peer in speeds}
    assert {peer: choice.trial_id for peer, (choice, _) in said.items() if choice} == {
        "slow": "t0", "middle": "t2", "fast": "t4",
    }  # fmt: skip
    assert "number 1 of 3" in said["slow"][1]
    new = choose_trial(trials, "new", speeds | {"new": 0.0})
    assert new[0] is not None and new[0].trial_id == "t2" and "cannot be compared" in new[1]
    repeat = [replace(trials[0], avoided_peer_id="slow")]
    assert choose_trial(repeat, "slow", speeds)[0] is None
    assert choose_trial(repeat, "fast", speeds)[0] is repeat[0]
    assert choose_trial(repeat, "slow", {"slow": 1e9})[0] is repeat[0]
    assert choose_trial([], "fast", speeds)[0] is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_sizes": 2}, "--sizes 2"),
        ({"min_params": 1e6}, "--min-params"),
        ({"flop": float("nan")}, "--flop nan"),
        ({"learning_rates": ()}, "--lr"),
        ({"learning_rates": (2.0,)}, "--lr"),
        ({"batch_tokens": 1000}, "--batch-tokens 1000"),
        ({"num_repeats": 9}, "--repeats 9"),
        ({"seq_len": 2}, "--seq-len 2"),
        ({"max_tokens": 10}, "--max-tokens 10"),
        ({"seq_len": 0}, "--seq-len 0"),
        ({"learning_rates": (1e-3, 1e-3)}, "--lr"),
        ({"heldout_tokens": 0}, "--heldout-tokens 0"),
    ],
)
def test_designs_that_cannot_be(changes: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        replace(DESIGN, **changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"flop": 1e6}, "would train .* steps"),
        ({"flop": 1e20}, "ends the smallest model"),
        ({"max_tokens": 2048}, "ends the smallest model"),
    ],
)
def test_computes_that_cannot_be(changes: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        first_stage(replace(DESIGN, **changes))


def test_sizes_that_end_early_are_said() -> None:
    _, plans = first_stage(DESIGN)
    assert "3 sizes end at --max-tokens 4,000,000" in uneven_reason(DESIGN, plans)
    longer = replace(DESIGN, max_tokens=10**9)
    assert uneven_reason(longer, first_stage(longer)[1]) == ""


def test_a_vocabulary_that_leaves_no_sizes() -> None:
    with pytest.raises(UsageError, match="different sizes"):
        sizes_of(replace(DESIGN, vocab_size=32_768))
    stored = StudyDesign.from_json(DESIGN.to_json())
    assert stored == DESIGN
    smallest = ModelShape.from_spec(sizes_of(DESIGN)[0])
    assert smallest.num_matmul_parameters < 9_500
