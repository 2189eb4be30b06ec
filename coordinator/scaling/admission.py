"""Whose memory may cap the model: admitting weak peers, or leaving them out.

Every admitted peer holds the whole model, so N <= the least of their caps. A cap at r N_opt keeps
eta(r) of the compute; peers left out take their share of FLOP with them. Leaving the weakest out is
right exactly when their share is below 1 - eta(N_cap with them) / eta(N_cap without).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from coordinator.scaling.laws import LossLaw
from coordinator.scaling.pool import PoolPeer
from protos.contract.errors import UsageError

_MAX_THRESHOLDS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """Who trains, and what that costs."""

    admitted: tuple[PoolPeer, ...]
    left_out: tuple[PoolPeer, ...]
    cap_params: float
    """N that the weakest admitted peer can train."""
    efficiency_ratio: float
    """Share of the admitted peers' compute that the cap leaves."""
    reason: str


def drop_pays(share_ratio: float, *, efficiency_with: float, efficiency_without: float) -> bool:
    """True if peers with `share_ratio` of the FLOP are worth less than the cap that they bring."""
    return share_ratio < 1 - efficiency_with / efficiency_without


def plan_admission(
    peers: Sequence[PoolPeer],
    *,
    law_at: Callable[[float], LossLaw],
    compute_flop: float,
    cap_of: Callable[[float], float],
) -> Admission:
    """The set {memory >= threshold} with the most effective compute.

    `compute_flop` is what all peers together bring, `law_at(C)` the law at C, `cap_of(bytes)` the N
    that fits into a memory. Raises UsageError if no peer can train anything.
    """
    order = sorted(peers, key=lambda peer: peer.memory_bytes)
    thresholds = sorted({peer.memory_bytes for peer in order})
    if len(thresholds) > _MAX_THRESHOLDS:
        last = len(thresholds) - 1
        thresholds = [thresholds[i * last // (_MAX_THRESHOLDS - 1)] for i in range(_MAX_THRESHOLDS)]
    total = sum(peer.mean_flop_per_second for peer in order)
    best: tuple[float, float, float, float] | None = None
    with_all: tuple[float, float, float, float] | None = None
    for threshold in thresholds:
        cap = cap_of(threshold)
        if cap <= 0:
            continue
        fast = sum(peer.mean_flop_per_second for peer in order if peer.memory_bytes >= threshold)
        flop = compute_flop * fast / total
        law = law_at(flop)
        efficiency = float(law.efficiency(min(cap, law.optimum(flop).params_n), flop))
        option = (flop * efficiency, threshold, cap, efficiency)
        with_all = with_all or option
        if best is None or option[0] > best[0] * (1 + 1e-9):
            best = option
    if best is None or with_all is None:
        biggest = order[-1]
        raise UsageError(
            f"the largest memory of the pool is {biggest.memory_bytes / 2**30:.3g} GiB "
            f"({biggest.name})",
            allowed="memory for the smallest model and one window of activations",
            remedy="lend more memory, or lower --seq-len or --vocab-size",
        )
    _, threshold, cap, efficiency = best
    admitted = tuple(peer for peer in order if peer.memory_bytes >= threshold)
    left_out = tuple(peer for peer in order if peer.memory_bytes < threshold)
    return Admission(
        admitted=admitted,
        left_out=left_out,
        cap_params=cap,
        efficiency_ratio=efficiency,
        reason=_reason(admitted, left_out, total, best, with_all),
    )


def _reason(
    admitted: Sequence[PoolPeer],
    left_out: Sequence[PoolPeer],
    total: float,
    best: tuple[float, float, float, float],
    with_all: tuple[float, float, float, float],
) -> str:
    _, threshold, cap, efficiency = best
    weakest = min(admitted, key=lambda peer: peer.memory_bytes)
    text = (
        f"the weakest admitted memory, {threshold / 2**30:.3g} GiB of {weakest.name}, trains up to "
        f"N = {cap:.3g}"
    )
    if not left_out:
        kept = f"which keeps {efficiency:.1%} of the compute"
        return f"all {len(admitted)} peers are admitted: {text}, {kept}"
    share = sum(peer.mean_flop_per_second for peer in left_out) / total
    names = ", ".join(peer.name for peer in left_out[:5]) + (" ..." if left_out[5:] else "")
    if with_all[1] == threshold:  # the ones left out cannot hold even the smallest model
        return f"{names} left out: too little memory for any model; {text}"
    return (
        f"{names} left out: they bring {share:.1%} of the FLOP, less than 1 - "
        f"{with_all[3]:.3f} / {efficiency:.3f} = {1 - with_all[3] / efficiency:.1%} that their cap "
        f"of N = {with_all[2]:.3g} would cost; {text}, which keeps {efficiency:.1%} of the compute"
    )
