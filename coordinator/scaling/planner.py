"""From a pool, a law and wishes to one plan: N, D, batch, strategy, time, each with its reason.

Order: compute (pool x availability, or as given) -> admission (whose memory caps the model) ->
strategy and size together, because the model's size decides what averaging costs, which decides the
compute, which decides the size: repeated until nothing changes -> admission again (whose link costs
more than it brings) -> recipe -> loss with its band -> what each cap costs. Pure: time, files and
the running coordinator are the caller's.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

from coordinator.scaling.admission import Admission, plan_admission, settled
from coordinator.scaling.constants import COMPUTE_WORTH, NUMBERS
from coordinator.scaling.extrapolation import check_extrapolation
from coordinator.scaling.laws import LossLaw
from coordinator.scaling.links import (
    StrategyChoice,
    merge_advice,
    plan_diloco,
    plan_sync,
)
from coordinator.scaling.plan_caps import Z_90, loss_band, plan_caps
from coordinator.scaling.plan_choice import (
    admit_by_links,
    check_deadline,
    chosen_of,
    train_seconds,
)
from coordinator.scaling.plan_text import describe
from coordinator.scaling.plan_types import Draft, Plan, PlanRequest
from coordinator.scaling.pool import ComputeEstimate, PoolPeer, estimate_compute
from coordinator.scaling.recipe import Recipe, mu_transfer, plan_recipe
from coordinator.scaling.shapes import USABLE_MEMORY_RATIO, MemoryRule, choose_shape, largest_params
from coordinator.scaling.sizing import (
    PRACTICAL_DATA_PASSES,
    Demand,
    best_size,
    memorised_ratio,
    near_optimal_interval,
    repeated_loss_nats,
    tokens_to_serve,
)
from protos.contract.errors import UsageError
from protos.contract.model_shape import ModelShape

_MAX_REPEATS = 12
_SETTLED_RATIO = 1e-3
_REPLICAS = COMPUTE_WORTH["replicas"].law
_MOST_MICRO_SEQUENCES = 64
_BIG_STEP = 0.1
"""Of N; ordinary shapes of millions of parameters lie closer together."""


def plan(request: PlanRequest) -> Plan:
    """The plan. Raises UsageError for what cannot be planned: contradictions, too little memory,
    extrapolation beyond x1000 that nobody forced.
    """
    _check_text(request)
    all_peers = () if request.pool is None else request.pool.peers
    warning = check_extrapolation(
        _compute(request, all_peers, utilisation_ratio=1.0).compute_flop,
        request.law.measured_flop,
        law=f"law {request.law.name!r}",
        is_forced=request.is_extrapolation_forced,
    )
    cap_of = _cap_of(request)
    admission = _admit(request, cap_of)
    drafts = _drafts(request, admission)
    best = chosen_of(request, admission, drafts)
    if best is None:
        raise UsageError(
            f"strategy {', '.join(request.strategies)} without peers whose links are known",
            allowed="--pool with two or more peers and their links",
            remedy="pass --pool, or --strategy sync",
        )
    if admission is not None:
        admission, drafts, best = admit_by_links(
            request, admission, drafts, best, drafts_of=_drafts, cap_of=cap_of
        )
        check_deadline(request, admission, drafts, best)
        admission = settled(admission, law=best.law, compute_flop=best.effective_flop)
    return _complete(request, admission, best, drafts, warning)


def _drafts(request: PlanRequest, admission: Admission | None) -> tuple[Draft, ...]:
    """One draft of every strategy that the peers' links allow to predict; else one without."""
    peers = () if admission is None else admission.admitted
    if not peers or not all(peer.has_links for peer in peers):
        return (_draft(request, admission, ""),)
    names = ("sync", "diloco") if peers[1:] else ("sync",)
    return tuple(_draft(request, admission, name) for name in names)


def _check_text(request: PlanRequest) -> None:
    if request.unique_tokens < request.seq_len:
        raise UsageError(
            f"{request.unique_tokens:,.0f} unique tokens for windows of {request.seq_len:,}",
            allowed="at least one window of different text; a law speaks of millions of tokens",
            remedy="get more text, or lower --seq-len",
        )


def _check_step(draft: Draft) -> None:
    batch_tokens = draft.recipe.global_batch_tokens
    if batch_tokens > draft.tokens_d:
        raise UsageError(
            f"a plan of {draft.tokens_d:,} tokens and a global batch of {batch_tokens:,}",
            allowed="at least one step",
            remedy="more compute or text, fewer peers, or a lower --seq-len",
        )


