"""What averaging costs on measured links, and the strategy that leaves the peers computing.

A round is a butterfly: with n members every member sends and receives (n - 1) / n of an encoded
contribution and of an encoded sum, and the slowest link decides; a few round trips agree on it.
`sync` averages after every global batch. `diloco` averages one of P fragments every H / P inner
steps while training goes on for `overlap` steps; what does not fit into them is waited for.
Replicas that average rarely learn less from the same compute: M of them are worth C M^-0.17
(Charles et al. 2025, 2503.09799, measured at H = 30 up to M = 8).

Choice: `sync` or `diloco`, whichever leaves more effective compute (utilisation x replica factor).
For `diloco` the richest codec that reaches 95 % of the time computing with some H <= 30, with the
smallest such H and the fewest fragments; failing that the leanest codec and the smallest larger H;
failing that what leaves most effective compute.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from coordinator.scaling.laws import PowerRule
from coordinator.scaling.pool import PoolPeer

AIM_UTILISATION = 0.95
MEASURED_H = 30
"""The replica penalty was measured at this many inner steps; more is an extrapolation."""
MEASURED_REPLICAS = 8
_INNER_STEPS = (4, 8, 12, 16, 20, 24, 30, 48, 72, 96, 144, 192, 288, 480)
_FRAGMENTS = (1, 2, 3, 4, 6, 8)
_MAX_OVERLAP_RATIO = 0.5
"""A fragment may travel for at most this share of its interval: the average it brings ages."""
ROUND_TRIPS = 6
"""Messages one after another that form, agree and certify a round."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Codec:
    """A wire format by its sizes."""

    name: str
    bytes_per_value: float
    """Of a contribution."""
    result_bytes_per_value: Callable[[int], float] | None = None
    """Of the sum of so many contributions; None: the same."""

    def moved_bytes_per_value(self, num_members: int) -> float:
        """There and back: a contribution and the sum that returns."""
        if self.result_bytes_per_value is None:
            return 2 * self.bytes_per_value
        return self.bytes_per_value + self.result_bytes_per_value(num_members)


@dataclass(frozen=True, slots=True, kw_only=True)
class StrategyChoice:
    """How peers train together, with what that costs."""

    name: str
    codec: str
    inner_steps_per_outer: int
    """H; 1 for sync."""
    num_fragments: int
    overlap_inner_steps: int
    utilisation_ratio: float
    """Predicted share of the time that peers compute."""
    replica_ratio: float
    """Effective compute that M replicas keep, C_eff / C; 1 for sync."""
    num_replicas: int
    step_seconds: float
    """Computing time of a global batch (sync) or of an inner step (diloco)."""
    round_seconds: float
    """Time that one round (of a whole vector, or of a fragment) travels and agrees."""
    round_wire_bytes: float
    """Sent by one peer in one round; it receives as much."""
    reason: str

    @property
    def effective_ratio(self) -> float:
        """Share of the pool's FLOP that counts."""
        return self.utilisation_ratio * self.replica_ratio


def sent_bytes(num_values: float, codec: Codec, num_members: int) -> float:
    """Bytes that each member of a butterfly sends (and receives) for one vector."""
    share = (num_members - 1) / num_members
    return num_values * codec.moved_bytes_per_value(num_members) * share


def binding_links(peers: Sequence[PoolPeer]) -> list[PoolPeer]:
    """The peers of which one decides how long a round of any size takes, slowest link first: no
    other's link is as slow and its round trip as long.
    """
    by_link = sorted(
        peers,
        key=lambda peer: (
            min(peer.upload_bytes_per_second, peer.download_bytes_per_second),
            -peer.round_trip_seconds,
        ),
    )
    found: list[PoolPeer] = []
    for peer in by_link:
        if not found or peer.round_trip_seconds > found[-1].round_trip_seconds:
            found.append(peer)
    return found


