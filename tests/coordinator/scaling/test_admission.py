"""Leaving weak peers out exactly when that pays."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.scaling.admission import drop_pays, plan_admission
from coordinator.scaling.constants import LOSS_LAWS
from coordinator.scaling.laws import LossLaw
from coordinator.scaling.pool import PoolPeer
from protos.contract.errors import UsageError

LAW = LOSS_LAWS["besiroglu"].law


def law_at(compute_flop: float) -> LossLaw:
    return LAW


def peer(name: str, flop: float, memory: float) -> PoolPeer:
    return PoolPeer(
        name=name,
        flop_per_second=flop,
        availability_ratio=1.0,
        memory_bytes=memory,
        upload_bytes_per_second=1e6,
        download_bytes_per_second=1e6,
    )


def cap_of(memory_bytes: float) -> float:
    return memory_bytes / 16


@settings(max_examples=80, deadline=None)
@given(
    weak_share=st.floats(0.001, 0.9), weak_memory=st.floats(1e8, 1e11), flop=st.floats(1e18, 1e22)
)
def test_the_rule_and_the_brute_force_choice_agree(
    weak_share: float, weak_memory: float, flop: float
) -> None:
    strong_memory = 2e11
    pool = [peer("weak", weak_share, weak_memory), peer("strong", 1 - weak_share, strong_memory)]
    found = plan_admission(pool, law_at=law_at, compute_flop=flop, cap_of=cap_of)

    def reached(compute: float, cap: float) -> float:
        params_n = min(cap, LAW.optimum(compute).params_n)
        return float(LAW.loss_nats(params_n, compute / (6 * params_n)))

    def efficiency(compute: float, cap: float) -> float:
        return float(LAW.efficiency(min(cap, LAW.optimum(compute).params_n), compute))

    rest = flop * (1 - weak_share)
    with_weak, without = reached(flop, weak_memory / 16), reached(rest, strong_memory / 16)
    is_dropped = bool(found.left_out)
    if abs(with_weak - without) > 1e-9:
        assert is_dropped == (without < with_weak)
        assert is_dropped == drop_pays(
            weak_share,
            efficiency_with=efficiency(flop, weak_memory / 16),
            efficiency_without=efficiency(rest, strong_memory / 16),
        )


def test_reasons_name_the_numbers() -> None:
    pool = [peer("old", 1.0, 2e9), peer("new", 99.0, 2e11)]
    found = plan_admission(pool, law_at=law_at, compute_flop=1e21, cap_of=cap_of)
    assert [one.name for one in found.left_out] == ["old"]
    assert "old left out: they bring 1.0% of the FLOP" in found.reason
    same = [peer("a", 1.0, 2e11), peer("b", 1.0, 2e11)]
    kept = plan_admission(same, law_at=law_at, compute_flop=1e21, cap_of=cap_of)
    assert not kept.left_out and "all 2 peers are admitted" in kept.reason


def test_no_memory_at_all_is_refused() -> None:
    with pytest.raises(UsageError, match="largest memory of the pool"):
        plan_admission(
            [peer("a", 1.0, 1e6)], law_at=law_at, compute_flop=1e20, cap_of=lambda _: 0.0
        )
    some = [peer("a", 5.0, 1e6), peer("b", 1.0, 1e10)]
    found = plan_admission(
        some, law_at=law_at, compute_flop=1e18, cap_of=lambda m: 0.0 if m < 1e9 else m / 16
    )
    assert "too little memory for any model" in found.reason
