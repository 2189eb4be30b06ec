"""What averaging costs, and the strategy that follows."""

from typing import Any

import pytest

from coordinator.scaling.constants import COMPUTE_WORTH
from coordinator.scaling.links import (
    AIM_UTILISATION,
    Codec,
    binding_links,
    merge_advice,
    plan_diloco,
    plan_sync,
    replica_ratio,
    round_seconds,
    sent_bytes,
)
from coordinator.scaling.pool import PoolPeer

RULE = COMPUTE_WORTH["replicas"].law
FP32 = Codec(name="fp32", bytes_per_value=4.0)
INT8 = Codec(name="int8", bytes_per_value=1.0)


def peers(number: int, *, mbit: float = 20.0, sites: tuple[str, ...] = ()) -> list[PoolPeer]:
    return [
        PoolPeer(
            name=f"p{index}",
            flop_per_second=1e13,
            availability_ratio=0.9,
            memory_bytes=24e9,
            upload_bytes_per_second=mbit * 1e6 / 8,
            download_bytes_per_second=100e6 / 8,
            round_trip_seconds=0.0,
            site=sites[index] if sites else "",
        )
        for index in range(number)
    ]


def test_butterfly_bytes_and_the_slowest_link() -> None:
    assert sent_bytes(250, FP32, 2) == 1000
    assert sent_bytes(250, FP32, 4) == 1500
    sparse = Codec(name="s", bytes_per_value=0.5, result_bytes_per_value=lambda parts: 0.25 * parts)
    assert sent_bytes(1000, sparse, 4) == 0.75 * 1500, "a sum carries what all have sent"
    pool = [*peers(3), *peers(1, mbit=5.0)]
    seconds, slowest = round_seconds(pool, 250_000, FP32)
    assert slowest is pool[3]
    assert seconds == pytest.approx(1.5e6 / (5e6 / 8))


def test_replicas_cost_what_was_measured() -> None:
    found = [round(replica_ratio(RULE, m, 30), 2) for m in (2, 4, 8, 16, 32, 64)]
    assert found == [0.89, 0.79, 0.70, 0.62, 0.55, 0.49] or found == pytest.approx(
        [0.89, 0.79, 0.70, 0.63, 0.56, 0.50], abs=0.011
    )
    assert 2 * replica_ratio(RULE, 2, 30) == pytest.approx(1.78, abs=0.005)
    assert replica_ratio(RULE, 8, 300) < replica_ratio(RULE, 8, 30) == replica_ratio(RULE, 8, 5)


def test_sync_takes_the_richest_codec_that_is_fast_enough() -> None:
    fast = plan_sync(peers(4, mbit=1000), num_values=10**6, step_seconds=20.0, codecs=(INT8, FP32))
    assert (fast.codec, fast.replica_ratio) == ("fp32", 1.0)
    seconds = fast.round_seconds
    assert fast.utilisation_ratio == pytest.approx(20 / (20 + seconds))
    slow = plan_sync(peers(4), num_values=10**7, step_seconds=20.0, codecs=(INT8, FP32))
    assert slow.codec == "int8"
    alone = plan_sync(peers(1), num_values=10**7, step_seconds=20.0, codecs=(FP32,))
    assert alone.utilisation_ratio == 1.0


@pytest.mark.parametrize("step_seconds", [0.05, 0.5, 5.0, 50.0])
def test_diloco_reaches_the_aim_with_the_least_h(step_seconds: float) -> None:
    pool = peers(8, mbit=100)
    found = plan_diloco(
        pool, num_values=10**7, step_seconds=step_seconds, codecs=(FP32, INT8), rule=RULE
    )
    assert found.utilisation_ratio >= AIM_UTILISATION
    if found.inner_steps_per_outer <= 30:
        fewer = plan_diloco(
            pool, num_values=10**7, step_seconds=step_seconds * 1.5, codecs=(FP32, INT8), rule=RULE
        )
        assert fewer.inner_steps_per_outer <= found.inner_steps_per_outer or (
            fewer.codec != found.codec
        )
    else:
        assert found.codec == "int8", "beyond H = 30 only with the leanest codec"
        assert "extrapolated" in found.reason


def test_utilisation_is_what_a_simulated_schedule_gives() -> None:
    """Fragments leave every H / P steps, travel, and are waited for after the overlap."""
    pool = peers(4, mbit=100)
    found = plan_diloco(pool, num_values=10**7, step_seconds=2.0, codecs=(FP32,), rule=RULE)
    interval, rest = divmod(found.inner_steps_per_outer, found.num_fragments)
    assert rest == 0
    now, computed = 0.0, 0.0
    for _ in range(50):
        arrival = now + found.round_seconds
        for step in range(interval):
            if step == found.overlap_inner_steps:
                now = max(now, arrival)
            now += found.step_seconds
            computed += found.step_seconds
    assert computed / now == pytest.approx(found.utilisation_ratio, abs=0.01)


def test_hopeless_links_are_said() -> None:
    found = plan_diloco(
        peers(2, mbit=0.01), num_values=10**9, step_seconds=0.1, codecs=(FP32,), rule=RULE
    )
    assert found.utilisation_ratio < AIM_UTILISATION
    assert found.inner_steps_per_outer == 480


def test_close_peers_are_merged() -> None:
    assert merge_advice(peers(3), RULE) is None
    found = merge_advice(peers(4, sites=("home", "lab", "lab", "")), RULE)
    assert found is not None and found.num_replicas == 3
    assert found.compute_ratio == pytest.approx((4 / 3) ** 0.17)
    assert "p1, p2 at lab" in found.reason


def test_only_links_that_can_be_the_slowest_are_looked_at() -> None:
    fields: dict[str, Any] = {
        "flop_per_second": 1e12, "availability_ratio": 1.0, "memory_bytes": 1e9,
        "upload_bytes_per_second": 1e6, "download_bytes_per_second": 2e6,
    }  # fmt: skip
    many = [PoolPeer(name=f"p{index}", **fields) for index in range(5000)]
    many.append(PoolPeer(name="slow", **(fields | {"upload_bytes_per_second": 1e5})))
    codec = Codec(name="fp32", bytes_per_value=4.0)
    many.append(PoolPeer(name="far", **(fields | {"round_trip_seconds": 0.5})))
    links = binding_links(many)
    assert [peer.name for peer in links] == ["slow", "far"]
    for num_values in (1e2, 1e6):
        said = round_seconds(links, num_values, codec, num_members=len(many))
        assert said == round_seconds(many, num_values, codec)
