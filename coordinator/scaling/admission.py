"""Whose memory may cap the model: admitting weak peers, or leaving them out.

Every admitted peer holds the whole model, so N <= the least of their caps. A cap at r N_opt keeps
eta(r) of the compute; peers left out take their share of FLOP with them. Leaving the weakest out is
right exactly when their share is below 1 - eta(N_cap with them) / eta(N_cap without). Whose link or
replica costs more than it brings is seen only with a strategy: `plan_choice` leaves those out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

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
    left_out_reasons: tuple[str, ...] = ()
    """Why each group of those left out is."""


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
    found = Admission(
        admitted=admitted,
        left_out=left_out,
        cap_params=cap,
        efficiency_ratio=efficiency,
        reason="",
    )
    if left_out:
        found = replace(
            found,
            left_out_reasons=(_left_out_reason(left_out, total, compute_flop, best, with_all),),
        )
    flop = compute_flop * sum(peer.mean_flop_per_second for peer in admitted) / total
    return settled(found, law=law_at(flop), compute_flop=flop)


def settled(admission: Admission, *, law: LossLaw, compute_flop: float) -> Admission:
    """With what the cap keeps, and the sentence that says so, at the compute that will count."""
    cap, admitted = admission.cap_params, admission.admitted
    held = min(cap, law.optimum(compute_flop).params_n)
    efficiency = float(law.efficiency(held, compute_flop))
    weakest = min(admitted, key=lambda peer: peer.memory_bytes)
    memory = (
        f"the weakest admitted memory, {weakest.memory_bytes / 2**30:.3g} GiB of {weakest.name}, "
        f"trains up to N = {cap:.3g}, which keeps {efficiency:.1%} of the {compute_flop:.4g} FLOP "
        "that count"
    )
    who = f"all {len(admitted)} peers are" if admitted[1:] else "the only peer is"
    reasons = admission.left_out_reasons or (f"{who} admitted",)
    return replace(admission, efficiency_ratio=efficiency, reason="; ".join((*reasons, memory)))


def names_of(peers: Sequence[PoolPeer]) -> str:
    """The first five, and whether there are more."""
    return ", ".join(peer.name for peer in peers[:5]) + (" ..." if peers[5:] else "")


def _left_out_reason(
    left_out: Sequence[PoolPeer],
    total: float,
    compute_flop: float,
    best: tuple[float, float, float, float],
    with_all: tuple[float, float, float, float],
) -> str:
    _, threshold, _, efficiency = best
    if with_all[1] == threshold:  # the ones left out cannot hold even the smallest model
        return f"{names_of(left_out)} left out: too little memory for any model"
    share = sum(peer.mean_flop_per_second for peer in left_out) / total
    return (
        f"{names_of(left_out)} left out: they bring {share:.1%} of the FLOP, less than 1 - "
        f"{with_all[3]:.3f} / {efficiency:.3f} = {1 - with_all[3] / efficiency:.1%} that their cap "
        f"of N = {with_all[2]:.3g} would cost at the pool's whole {compute_flop:.3g} FLOP"
    )
