"""Which strategy, and whose link or replica is worth what it brings: drafts compared.

With a horizon the better draft predicts less loss. With the compute given losses hardly differ and
times do: those that meet the deadline first, then the most effective compute per unit of time
(speed x utilisation x replica factor x what N keeps). Every averaging waits for the slowest link
and every replica costs, so peers are left out, slowest links or least FLOP first, while that helps.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from coordinator.scaling.admission import Admission, names_of
from coordinator.scaling.plan_text import duration
from coordinator.scaling.plan_types import Draft, PlanRequest
from coordinator.scaling.pool import PoolPeer
from protos.contract.errors import UsageError

_LEAST_GAIN = {"loss": 2e-4, "speed": 5e-3}
"""Of ln; less than that is not worth leaving anybody out (shapes come in steps)."""
_MOST_ROUNDS = 8
_MBIT_BYTES = 1e6 / 8


def train_seconds(admission: Admission, draft: Draft) -> float:
    """Median time of the whole training."""
    utilisation = 1.0 if draft.strategy is None else draft.strategy.utilisation_ratio
    speed = sum(peer.mean_flop_per_second for peer in admission.admitted) * utilisation
    return draft.tokens_d * draft.shape.flop_per_token() / speed


def chosen_of(
    request: PlanRequest, admission: Admission | None, drafts: Sequence[Draft]
) -> Draft | None:
    """The best draft whose strategy is allowed; None if there is none."""
    allowed = [draft for draft in drafts if _name(draft) in request.strategies]
    return min(allowed, key=lambda draft: _rank(request, admission, draft), default=None)


def admit_by_links(
    request: PlanRequest,
    admission: Admission,
    drafts: tuple[Draft, ...],
    best: Draft,
    *,
    drafts_of: Callable[[PlanRequest, Admission], tuple[Draft, ...]],
    cap_of: Callable[[float], float],
) -> tuple[Admission, tuple[Draft, ...], Draft]:
    """`admission` without the peers that cost more than they bring, and its drafts."""
    margin = _LEAST_GAIN["loss" if request.compute_flop is None else "speed"]
    before, with_all = admission, best
    for _ in range(_MOST_ROUNDS):
        late, worth = _rank(request, admission, best)
        least = (late, worth - margin)
        found = None
        for kept in _fewer(admission.admitted):
            option = replace(
                admission,
                admitted=kept,
                cap_params=cap_of(min(peer.memory_bytes for peer in kept)),
            )
            option_drafts = drafts_of(request, option)
            draft = chosen_of(request, option, option_drafts)
            if draft is not None and _rank(request, option, draft) < least:
                least = _rank(request, option, draft)
                found = option, option_drafts, draft
        if found is None:
            break
        admission, drafts, best = found
    staying = set(admission.admitted)
    left_out = tuple(peer for peer in before.admitted if peer not in staying)
    if left_out:
        reason = _left_out_reason(request, before, with_all, admission, best, left_out)
        admission = replace(
            admission,
            left_out=(*before.left_out, *left_out),
            left_out_reasons=(*before.left_out_reasons, reason),
        )
    return admission, drafts, best


def check_deadline(
    request: PlanRequest, admission: Admission, drafts: Sequence[Draft], best: Draft
) -> None:
    """Raises UsageError if a given compute takes longer than the given time."""
    if request.compute_flop is None or request.seconds is None:
        return
    seconds = train_seconds(admission, best)
    if seconds <= request.seconds:
        return
    others = "".join(
        f", {duration(train_seconds(admission, draft))} under {_name(draft)}"
        for draft in drafts
        if draft is not best
    )
    flop = best.tokens_d * best.shape.flop_per_token() * request.seconds / seconds
    raise UsageError(
        f"{request.compute_flop:.3g} FLOP on this pool take {duration(seconds)} under "
        f"{_name(best)}{others}; the deadline is in {duration(request.seconds)}",
        allowed=f"by then the pool gives at most {flop:.3g} FLOP under {_name(best)}",
        remedy="drop --flop (the deadline then decides), or the deadline, allow another "
        "--strategy, or add peers or faster links",
    )


def _name(draft: Draft) -> str:
    return "sync" if draft.strategy is None else draft.strategy.name


def _rank(request: PlanRequest, admission: Admission | None, draft: Draft) -> tuple[bool, float]:
    """Least is best: (misses the deadline, ln of the loss or of the time per effective FLOP)."""
    if request.compute_flop is None or admission is None:
        return False, math.log(draft.loss_nats)
    seconds = train_seconds(admission, draft)
    kept = 1.0 if draft.strategy is None else draft.strategy.replica_ratio
    params_n = float(draft.shape.num_matmul_parameters)
    kept *= float(draft.law.efficiency(params_n, draft.effective_flop))
    spent = draft.tokens_d * draft.shape.flop_per_token()
    is_late = request.seconds is not None and seconds > request.seconds
    return is_late, math.log(seconds / (spent * kept))


def _link(peer: PoolPeer) -> float:
    return min(peer.upload_bytes_per_second, peer.download_bytes_per_second)


def _fewer(peers: tuple[PoolPeer, ...]) -> Iterator[tuple[PoolPeer, ...]]:
    """`peers` without those of the slowest links, and without those of the least FLOP: the worst
    one, two, three, four, six, eight ... kinds, and all but the best kind.
    """
    if not all(peer.has_links for peer in peers):
        return
    for measure in (_link, lambda peer: peer.mean_flop_per_second):
        values = sorted({measure(peer) for peer in peers})
        steps = {len(values) - 1} | {base << power for base in (2, 3) for power in range(17)} | {1}
        for step in sorted(steps):
            if 0 < step < len(values):
                yield tuple(peer for peer in peers if measure(peer) >= values[step])


def _left_out_reason(
    request: PlanRequest,
    before: Admission,
    with_all: Draft,
    after: Admission,
    without: Draft,
    left_out: Sequence[PoolPeer],
) -> str:
    speeds = [peer.mean_flop_per_second for peer in left_out]
    share = sum(speeds) / sum(peer.mean_flop_per_second for peer in before.admitted)
    slowest, fastest = (pick(_link(peer) for peer in left_out) / _MBIT_BYTES for pick in (min, max))
    links = f"a link of {slowest:.3g} Mbit/s"
    if fastest > slowest:
        links = f"links of {slowest:.3g} to {fastest:.3g} Mbit/s"

    def result(admission: Admission, draft: Draft) -> str:
        assert draft.strategy is not None, "peers are left out for their links"
        text = f"{draft.strategy.effective_ratio:.1%} of the FLOP count under {draft.strategy.name}"
        if draft.loss_nats <= math.log(request.vocab_size):
            text += f", loss {draft.loss_nats:.3f} nats"
        if request.compute_flop is not None:
            text += f", {duration(train_seconds(admission, draft))}"
        return text

    them, bring = ("them", "they bring") if left_out[1:] else ("it", "it brings")
    return (
        f"leave out {names_of(left_out)}: {bring} {share:.1%} of the FLOP over {links}; with "
        f"{them} {result(before, with_all)}; without {result(after, without)}"
    )