def _cap_of(request: PlanRequest) -> Callable[[float], float]:
    """N of the largest shape that a memory trains, bytes -> N."""
    rule = MemoryRule(bytes_per_parameter=request.bytes_per_parameter)

    @lru_cache(maxsize=64)
    def cap_of(memory_bytes: float) -> float:
        return float(
            largest_params(
                memory_bytes, rule, vocab_size=request.vocab_size, seq_len=request.seq_len
            )
        )

    return cap_of


def _admit(request: PlanRequest, cap_of: Callable[[float], float]) -> Admission | None:
    if request.pool is None:
        return None
    return plan_admission(
        request.pool.peers,
        law_at=request.law.at,
        compute_flop=_compute(request, request.pool.peers, utilisation_ratio=1.0).compute_flop,
        cap_of=cap_of,
    )


def _compute(
    request: PlanRequest, peers: tuple[PoolPeer, ...], *, utilisation_ratio: float
) -> ComputeEstimate:
    """Given compute, or what the admitted peers give in the given time, or what N or I ask for."""
    if request.compute_flop is not None:
        return ComputeEstimate(
            compute_flop=request.compute_flop,
            compute_log_std=request.compute_log_std or 0.0,
            reason=request.compute_reason or f"{request.compute_flop:.4g} FLOP as asked",
        )
    if request.pool is not None:
        assert request.seconds is not None, "a pool comes with a horizon or with compute"
        return estimate_compute(
            replace(request.pool, peers=peers),
            seconds=request.seconds,
            utilisation_ratio=utilisation_ratio,
            log_std=request.compute_log_std,
        )
    assert request.params_n is not None, "a plan starts from a pool, compute or N"
    flop = request.law.compute_for_params(request.params_n)
    reason = f"N = {request.params_n:.4g} is compute-optimal at {flop:.4g} FLOP by law"
    if request.serve_tokens:
        tokens_d = tokens_to_serve(request.law.at(flop), request.params_n, request.serve_tokens)
        flop = 6 * request.params_n * tokens_d
        reason = (
            f"{request.serve_tokens:.3g} tokens served by N = {request.params_n:.4g} pay for "
            f"training on {tokens_d:.4g} tokens, {flop:.4g} FLOP"
        )
    return ComputeEstimate(
        compute_flop=flop, compute_log_std=request.compute_log_std or 0.0, reason=reason
    )


def _draft(request: PlanRequest, admission: Admission | None, strategy_name: str) -> Draft:
    """Size and strategy that fit each other; without links ("") there is no strategy to fit.

    Repeated until the utilisation that a size was planned for is the one that it leads to. Should
    it swing between two shapes, one is held and the rest follows it.
    """
    utilisation, kept = 1.0, 1.0
    held: ModelShape | None = None
    for attempt in range(2 * _MAX_REPEATS):
        draft = _one_draft(request, admission, strategy_name, utilisation, kept, shape=held)
        chosen = draft.strategy
        if chosen is None:
            return draft
        is_settled = abs(chosen.utilisation_ratio - utilisation) < _SETTLED_RATIO
        if is_settled and chosen.replica_ratio == kept:
            break
        utilisation, kept = chosen.utilisation_ratio, chosen.replica_ratio
        if attempt >= _MAX_REPEATS:
            held = draft.shape
    return draft


