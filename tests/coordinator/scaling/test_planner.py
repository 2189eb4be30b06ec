"""Whole plans: contradictions do not survive, and every choice carries its reason."""

import math
from typing import Any

import pytest

from coordinator.scaling.gpus import compute_of_gpu_hours
from coordinator.scaling.links import Codec
from coordinator.scaling.plan_law import published_law
from coordinator.scaling.plan_spec import run_spec, spec_toml
from coordinator.scaling.plan_types import Plan, PlanRequest
from coordinator.scaling.planner import plan
from coordinator.scaling.pool import DAY_SECONDS, Pool, PoolPeer
from protos.contract.errors import MachineError, UsageError
from protos.contract.run_spec import RunSpec

FP32 = Codec(name="fp32", bytes_per_value=4.0)


def make(**changes: Any) -> Plan:
    asked: dict[str, Any] = {
        "law": published_law("chinchilla"),
        "vocab_size": 32_768,
        "seq_len": 1024,
        "codecs": (FP32,),
        "strategies": ("sync", "diloco"),
    }
    return plan(PlanRequest(**(asked | changes)))


def pool(number: int = 4, *, mbit: float = 50.0, gib: float = 24.0, flop: float = 2e13) -> Pool:
    return Pool(
        peers=tuple(
            PoolPeer(
                name=f"p{index}",
                flop_per_second=flop,
                availability_ratio=0.8,
                memory_bytes=gib * 2**30,
                upload_bytes_per_second=mbit * 1e6 / 8,
                download_bytes_per_second=mbit * 1e6 / 8,
            )
            for index in range(number)
        )
    )


def reason_of(found: Plan, name: str) -> str:
    return next(choice.reason for choice in found.choices if choice.name == name)


