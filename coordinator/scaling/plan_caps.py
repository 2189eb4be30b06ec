"""What each cap and each wish costs, alone, against the law's optimum; and the band of the loss."""

import math

from coordinator.scaling.admission import Admission
from coordinator.scaling.laws import Optimum, RepetitionLaw
from coordinator.scaling.plan_types import Cap, Draft, PlanRequest
from coordinator.scaling.sizing import (
    PRACTICAL_DATA_PASSES,
    Demand,
    best_size,
    clairvoyant_regret_nats,
    repeated_loss_nats,
    serving_optimum,
)

Z_90 = 1.645
"""90 % of a normal lie within so many standard deviations."""


def loss_band(request: PlanRequest, draft: Draft) -> tuple[float, float]:
    """90 % band: the law's own error and the spread of the compute, in quadrature; not below the
    law's floor on account of the compute.
    """
    spread = Z_90 * draft.compute.compute_log_std
    params_n = float(draft.shape.num_matmul_parameters)
    kept = 1.0 if draft.strategy is None else draft.strategy.replica_ratio

    def loss(tokens_d: float) -> float:
        return repeated_loss_nats(draft.law, params_n, kept * tokens_d, request.unique_tokens)

    own = request.law.band_ratio_at(draft.effective_flop) * draft.loss_nats
    down = draft.loss_nats - loss(draft.tokens_d * math.exp(spread))
    up = loss(draft.tokens_d * math.exp(-spread)) - draft.loss_nats
    return draft.loss_nats - math.hypot(own, down), draft.loss_nats + math.hypot(own, up)


def plan_caps(request: PlanRequest, admission: Admission | None, draft: Draft) -> tuple[Cap, ...]:
    """Memory, uncertain compute, serving, text, shape: those that apply."""
    optimum = draft.law.optimum(draft.effective_flop)
    caps = []
    if admission is not None:
        held = min(optimum.params_n, admission.cap_params)
        is_binding = admission.cap_params < draft.size.params_n
        caps.append(_size_cap("memory", held, draft, admission.reason, is_binding=is_binding))
    if draft.compute.compute_log_std > 0:
        caps.append(_uncertainty_cap(draft, optimum))
    if request.serve_tokens > 0:
        caps.append(_serving_cap(request, draft, optimum))
    if not math.isinf(request.unique_tokens):
        caps.append(_text_cap(request, draft, optimum))
    shape = draft.shape
    reason = (
        f"{shape.num_layers} layers of width {shape.d_model}: the most ordinary shape that is not "
        "above the wanted N (or, where that is a big step below, the next one above if it promises "
        "less loss), because smaller is cheaper to average, to hold and to serve"
    )
    params_n = float(shape.num_matmul_parameters)
    caps.append(_size_cap("shape", params_n, draft, reason, is_binding=False))
    return tuple(caps)


def _size_cap(name: str, params_n: float, draft: Draft, reason: str, *, is_binding: bool) -> Cap:
    """Price of training `params_n` instead of the optimum with the same compute."""
    law, flop = draft.law, draft.effective_flop
    loss = float(law.loss_nats(params_n, flop / (6 * params_n)))
    return Cap(
        name=name,
        is_binding=is_binding,
        params_n=params_n,
        efficiency_ratio=float(law.efficiency(params_n, flop)),
        regret_nats=max(0.0, loss - law.optimum(flop).loss_nats),
        reason=reason,
    )


def _uncertainty_cap(draft: Draft, optimum: Optimum) -> Cap:
    law, std = draft.law, draft.compute.compute_log_std
    sized = best_size(law, Demand(compute_flop=draft.effective_flop, compute_log_std=std))
    factor = sized.params_n / optimum.params_n
    regret = clairvoyant_regret_nats(law, factor * optimum.params_n, draft.effective_flop, std)
    reason = (
        f"s = {std:.2f} moves the N of least expected loss by x{factor:.3f}; "
        f"somebody who knew the compute would do {regret:.4f} nats better on average"
    )
    moved = _size_cap(
        "uncertain compute", factor * optimum.params_n, draft, reason, is_binding=True
    )
    return Cap(
        name=moved.name,
        is_binding=True,
        params_n=moved.params_n,
        efficiency_ratio=moved.efficiency_ratio,
        regret_nats=regret,
        reason=reason,
    )


def _serving_cap(request: PlanRequest, draft: Draft, optimum: Optimum) -> Cap:
    law, flop, serve = draft.law, draft.effective_flop, request.serve_tokens
    alone = best_size(law, Demand(compute_flop=flop, serve_tokens=serve))
    same, total = serving_optimum(law, optimum.loss_nats, serve)
    before = flop + 2 * optimum.params_n * serve
    reason = (
        f"{serve:.3g} tokens to be served (2 N FLOP each) move N by x"
        f"{alone.params_n / optimum.params_n:.2f} at this training compute; for the loss of the "
        f"compute-optimal model N x{same.params_n / optimum.params_n:.2f} on D x"
        f"{same.tokens_d / optimum.tokens_d:.2f} would change training and serving together by "
        f"{total / before - 1:+.0%}"
    )
    return _size_cap("serving", alone.params_n, draft, reason, is_binding=True)


def _text_cap(request: PlanRequest, draft: Draft, optimum: Optimum) -> Cap:
    law, flop, unique = draft.law, draft.effective_flop, request.unique_tokens
    alone = best_size(law, Demand(compute_flop=flop, unique_tokens=unique))
    repetition = RepetitionLaw(law=law)
    loss = float(repetition.loss_nats(alone.params_n, alone.tokens_d, unique))
    is_limit = alone.spent_flop < 0.999 * flop
    passes = (draft.tokens_d if is_limit else alone.tokens_d) / unique
    worth = float(repetition.mean_token_worth(max(passes, 1.0)))
    reason = (
        f"{request.text_reason or f'{unique:.4g} unique tokens'}: {passes:.3g} passes, in which a "
        f"token is worth {worth:.2f} of a fresh one on average (Muennighoff's law)"
    )
    if is_limit:
        spent = draft.tokens_d * draft.shape.flop_per_token()
        reason += (
            f"; beyond {PRACTICAL_DATA_PASSES} passes more compute buys nearly nothing: "
            f"{spent:.4g} of the {draft.compute.compute_flop:.4g} FLOP are spent, text is the limit"
        )
    return Cap(
        name="unique tokens",
        is_binding=passes > 1,
        params_n=alone.params_n,
        efficiency_ratio=min(1.0, float(law.compute_for_loss(loss)) / flop),
        regret_nats=max(0.0, loss - optimum.loss_nats),
        reason=reason,
    )