def _one_draft(
    request: PlanRequest,
    admission: Admission | None,
    strategy_name: str,
    utilisation_ratio: float,
    replica_ratio: float,
    *,
    shape: ModelShape | None,
) -> Draft:
    peers = () if admission is None else admission.admitted
    compute = _compute(request, peers, utilisation_ratio=utilisation_ratio)
    effective_flop = compute.compute_flop * replica_ratio
    law = request.law.at(effective_flop)
    size = best_size(
        law,
        Demand(
            compute_flop=effective_flop,
            compute_log_std=compute.compute_log_std,
            serve_tokens=request.serve_tokens,
            unique_tokens=request.unique_tokens,
        ),
    )
    wanted = size.params_n if request.params_n is None else request.params_n
    cap = math.inf if admission is None else admission.cap_params
    if shape is None:
        shape = _shape(request, law, effective_flop, wanted=wanted, cap=cap)
    params_n = float(shape.num_matmul_parameters)
    tokens_d = int(compute.compute_flop / shape.flop_per_token())
    if not math.isinf(request.unique_tokens):
        tokens_d = min(tokens_d, int(PRACTICAL_DATA_PASSES * request.unique_tokens))
    tokens_d = max(request.seq_len, tokens_d // request.seq_len * request.seq_len)
    tuned_lr, tuned_reason = _tuned(request, shape)
    recipe = plan_recipe(
        params_n=params_n,
        tokens_d=float(tokens_d),
        compute_flop=float(tokens_d * shape.flop_per_token()),
        seq_len=request.seq_len,
        num_peers=max(len(peers), 1),
        num_replicas=len(peers) if strategy_name == "diloco" else 0,
        tuned_lr=tuned_lr,
        tuned_reason=tuned_reason,
    )
    strategy = None
    if strategy_name:
        strategy = _strategy(request, peers, strategy_name, shape, recipe)
        replica_ratio = strategy.replica_ratio
    loss = repeated_loss_nats(law, params_n, replica_ratio * tokens_d, request.unique_tokens)
    return Draft(
        compute=compute,
        effective_flop=effective_flop,
        law=law,
        size=size,
        shape=shape,
        tokens_d=tokens_d,
        recipe=recipe,
        strategy=strategy,
        loss_nats=loss,
    )


def _shape(
    request: PlanRequest, law: LossLaw, effective_flop: float, *, wanted: float, cap: float
) -> ModelShape:
    """The most ordinary shape not above the wanted N. Small shapes come in big steps: where it is a
    big one below, the next one above, if that promises less loss.
    """
    most = min(wanted, cap)
    is_given = request.params_n is not None

    def choose(params_n: float) -> ModelShape:
        return choose_shape(
            params_n,
            vocab_size=request.vocab_size,
            seq_len=request.seq_len,
            may_exceed=is_given,
        )

    def loss_nats(shape: ModelShape) -> float:
        tokens_d = effective_flop / shape.flop_per_token()
        tokens_d = min(tokens_d, PRACTICAL_DATA_PASSES * request.unique_tokens)
        params_n = float(shape.num_matmul_parameters)
        return repeated_loss_nats(law, params_n, tokens_d, request.unique_tokens)

    shape = choose(most)
    if is_given or request.serve_tokens or shape.num_matmul_parameters > (1 - _BIG_STEP) * most:
        return shape
    for factor in (1.1, 1.2, 1.35, 1.5):
        above = choose(min(factor * wanted, cap))
        if above.num_matmul_parameters > wanted:
            return min(shape, above, key=loss_nats)
    return shape


def _tuned(request: PlanRequest, shape: ModelShape) -> tuple[float | None, str]:
    if request.tuned_lr is None:
        return None, ""
    peak_lr = mu_transfer(request.tuned_lr, trial_width=request.tuned_width, width=shape.d_model)
    return peak_lr, (
        f"{request.tuned_lr:.3g} was best in a trial of width {request.tuned_width}; mu-style "
        f"transfer to width {shape.d_model} divides it by {shape.d_model / request.tuned_width:.3g}"
    )


def _strategy(
    request: PlanRequest,
    peers: tuple[PoolPeer, ...],
    name: str,
    shape: ModelShape,
    recipe: Recipe,
) -> StrategyChoice:
    speed = sum(peer.mean_flop_per_second for peer in peers)
    step_seconds = recipe.global_batch_tokens * shape.flop_per_token() / speed
    if name == "sync":
        return plan_sync(
            peers,
            num_values=shape.num_parameters,
            step_seconds=step_seconds,
            codecs=request.codecs,
        )
    return plan_diloco(
        peers,
        num_values=shape.num_parameters,
        step_seconds=step_seconds,
        codecs=request.codecs,
        rule=_REPLICAS,
        most_fragments=shape.num_layers,
    )


def _complete(
    request: PlanRequest,
    admission: Admission | None,
    draft: Draft,
    drafts: tuple[Draft, ...],
    warning: str,
) -> Plan:
    """Everything that follows from the chosen draft; losses are nan where the law does not hold."""
    _check_step(draft)
    most_nats = math.log(request.vocab_size)
    is_known = draft.loss_nats <= most_nats
    shape, law, recipe = draft.shape, draft.law, draft.recipe
    params_n, tokens_d = float(shape.num_matmul_parameters), draft.tokens_d
    optimum = law.optimum(draft.effective_flop)
    if not optimum.loss_nats <= most_nats:
        optimum = replace(optimum, loss_nats=math.nan)
    low, high = loss_band(request, draft) if is_known else (math.nan, math.nan)
    calendar = _calendar(request, admission, draft)
    micro_sequences, micro_steps = _micro(request, admission, draft)
    has_text = not math.isinf(request.unique_tokens)
    memorised = 0.0
    if has_text:
        bits = NUMBERS["memorised-bits-per-parameter"].law
        memorised = memorised_ratio(
            params_n,
            request.unique_tokens,
            min(draft.loss_nats, most_nats),
            bits_per_param=bits,
        )
    peers = () if admission is None else admission.admitted
    unfinished = Plan(
        law_name=request.law.name,
        law_source=request.law.source,
        compute_flop=draft.compute.compute_flop,
        compute_log_std=draft.compute.compute_log_std,
        effective_flop=draft.effective_flop,
        law_optimum=optimum,
        growth_params_ratio=request.law.growth.params_ratio,
        growth_tokens_ratio=request.law.growth.tokens_ratio,
        params_n=params_n,
        num_parameters=shape.num_parameters,
        shape=shape,
        tokens_d=tokens_d,
        data_passes=tokens_d / request.unique_tokens if has_text else 0.0,
        flop_per_token=shape.flop_per_token(),
        spent_flop=tokens_d * shape.flop_per_token(),
        plain_flop=6 * params_n * tokens_d,
        efficiency_ratio=float(law.efficiency(params_n, draft.effective_flop)),
        near_optimal_params_n=near_optimal_interval(law, draft.effective_flop),
        near_optimal_params_n_90=near_optimal_interval(
            law, draft.effective_flop, efficiency_ratio=0.9
        ),
        caps=plan_caps(request, admission, draft),
        loss_nats=draft.loss_nats if is_known else math.nan,
        loss_low_nats=low,
        loss_high_nats=min(high, most_nats) if is_known else math.nan,
        floor_nats=law.e_nats,
        memorised_ratio=memorised,
        recipe=recipe,
        lr_warmup_tokens=int(min(params_n, tokens_d / 20)),
        micro_batch_sequences=micro_sequences,
        micro_steps=micro_steps,
        admission=admission,
        strategy=draft.strategy,
        strategies=tuple(one.strategy for one in drafts if one.strategy is not None),
        merge=merge_advice(peers, _REPLICAS) if peers else None,
        wire_bytes_per_peer=_wire_bytes(draft),
        calendar_seconds=calendar[0],
        calendar_low_seconds=calendar[1],
        calendar_high_seconds=calendar[2],
        choices=(),
        warnings=(),
    )
    return describe(
        unfinished, request=request, compute_reason=draft.compute.reason, first_warning=warning
    )


def _calendar(
    request: PlanRequest, admission: Admission | None, draft: Draft
) -> tuple[float | None, float | None, float | None]:
    """Median, 5 % and 95 % of the time that the training takes."""
    if admission is None:
        return None, None, None
    utilisation = 1.0 if draft.strategy is None else draft.strategy.utilisation_ratio
    seconds = train_seconds(admission, draft)
    log_std = draft.compute.compute_log_std
    if request.compute_flop is not None and request.pool is not None:
        log_std = estimate_compute(
            replace(request.pool, peers=admission.admitted),
            seconds=seconds,
            utilisation_ratio=utilisation,
            log_std=request.compute_log_std,
        ).compute_log_std
    factor = math.exp(Z_90 * log_std)
    return seconds, seconds / factor, seconds * factor


def _micro(
    request: PlanRequest, admission: Admission | None, draft: Draft
) -> tuple[int, tuple[int, int]]:
    """Micro-batch that fits the weakest admitted memory, and (fewest, most) of them per step."""
    seq_len, shape = request.seq_len, draft.shape
    sequences = max(1, draft.recipe.global_batch_tokens // seq_len)
    if admission is None:
        shares = [sequences]
        memory = math.inf
    else:
        speed = sum(peer.flop_per_second for peer in admission.admitted)
        shares = [
            max(1, round(sequences * peer.flop_per_second / speed)) for peer in admission.admitted
        ]
        memory = min(peer.memory_bytes for peer in admission.admitted)
    micro = 1
    while micro * 2 <= min(_MOST_MICRO_SEQUENCES, max(shares)):
        rule = MemoryRule(
            bytes_per_parameter=request.bytes_per_parameter, micro_batch_sequences=micro * 2
        )
        if rule.needed_bytes(shape) > USABLE_MEMORY_RATIO * memory:
            break
        micro *= 2
    counts = [math.ceil(share / micro) for share in shares]
    return micro, (min(counts), max(counts))


def _wire_bytes(draft: Draft) -> float | None:
    """Bytes that each peer sends over the whole run."""
    chosen = draft.strategy
    if chosen is None:
        return None
    rounds = draft.recipe.steps / (chosen.inner_steps_per_outer / chosen.num_fragments)
    return math.ceil(rounds) * chosen.round_wire_bytes