def test_compute_alone() -> None:
    found = make(compute_flop=1e20)
    assert found.law_optimum.params_n == pytest.approx(0.09916 * 1e20**0.4981)
    low, high = found.near_optimal_params_n
    assert low <= found.params_n <= found.law_optimum.params_n <= high, "the lower half"
    assert found.spent_flop == pytest.approx(1e20, rel=1e-5)
    assert found.tokens_d % 1024 == 0
    assert found.efficiency_ratio > 0.99
    assert found.strategy is None and found.calendar_seconds is None
    assert found.floor_nats < found.loss_low_nats < found.loss_nats < found.loss_high_nats
    assert all(choice.reason and choice.value for choice in found.choices)
    assert found.recipe.steps == -(-found.tokens_d // found.recipe.global_batch_tokens)


def test_a_pool_decides_compute_time_and_strategy() -> None:
    found = make(pool=pool(), seconds=30 * DAY_SECONDS)
    assert found.strategy is not None and found.strategy.name == "diloco"
    assert found.strategy.utilisation_ratio >= 0.95
    speed = 4 * 2e13 * 0.8 * found.strategy.utilisation_ratio
    assert found.compute_flop == pytest.approx(speed * 30 * DAY_SECONDS, rel=2e-3)
    assert found.calendar_seconds == pytest.approx(30 * DAY_SECONDS, rel=5e-3)
    assert found.calendar_low_seconds is not None and found.calendar_high_seconds is not None
    assert found.calendar_low_seconds < found.calendar_seconds < found.calendar_high_seconds
    assert found.effective_flop == pytest.approx(found.compute_flop * 4**-0.17, rel=0.05)
    chosen = found.strategy
    rounds = found.recipe.steps / (chosen.inner_steps_per_outer / chosen.num_fragments)
    per_round = 4 * found.num_parameters / chosen.num_fragments * 2 * 3 / 4
    assert found.wire_bytes_per_peer == pytest.approx(rounds * per_round, rel=1e-3)
    assert "Against it" in reason_of(found, "strategy")
    assert found.compute_log_std >= 0.3


def test_fast_links_give_sync() -> None:
    found = make(pool=pool(mbit=100_000, flop=1e11), seconds=DAY_SECONDS)
    assert found.strategy is not None and found.strategy.name == "sync"
    assert found.strategy.utilisation_ratio >= 0.95


def test_only_allowed_strategies_are_chosen_and_the_other_is_shown() -> None:
    found = make(pool=pool(), seconds=30 * DAY_SECONDS, strategies=("sync",))
    assert found.strategy_name == "sync"
    assert any("below the aim" in warning for warning in found.warnings)
    assert "diloco" in reason_of(found, "strategy")
    assert "cannot run it" in reason_of(found, "strategy")
    with pytest.raises(UsageError, match="without peers whose links"):
        make(compute_flop=1e18, strategies=("diloco",))


def test_a_pool_with_a_given_compute_gives_the_time() -> None:
    found = make(pool=pool(), compute_flop=1e20)
    assert found.strategy is not None and found.calendar_seconds is not None
    speed = 4 * 2e13 * 0.8 * found.strategy.utilisation_ratio
    assert found.calendar_seconds == pytest.approx(1e20 / speed, rel=1e-3)


def test_the_weakest_memory_caps_n_and_its_price_is_told() -> None:
    found = make(pool=pool(gib=2.0), seconds=60 * DAY_SECONDS)
    cap = next(cap for cap in found.caps if cap.name == "memory")
    assert cap.is_binding and cap.efficiency_ratio < 0.9 and cap.regret_nats > 0
    assert found.params_n <= cap.params_n
    assert found.admission is not None and found.params_n <= found.admission.cap_params


def test_text_serving_and_uncertainty_each_have_a_price() -> None:
    found = make(compute_flop=1e20, unique_tokens=4e9, serve_tokens=1e11, compute_log_std=1.0)
    caps = {cap.name: cap for cap in found.caps}
    assert set(caps) == {"uncertain compute", "serving", "unique tokens", "shape"}
    alone = make(compute_flop=1e20)
    assert caps["serving"].params_n < alone.law_optimum.params_n
    assert caps["serving"].regret_nats > 0
    assert caps["uncertain compute"].params_n / alone.law_optimum.params_n == pytest.approx(
        0.911, abs=0.002
    )
    assert found.data_passes == pytest.approx(found.tokens_d / 4e9)
    assert found.memorised_ratio > 0
    assert found.loss_nats > alone.loss_nats


def test_scarce_text_warns() -> None:
    found = make(compute_flop=1e20, unique_tokens=1e7)
    assert found.spent_flop < 0.1e20
    assert found.params_n < 2e7, "no further than a parameter is worth a tenth"
    tiny = make(compute_flop=1e20, unique_tokens=1e5)
    assert any("by heart" in warning for warning in tiny.warnings)
    assert any("passes over the text" in warning for warning in found.warnings)
    assert "text is the limit" in reason_of(found, "unique tokens")


def test_n_given() -> None:
    """Rows of the table backwards: the compute and the text that a size wants."""
    found = make(params_n=1e9)
    assert found.compute_flop == pytest.approx(1.21e20, rel=0.01)
    assert found.law_optimum.tokens_d == pytest.approx(20.2e9, rel=0.01)
    assert found.params_n == pytest.approx(1e9, rel=0.02)
    served = make(params_n=1e9, serve_tokens=1e12)
    assert served.tokens_d > 5 * found.tokens_d


def test_extrapolation_is_refused_unless_forced() -> None:
    with pytest.raises(UsageError, match="times the largest compute"):
        make(compute_flop=1e27)
    found = make(compute_flop=1e27, is_extrapolation_forced=True)
    assert "extrapolated by force" in found.warnings[0]


def test_below_the_measured_computes_no_loss_is_promised() -> None:
    with pytest.raises(UsageError, match="less than the smallest compute"):
        make(compute_flop=1e12)
    assert "times less than the smallest" in make(compute_flop=1e17).warnings[0]
    forced = make(compute_flop=1e12, is_extrapolation_forced=True)
    assert math.isnan(forced.loss_nats) and not forced.is_loss_known
    assert any("no loss is predicted" in warning for warning in forced.warnings)
    assert next(c.value for c in forced.choices if c.name == "loss") == "not known"
    spec = run_spec(forced)
    assert spec.optimizer.weight_decay <= 0.5 and 1e-5 <= spec.optimizer.peak_lr <= 1e-2


def test_too_little_text_for_any_law() -> None:
    with pytest.raises(UsageError, match="1,000 unique tokens"):
        make(compute_flop=1e21, unique_tokens=1000)
    found = make(compute_flop=1e21, unique_tokens=5000)
    assert not found.is_loss_known and found.recipe.weight_decay <= 0.5
    assert found.params_n < 1e7, "not a size that no text feeds"
    assert any("only" in w and "FLOP are spent" in w for w in found.warnings)
    assert any("optimizer steps" in warning for warning in found.warnings)
    crowd = pool(200, mbit=1000)
    with pytest.raises(UsageError, match="at least one step"):
        make(pool=crowd, compute_flop=1e18, unique_tokens=5000, strategies=("sync",))


def test_unmeasured_links_leave_sync_without_promises() -> None:
    slow = pool().peers[0]
    unknown = PoolPeer(
        name="new",
        flop_per_second=1e13,
        availability_ratio=0.8,
        memory_bytes=slow.memory_bytes,
        upload_bytes_per_second=0.0,
        download_bytes_per_second=0.0,
    )
    found = make(pool=Pool(peers=(slow, unknown)), seconds=DAY_SECONDS)
    assert found.strategy is None and found.wire_bytes_per_peer is None
    assert "not been measured" in reason_of(found, "strategy")


def test_a_tuned_learning_rate_is_transferred() -> None:
    found = make(compute_flop=1e18, tuned_lr=5e-3, tuned_width=128)
    assert found.recipe.peak_lr == pytest.approx(5e-3 * 128 / found.shape.d_model)
    assert "mu-style" in found.recipe.lr_reason


def test_spec_is_one_that_can_be_read_back() -> None:
    found = make(compute_flop=1e18, unique_tokens=1e9)
    spec = run_spec(found, dataset_id="ab" * 32, seed=3)
    assert RunSpec.from_toml(spec_toml(spec, found)) == spec
    assert spec.budget_tokens == found.tokens_d
    assert spec.data.max_data_passes >= found.data_passes
    assert "dataset_id" not in spec_toml(run_spec(found), found)


def test_a_strategy_that_this_version_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    found = make(pool=pool(), seconds=30 * DAY_SECONDS)
    assert found.strategy_name == "diloco"
    monkeypatch.setattr("coordinator.scaling.plan_spec.STRATEGIES", ("sync",))
    with pytest.raises(MachineError, match="cannot run"):
        run_spec(found)


def test_gpu_hours() -> None:
    found = compute_of_gpu_hours(100, gpu="NVIDIA H100")
    assert found.compute_flop == pytest.approx(100 * 3600 * 9.89e14 * 0.35)
    assert found.compute_log_std == 0.3
    assert compute_of_gpu_hours(1, flop_per_second=1e14).compute_log_std == 0
    for wrong in ({}, {"gpu": "abacus"}, {"gpu": "h100", "flop_per_second": 1e14}):
        with pytest.raises(UsageError):
            compute_of_gpu_hours(1, **wrong)  # type: ignore[arg-type]


def peer(name: str, *, flop: float, mbit: float) -> PoolPeer:
    return PoolPeer(
        name=name,
        flop_per_second=flop,
        availability_ratio=1.0,
        memory_bytes=80 * 2**30,
        upload_bytes_per_second=mbit * 1e6 / 8,
        download_bytes_per_second=mbit * 1e6 / 8,
    )


def test_a_given_compute_is_trained_by_whatever_takes_the_least_time() -> None:
    asked: dict[str, Any] = {"pool": pool(2), "compute_flop": 1e20}
    found = make(**asked)
    assert found.strategy_name == "diloco", "sync would lose less to replicas, and take months"
    assert found.calendar_seconds is not None
    late = found.calendar_seconds * 1.2
    assert make(**asked, seconds=late).strategy_name == "diloco"
    with pytest.raises(
        UsageError, match=r"under diloco, .* under sync; the deadline is in"
    ) as said:
        make(**asked, seconds=found.calendar_seconds / 1.2)
    assert "at most" in said.value.allowed and "--flop" in said.value.remedy
    with pytest.raises(UsageError, match="under sync"):
        make(**asked, seconds=late, strategies=("sync",))


@pytest.mark.parametrize("asked", [{"seconds": 10 * DAY_SECONDS}, {"compute_flop": 1e20}])
def test_who_costs_more_than_he_brings_is_left_out(asked: dict[str, Any]) -> None:
    big, modem = peer("big", flop=2e14, mbit=1000), peer("modem", flop=1e12, mbit=0.1)
    found = make(pool=Pool(peers=(big, modem)), **asked)
    alone = make(pool=Pool(peers=(big,)), **asked)
    assert found.admission is not None
    assert found.admission.left_out == (modem,)
    assert (found.loss_nats, found.tokens_d) == (alone.loss_nats, alone.tokens_d)
    reason = reason_of(found, "admitted")
    assert "leave out modem: it brings 0.5% of the FLOP over a link of 0.1 Mbit/s" in reason
    assert "of the FLOP count under diloco" in reason and "under sync, loss 2." in reason
    assert alone.admission is not None and not alone.admission.left_out
    assert "the only peer" in reason_of(alone, "admitted")
    assert "nobody to average with" in reason_of(alone, "wire per peer")


def test_a_replica_that_brings_less_than_it_costs_is_left_out() -> None:
    """Three keep 0.83 of the compute's worth, two 0.89: the third must bring 7 %."""
    two = [peer(name, flop=1e13, mbit=50) for name in ("a", "b")]
    for share, num_admitted in ((0.01, 2), (0.5, 3)):
        small = peer("small", flop=1e13 * share, mbit=50)
        found = make(pool=Pool(peers=(*two, small)), seconds=30 * DAY_SECONDS)
        assert found.admission is not None
        assert len(found.admission.admitted) == num_admitted


def test_the_cap_and_the_model_keep_the_same_share() -> None:
    found = make(pool=pool(300), seconds=30 * DAY_SECONDS)
    assert found.admission is not None
    assert found.admission.efficiency_ratio < 0.95
    assert found.efficiency_ratio == pytest.approx(found.admission.efficiency_ratio, abs=0.01)
    assert f"{found.effective_flop:.4g} FLOP that count" in reason_of(found, "admitted")


@pytest.mark.parametrize("unique_tokens", [2e7, 1e6, 20_000])
def test_text_is_passed_over_as_often_as_is_said(unique_tokens: float) -> None:
    found = make(compute_flop=1e20, unique_tokens=unique_tokens)
    assert found.data_passes == pytest.approx(16, rel=1e-2)
    assert f"tokens: {found.data_passes:.3g} passes" in reason_of(found, "unique tokens")
    assert f"{found.spent_flop:.4g} of the 1e+20 FLOP are spent" in reason_of(
        found, "unique tokens"
    )


def test_small_shapes_stay_near_optimal_where_one_is() -> None:
    for exponent in range(16):
        found = make(
            law=published_law("chinchilla"),
            compute_flop=10 ** (12 + exponent / 8),
            vocab_size=257,
            seq_len=128,
            is_extrapolation_forced=True,
        )
        low, high = found.near_optimal_params_n
        assert low <= found.params_n <= high


def test_the_near_optimal_interval_says_what_it_leaves_aside() -> None:
    found = make(compute_flop=1e20, unique_tokens=1e8)
    assert found.params_n < found.near_optimal_params_n[0]
    assert "unique tokens left aside" in reason_of(found, "near-optimal N")
    assert "left aside" not in reason_of(make(compute_flop=1e20), "near-optimal N")
