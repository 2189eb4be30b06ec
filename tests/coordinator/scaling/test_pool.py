"""Pools: compute with its uncertainty, availability, drift, files."""

import math

import pytest

from coordinator.scaling.pool import (
    DAY_SECONDS,
    POOL_EXAMPLE,
    Pool,
    PoolPeer,
    availability,
    drift_per_sqrt_day,
    estimate_compute,
    pool_from_toml,
)
from protos.contract.errors import UsageError


def peer(name: str = "a", *, flop: float = 1e12, up: float = 0.5) -> PoolPeer:
    return PoolPeer(
        name=name,
        flop_per_second=flop,
        availability_ratio=up,
        memory_bytes=8e9,
        upload_bytes_per_second=1e6,
        download_bytes_per_second=1e6,
    )


def test_compute_is_speed_times_availability_times_time() -> None:
    pool = Pool(peers=(peer("a"), peer("b", flop=3e12, up=1.0)))
    found = estimate_compute(pool, seconds=1000.0, utilisation_ratio=0.9)
    assert found.compute_flop == pytest.approx((0.5e12 + 3e12) * 0.9 * 1000)
    assert "0.1 per square root of a day" in found.reason


def test_uncertainty_has_the_stated_variance_and_grows_with_the_horizon() -> None:
    peers = tuple(peer(str(index)) for index in range(4))
    still = Pool(peers=peers, drift_per_sqrt_day=0.0)
    # Var C / C^2 of four machines, each there half of the time: (1/4) (1 - a) / a = 1/4
    found = estimate_compute(still, seconds=1e5, utilisation_ratio=1.0)
    assert found.compute_log_std == pytest.approx(math.sqrt(math.log1p(0.25)))
    drifting = Pool(peers=peers, drift_per_sqrt_day=0.2)
    stds = [
        estimate_compute(drifting, seconds=days * DAY_SECONDS, utilisation_ratio=1.0)
        for days in (1, 10, 100)
    ]
    assert stds[0].compute_log_std < stds[1].compute_log_std < stds[2].compute_log_std
    assert stds[2].compute_log_std == pytest.approx(math.sqrt(math.log1p(0.25) + 0.04 * 100 / 3))
    certain = Pool(peers=(peer(up=1.0),), drift_per_sqrt_day=0.0)
    assert estimate_compute(certain, seconds=1.0, utilisation_ratio=1.0).compute_log_std == 0.3
    asked = estimate_compute(certain, seconds=1.0, utilisation_ratio=1.0, log_std=0.1)
    assert asked.compute_log_std == 0.1


def test_availability_weighs_the_past_less() -> None:
    now = 100 * DAY_SECONDS

    def of(*up: tuple[float, float]) -> float:
        days = [(begin * DAY_SECONDS, end * DAY_SECONDS) for begin, end in up]
        return availability(days, begin_seconds=0.0, now_seconds=now)

    assert of((0, 100)) > 0.98
    assert of() < 0.05
    assert of((93, 100)) == pytest.approx(1 - math.exp(-1), abs=0.03)
    assert of((0, 50)) < 0.1 < 0.9 < of((50, 100))
    new = availability([(99.0, 100.0)], begin_seconds=99.0, now_seconds=100.0)
    assert new == pytest.approx(0.8, abs=0.01), "a newcomer is believed a little"


def test_drift_needs_three_days() -> None:
    assert drift_per_sqrt_day([1e12, 1e12]) is None
    assert drift_per_sqrt_day([1e12, 1e12, 1e12]) == 0.0
    grown = drift_per_sqrt_day([1e12, 2e12, 0.0, 1e12])
    assert grown == pytest.approx(math.log(2))


def test_pool_file() -> None:
    pool = pool_from_toml(POOL_EXAMPLE)
    assert pool.peers[0].upload_bytes_per_second == 2.5e6
    assert pool.peers[0].memory_bytes == 24 * 2**30
    many = pool_from_toml(POOL_EXAMPLE.replace("# count = 1, ", "count = 3 # "))
    assert [one.name for one in many.peers] == ["anna-1", "anna-2", "anna-3"]
    drifting = pool_from_toml("drift_per_sqrt_day = 0.3\n" + POOL_EXAMPLE)
    assert drifting.is_drift_measured


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("flop_per_second = 2.1e13", "flop_per_second = 0", "flop_per_second = 0"),
        ("flop_per_second = 2.1e13", "flop_per_second = -1", "flop_per_second = -1"),
        ("flop_per_second = 2.1e13", "flop_per_second = 1e25", "flop_per_second = 1e"),
        ("flop_per_second = 2.1e13", "flop_per_second = nan", "flop_per_second"),
        ("availability_ratio = 0.7", "availability_ratio = 70", "availability_ratio = 70"),
        ("memory_gib = 24", "memory_gib = 0", "memory_gib = 0"),
        ("upload_mbit_per_second = 20", "", "upload_mbit_per_second is missing"),
        ("memory_gib = 24", "memory_gb = 24", "unknown key 'memory_gb'"),
        ("memory_gib = 24", "memory_gib = 24\ncount = 0", "count = 0"),
        ("memory_gib = 24", "memory_gib = 24\ncount = 10000000", "count = 10000000"),
        ("[[peer]]", "[peer]", "has no peers"),
        ("[[peer]]", "[[peers]]", "unknown key 'peers'"),
        ("[[peer]]", "[[peer", "is not TOML"),
        ("# drift_per_sqrt_day = 0.1", "drift_per_sqrt_day = -1", "drift_per_sqrt_day = -1"),
    ],
)
def test_absurd_pools_are_refused(old: str, new: str, found: str) -> None:
    assert old in POOL_EXAMPLE
    with pytest.raises(UsageError, match=found.replace("[", r"\[")) as caught:
        pool_from_toml(POOL_EXAMPLE.replace(old, new, 1))
    assert caught.value.allowed and caught.value.remedy


def test_empty_pool_and_doubled_names() -> None:
    with pytest.raises(UsageError, match="has no peers"):
        pool_from_toml("")
    with pytest.raises(UsageError, match="2 peers are called 'anna'"):
        pool_from_toml(POOL_EXAMPLE + POOL_EXAMPLE)


def test_a_speed_that_is_no_number_is_refused_with_what_is_allowed() -> None:
    with pytest.raises(UsageError, match=r"flop_per_second = nan") as said:
        pool_from_toml(POOL_EXAMPLE.replace("2.1e13", "nan"))
    assert said.value.allowed == "a finite number, 1000 to 1e+18"