def round_seconds(
    peers: Sequence[PoolPeer], num_values: float, codec: Codec, *, num_members: int = 0
) -> tuple[float, PoolPeer]:
    """Time of one round over the slowest link, and whose link that is; of `num_members` (0: so many
    as peers) where `peers` are their binding links.
    """
    moved = sent_bytes(num_values, codec, num_members or len(peers))
    slowest, seconds = peers[0], -1.0
    for peer in peers:
        link = min(peer.upload_bytes_per_second, peer.download_bytes_per_second)
        one = moved / link + ROUND_TRIPS * peer.round_trip_seconds
        if one > seconds:
            slowest, seconds = peer, one
    return seconds, slowest


def replica_ratio(rule: PowerRule, num_replicas: int, inner_steps_per_outer: int) -> float:
    """C_eff / C of M replicas; beyond H = 30 ln of it grows by ln H / ln 30 (extrapolated)."""
    plain = float(rule.value(num_replicas=float(num_replicas)))
    stretch = max(1.0, math.log(inner_steps_per_outer) / math.log(MEASURED_H))
    return float(plain**stretch)


def plan_sync(
    peers: Sequence[PoolPeer], *, num_values: int, step_seconds: float, codecs: Sequence[Codec]
) -> StrategyChoice:
    """`sync` with the richest codec of at least a byte per value that reaches the aim, else the
    leanest of them: coarser ones were made for pseudo-gradients.
    """
    codecs = [codec for codec in codecs if codec.bytes_per_value >= 1]
    best: StrategyChoice | None = None
    links = binding_links(peers)
    for codec in sorted(codecs, key=lambda codec: -codec.bytes_per_value):
        seconds, slowest = 0.0, peers[0]
        if peers[1:]:
            seconds, slowest = round_seconds(links, num_values, codec, num_members=len(peers))
        moved = sent_bytes(num_values, codec, len(peers))
        ratio = step_seconds / (step_seconds + seconds)
        reason = (
            f"sync computes {step_seconds:.3g} s and averages {seconds:.3g} s per step "
            f"({moved / 1e6:.3g} MB of {codec.name} each way, slowest link {slowest.name}): "
            f"{ratio:.1%} of the time computing"
        )
        if not peers[1:]:
            reason = "sync: one peer has nobody to average with"
        best = StrategyChoice(
            name="sync",
            codec=codec.name,
            inner_steps_per_outer=1,
            num_fragments=1,
            overlap_inner_steps=0,
            utilisation_ratio=ratio,
            replica_ratio=1.0,
            num_replicas=1,
            step_seconds=step_seconds,
            round_seconds=seconds,
            round_wire_bytes=moved,
            reason=reason,
        )
        if ratio >= AIM_UTILISATION:
            break
    assert best is not None, "there is a codec"
    return best


def plan_diloco(
    peers: Sequence[PoolPeer],
    *,
    num_values: int,
    step_seconds: float,
    codecs: Sequence[Codec],
    rule: PowerRule,
    most_fragments: int = _FRAGMENTS[-1],
) -> StrategyChoice:
    """`diloco` as the module docstring says. `step_seconds` is one inner step of every replica."""
    by_richness = sorted(codecs, key=lambda codec: -codec.bytes_per_value)
    near = [steps for steps in _INNER_STEPS if steps <= MEASURED_H]
    far = [steps for steps in _INNER_STEPS if steps > MEASURED_H]
    options = [(codec, steps) for codec in by_richness for steps in near]
    options += [(by_richness[-1], steps) for steps in far]
    choice: StrategyChoice | None = None
    links = binding_links(peers)
    for codec, inner_steps in options:
        for num_fragments in _FRAGMENTS:
            if inner_steps % num_fragments or num_fragments > most_fragments:
                continue
            option = _diloco_option(
                links,
                num_members=len(peers),
                num_values=num_values,
                step_seconds=step_seconds,
                codec=codec,
                inner_steps=inner_steps,
                num_fragments=num_fragments,
                rule=rule,
            )
            if option.utilisation_ratio >= AIM_UTILISATION:
                return option
            if choice is None or option.effective_ratio > choice.effective_ratio:
                choice = option
    assert choice is not None, "there is an option"
    return choice


