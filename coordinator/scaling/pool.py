"""A pool of borrowed machines: what training compute it will deliver, and how surely.

C = T u sum_i f_i a_i: f_i measured training FLOP/s of a peer (never a data sheet), a_i its
availability, u the share of time that it computes (decided by links and strategy), T the horizon.
ln C is taken as normal around ln C with standard deviation s from two sources:

- each peer is there or not: Var C / C^2 = sum (f a)^2 (1 - a) / a / (sum f a)^2, the whole horizon
  taken as one draw (the careful reading: absences last);
- the pool itself drifts: joins and leaves are a random walk of ln capacity with `drift` per square
  root of a day, whose mean over T days has variance drift^2 T / 3, so s grows with the horizon;

and s is at least 0.3: nobody knows a volunteer pool better than within a third.
"""

import math
import tomllib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from protos.contract.errors import UsageError
from protos.contract.run_spec import parse_fields, unknown_key_error

LOWEST_LOG_STD = 0.3
DEFAULT_DRIFT_PER_SQRT_DAY = 0.1
"""Where no join/leave history says otherwise."""
DAY_SECONDS = 86_400.0
MAX_PEERS = 100_000
_MAX_FLOP_PER_SECOND = 1e18
"""Of one peer; no single machine trains faster."""
_MBIT_BYTES = 1e6 / 8
_GIB_BYTES = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolPeer:
    """One machine of the pool. A link speed of 0 is one that nobody has measured."""

    name: str
    flop_per_second: float
    availability_ratio: float
    memory_bytes: float
    upload_bytes_per_second: float
    download_bytes_per_second: float
    round_trip_seconds: float = 0.05
    site: str = ""
    """Peers of one site are close to each other (one LAN); "" is a site of its own."""

    @property
    def mean_flop_per_second(self) -> float:
        """f a."""
        return self.flop_per_second * self.availability_ratio

    @property
    def has_links(self) -> bool:
        """True if both directions were measured."""
        return self.upload_bytes_per_second > 0 and self.download_bytes_per_second > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Peers, and how the pool as a whole changes."""

    peers: tuple[PoolPeer, ...]
    drift_per_sqrt_day: float = DEFAULT_DRIFT_PER_SQRT_DAY
    is_drift_measured: bool = False

    @property
    def mean_flop_per_second(self) -> float:
        """sum f a, before utilisation."""
        return sum(peer.mean_flop_per_second for peer in self.peers)


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeEstimate:
    """Training compute over a horizon."""

    compute_flop: float
    """Median."""
    compute_log_std: float
    """s."""
    reason: str


def estimate_compute(
    pool: Pool, *, seconds: float, utilisation_ratio: float, log_std: float | None = None
) -> ComputeEstimate:
    """C and s of a pool over `seconds`; `log_std` overrides s."""
    speed = pool.mean_flop_per_second
    flop = speed * utilisation_ratio * seconds
    days = seconds / DAY_SECONDS
    presence = sum(
        peer.mean_flop_per_second**2 * (1 - peer.availability_ratio) / peer.availability_ratio
        for peer in pool.peers
    )
    presence = math.log1p(presence / speed**2)
    drift = pool.drift_per_sqrt_day**2 * days / 3
    found = math.sqrt(presence + drift)
    std = max(LOWEST_LOG_STD, found) if log_std is None else log_std
    how = "measured" if pool.is_drift_measured else "assumed"
    reason = (
        f"{len(pool.peers)} peer{'s' if pool.peers[1:] else ''} with {speed:.3g} FLOP/s (measured "
        f"speed x availability) x {utilisation_ratio:.1%} of the time computing x {days:.3g} days "
        f"= {flop:.3g} FLOP"
    )
    if log_std is not None:
        return ComputeEstimate(
            compute_flop=flop, compute_log_std=std, reason=f"{reason}; s = {std:.2g} as asked"
        )
    floor = f", raised to {LOWEST_LOG_STD}" if found < LOWEST_LOG_STD else ""
    reason += (
        f"; s of ln C is {std:.2f}: {math.sqrt(presence):.2f} from peers that come and go, "
        f"{math.sqrt(drift):.2f} from the pool's drift ({how}, {pool.drift_per_sqrt_day:.2g} per "
        f"square root of a day){floor}"
    )
    return ComputeEstimate(compute_flop=flop, compute_log_std=std, reason=reason)


def availability(
    up_seconds: Sequence[tuple[float, float]],
    *,
    begin_seconds: float,
    now_seconds: float,
    memory_seconds: float = 7 * DAY_SECONDS,
    prior_ratio: float = 0.8,
    prior_seconds: float = 6 * 3600.0,
) -> float:
    """Share of time that a peer is up: exponentially weighted mean over its history.

    `up_seconds` are half-open intervals since `begin_seconds`. The weight falls by e in
    `memory_seconds`; `prior_seconds` of history at `prior_ratio` stand in for a peer that has
    hardly been seen. The result is in (0, 1].
    """

    def weight(begin: float, end: float) -> float:
        """Integral of exp(-(now - t) / memory)."""
        return memory_seconds * (
            math.exp((end - now_seconds) / memory_seconds)
            - math.exp((begin - now_seconds) / memory_seconds)
        )

    up = sum(
        weight(max(begin, begin_seconds), min(end, now_seconds))
        for begin, end in up_seconds
        if min(end, now_seconds) > max(begin, begin_seconds)
    )
    whole = weight(begin_seconds, now_seconds) if now_seconds > begin_seconds else 0.0
    return min(1.0, (up + prior_seconds * prior_ratio) / (whole + prior_seconds))


def drift_per_sqrt_day(daily_flop_per_second: Sequence[float]) -> float | None:
    """Standard deviation of day-to-day changes of ln capacity; None below three days of history.

    Days without any capacity are left out: ln 0 says nothing.
    """
    logs = [math.log(value) for value in daily_flop_per_second if value > 0]
    if len(logs) < 3:
        return None
    steps = [after - before for before, after in zip(logs, logs[1:], strict=False)]
    return math.sqrt(sum(step * step for step in steps) / len(steps))


@dataclass(frozen=True, slots=True, kw_only=True)
class _PeerEntry:
    """A [[peer]] table of a pool file, in units that people use."""

    name: str
    flop_per_second: float
    availability_ratio: float
    memory_gib: float
    upload_mbit_per_second: float
    download_mbit_per_second: float
    count: int = 1
    round_trip_milliseconds: float = 50.0
    site: str = ""


_LIMITS: dict[str, tuple[float, float]] = {
    "flop_per_second": (1e3, _MAX_FLOP_PER_SECOND),
    "availability_ratio": (1e-3, 1.0),
    "memory_gib": (0.01, 1e6),
    "upload_mbit_per_second": (1e-3, 1e7),
    "download_mbit_per_second": (1e-3, 1e7),
    "count": (1, MAX_PEERS),
    "round_trip_milliseconds": (0.0, 60_000.0),
}
"""(lowest, highest) of each number of an entry."""

POOL_EXAMPLE = """\
# drift_per_sqrt_day = 0.1        # optional: how fast the pool's ln capacity wanders
[[peer]]
name = "anna"
flop_per_second = 2.1e13          # measured: muster-peer doctor
availability_ratio = 0.7          # share of time that it is up
memory_gib = 24
upload_mbit_per_second = 20
download_mbit_per_second = 100
# count = 1, round_trip_milliseconds = 50, site = ""   (peers of one site share a LAN)
"""


def pool_from_toml(text: str, *, where: str = "pool") -> Pool:
    """Pool of a TOML document (POOL_EXAMPLE shows one). Raises UsageError that names the place."""
    try:
        plain = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(
            f"{where} is not TOML: {error}", allowed="[[peer]] tables", remedy="correct that place"
        ) from error
    for key in plain:
        if key not in ("peer", "drift_per_sqrt_day"):
            raise unknown_key_error(key, ("peer", "drift_per_sqrt_day"), where=where)
    entries = plain.get("peer", [])
    if not isinstance(entries, list) or not entries:
        raise UsageError(
            f"{where} has no peers",
            allowed="one [[peer]] table or more",
            remedy="write them like this:\n" + POOL_EXAMPLE,
        )
    peers: list[PoolPeer] = []
    for index, entry in enumerate(entries, start=1):
        place = f"{where}: peer {index}"
        _check_finite(entry, where=place)
        peers += _peers_of_entry(parse_fields(_PeerEntry, entry, where=place), where=where)
    if len(peers) > MAX_PEERS:
        raise UsageError(
            f"{where} has {len(peers)} peers",
            allowed=f"at most {MAX_PEERS}",
            remedy="plan for fewer, or join several into one entry",
        )
    name, number = Counter(peer.name for peer in peers).most_common(1)[0]
    if number > 1:
        raise UsageError(
            f"{where}: {number} peers are called {name!r}",
            allowed="different names",
            remedy="rename one, or use count",
        )
    return Pool(peers=tuple(peers), **_drift(plain, where=where))


def _drift(plain: dict[str, Any], *, where: str) -> dict[str, Any]:
    drift = plain.get("drift_per_sqrt_day")
    if drift is None:
        return {}
    is_number = isinstance(drift, int | float) and not isinstance(drift, bool)
    if not is_number or not 0 <= drift <= 10:
        raise UsageError(
            f"{where}: drift_per_sqrt_day = {drift!r}", allowed="0 to 10", remedy="correct it"
        )
    return {"drift_per_sqrt_day": float(drift), "is_drift_measured": True}


def _check_finite(entry: Any, *, where: str) -> None:
    for name, value in entry.items() if isinstance(entry, dict) else ():
        if name in _LIMITS and isinstance(value, float) and not math.isfinite(value):
            lowest, highest = _LIMITS[name]
            raise UsageError(
                f"{where}.{name} = {value!r}",
                allowed=f"a finite number, {lowest:g} to {highest:g}",
                remedy="correct it",
            )


def _peers_of_entry(entry: _PeerEntry, *, where: str) -> list[PoolPeer]:
    for name, (lowest, highest) in _LIMITS.items():
        value = getattr(entry, name)
        if not lowest <= value <= highest:  # NaN fails too
            raise UsageError(
                f"{where}: {name} = {value!r} of {entry.name!r}",
                allowed=f"{lowest:g} to {highest:g}",
                remedy="correct it; `muster-peer doctor` measures speed, memory is what is lent",
            )
    numbers = range(1, entry.count + 1)
    return [
        PoolPeer(
            name=entry.name if entry.count == 1 else f"{entry.name}-{number}",
            flop_per_second=entry.flop_per_second,
            availability_ratio=entry.availability_ratio,
            memory_bytes=entry.memory_gib * _GIB_BYTES,
            upload_bytes_per_second=entry.upload_mbit_per_second * _MBIT_BYTES,
            download_bytes_per_second=entry.download_mbit_per_second * _MBIT_BYTES,
            round_trip_seconds=entry.round_trip_milliseconds / 1000,
            site=entry.site,
        )
        for number in numbers
    ]