def _diloco_option(
    links: Sequence[PoolPeer],
    *,
    num_members: int,
    num_values: int,
    step_seconds: float,
    codec: Codec,
    inner_steps: int,
    num_fragments: int,
    rule: PowerRule,
) -> StrategyChoice:
    fragment_values = num_values / num_fragments
    seconds, slowest = round_seconds(links, fragment_values, codec, num_members=num_members)
    moved = sent_bytes(fragment_values, codec, num_members)
    interval_steps = inner_steps / num_fragments
    interval_seconds = interval_steps * step_seconds
    may_overlap = num_fragments > 1
    most_steps = math.floor(interval_steps * _MAX_OVERLAP_RATIO) if may_overlap else 0
    overlap_steps = min(most_steps, math.ceil(seconds / step_seconds))
    waited = max(0.0, seconds - overlap_steps * step_seconds)
    utilisation = interval_seconds / (interval_seconds + waited)
    kept = replica_ratio(rule, num_members, inner_steps)
    beyond = []
    if inner_steps > MEASURED_H:
        beyond.append(f"H > {MEASURED_H}")
    if num_members > MEASURED_REPLICAS:
        beyond.append(f"M > {MEASURED_REPLICAS}")
    extrapolated = f" ({' and '.join(beyond)}: extrapolated)" if beyond else ""
    reason = (
        f"diloco with H = {inner_steps}, {num_fragments} fragment"
        f"{'s' if num_fragments > 1 else ''}, codec {codec.name}: a round of "
        f"{moved / 1e6:.3g} MB each way takes {seconds:.3g} s "
        f"over {slowest.name}'s link beside {interval_seconds:.3g} s of computing"
        + (f", {overlap_steps} steps of it overlapped" if overlap_steps else "")
        + f": {utilisation:.1%} of the time computing; {num_members} replicas keep {kept:.0%} of "
        f"the compute's worth{extrapolated}"
    )
    return StrategyChoice(
        name="diloco",
        codec=codec.name,
        inner_steps_per_outer=inner_steps,
        num_fragments=num_fragments,
        overlap_inner_steps=overlap_steps,
        utilisation_ratio=utilisation,
        replica_ratio=kept,
        num_replicas=num_members,
        step_seconds=step_seconds,
        round_seconds=seconds,
        round_wire_bytes=moved,
        reason=reason,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeAdvice:
    """What running the peers of each site as one replica would give."""

    num_replicas: int
    compute_ratio: float
    """Effective compute afterwards over now, above 1."""
    reason: str


def merge_advice(peers: Sequence[PoolPeer], rule: PowerRule) -> MergeAdvice | None:
    """Peers of one site, taken as one data-parallel replica; None if no site has two."""
    sites: dict[str, list[str]] = {}
    for peer in peers:
        if peer.site:
            sites.setdefault(peer.site, []).append(peer.name)
    shared = {site: names for site, names in sites.items() if names[1:]}
    if not shared:
        return None
    before = len(peers)
    after = before - sum(len(names) - 1 for names in shared.values())
    gain = float(rule.value(num_replicas=float(after)) / rule.value(num_replicas=float(before)))
    groups = "; ".join(f"{', '.join(names)} at {site}" for site, names in sorted(shared.items()))
    return MergeAdvice(
        num_replicas=after,
        compute_ratio=gain,
        reason=f"{groups} are close to each other: run each group as one peer with several devices "
        f"and {before} replicas become {after}, worth x{gain:.2f} compute (a doubling of replicas "
        f"costs {1 - float(rule.value(num_replicas=2.0)):.0%})",
    )
