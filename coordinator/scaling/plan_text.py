"""A plan's sentences: each choice with the numbers that decided it, and what to be wary of."""

import math
from dataclasses import replace

from coordinator.scaling.links import AIM_UTILISATION, StrategyChoice
from coordinator.scaling.plan_law import opinions
from coordinator.scaling.plan_types import Choice, Plan, PlanRequest
from coordinator.scaling.pool import DAY_SECONDS
from coordinator.scaling.recipe import outer_settings
from coordinator.scaling.sizing import NEAR_OPTIMAL_EFFICIENCY, PRACTICAL_DATA_PASSES

FEWEST_STEPS = 100
"""Below, a warm-up and a decay have no room."""
FREE_DATA_PASSES = 4
"""Up to so many passes a repeated token is worth nearly a fresh one."""


def describe(plan: Plan, *, request: PlanRequest, compute_reason: str, first_warning: str) -> Plan:
    """The plan with its choices and warnings filled in."""
    choices = [
        *_compute_choices(plan, request, compute_reason),
        *_size_choices(plan, request),
        *_recipe_choices(plan),
        *_swarm_choices(plan, request),
        *_outcome_choices(plan, request),
    ]
    warnings = [first_warning, *request.law.warnings, *_warnings(plan, request)]
    return replace(plan, choices=tuple(choices), warnings=tuple(w for w in warnings if w))


def count(value: float) -> str:
    """A big number for people: 1.23 B."""
    for unit, factor in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= factor:
            return f"{value / factor:.4g} {unit}"
    return f"{value:.4g}"


def size(num_bytes: float) -> str:
    """Bytes for people."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.3g} {unit}"
    return f"{num_bytes:.0f} B"


def duration(seconds: float) -> str:
    """Time for people."""
    for unit, factor in (("days", DAY_SECONDS), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 1.5 * factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds:.3g} s"


def _compute_choices(plan: Plan, request: PlanRequest, compute_reason: str) -> list[Choice]:
    found = [Choice(name="compute", value=f"{plan.compute_flop:.4g} FLOP", reason=compute_reason)]
    if plan.admission is not None:
        total = len(plan.admission.admitted) + len(plan.admission.left_out)
        value = f"{len(plan.admission.admitted)} of {total} peer{'s' if total > 1 else ''}"
        found.append(Choice(name="admitted", value=value, reason=plan.admission.reason))
    optimum = plan.law_optimum
    growth = f"ten times the compute: N x{plan.growth_params_ratio:.1f}"
    growth += f", D x{plan.growth_tokens_ratio:.1f}"
    value = f"N = {count(optimum.params_n)}, D = {count(optimum.tokens_d)}"
    reason = f"{plan.law_name} ({plan.law_source}) at {plan.effective_flop:.4g} FLOP; {growth}"
    found.append(Choice(name="law's optimum", value=value, reason=reason))
    if request.law.fit_reasons:
        fit = "; ".join(request.law.fit_reasons)
        found.append(Choice(name="fit", value=request.law.name, reason=fit))
    found.append(_certainty(plan, request))
    return found


def _certainty(plan: Plan, request: PlanRequest) -> Choice:
    """How sure N_opt is: the fit's own interval, or what the published laws make of it."""
    if request.law.params_interval_at is not None:
        low, high = request.law.params_interval_at(plan.effective_flop)
        reason = "95 % interval of the best N by bootstrap of your runs"
    else:
        params = opinions(plan.effective_flop)
        low, high = min(params.values()), max(params.values())
        reason = "the best N by published laws: "
        reason += ", ".join(f"{name} {count(n)}" for name, n in params.items())
    value = f"{count(low)} to {count(high)}"
    return Choice(name="certainty of N", value=value, reason=reason)


def _size_choices(plan: Plan, request: PlanRequest) -> list[Choice]:
    low, high = plan.near_optimal_params_n
    wide_low, wide_high = plan.near_optimal_params_n_90
    shape = plan.shape
    tied = "tied" if shape.has_tied_embeddings else "untied"
    moving = [cap.name for cap in plan.caps if cap.is_binding and cap.name != "shape"]
    aside = f"; {' and '.join(moving)} left aside, which may move N out of it" if moving else ""
    found = [
        Choice(
            name="near-optimal N",
            value=f"{count(low)} to {count(high)}",
            reason=f"every N between keeps {NEAR_OPTIMAL_EFFICIENCY:.0%} of the compute "
            f"({count(wide_low)} to {count(wide_high)} keep 90 %); the lower half is cheaper to "
            f"average, to hold and to serve{aside}",
        )
    ]
    for cap in plan.caps:
        if cap.name in ("memory", "shape"):
            continue
        found.append(
            Choice(
                name=cap.name,
                value=f"N = {count(cap.params_n)}",
                reason=f"{cap.reason}; alone it keeps {cap.efficiency_ratio:.1%} of the compute"
                + (f", {cap.regret_nats:.4f} nats" if plan.is_loss_known else ""),
            )
        )
    given = "N was given; " if request.params_n is not None else ""
    found.append(
        Choice(
            name="model",
            value=f"N = {count(plan.params_n)} ({count(plan.num_parameters)} with embeddings)",
            reason=f"{given}{shape.num_layers} layers, width {shape.d_model}, {shape.num_heads} "
            f"heads of {shape.head_dim} on {shape.num_kv_heads} key/value heads, MLP {shape.d_ff}, "
            f"vocabulary {shape.vocab_size:,} ({tied}), context {shape.seq_len:,}: keeps "
            f"{plan.efficiency_ratio:.1%} of the compute against the law's optimum",
        )
    )
    passes = f", {plan.data_passes:.3g} passes" if plan.data_passes else ""
    found.append(
        Choice(
            name="tokens",
            value=f"{plan.tokens_d:,}{passes}",
            reason=f"{plan.spent_flop:.4g} FLOP / {plan.flop_per_token:.4g} FLOP per token (with "
            f"attention; plain 6 N D = {plan.plain_flop:.4g}), "
            f"{plan.tokens_d / plan.params_n:.3g} tokens per parameter",
        )
    )
    return found


def _recipe_choices(plan: Plan) -> list[Choice]:
    recipe = plan.recipe
    fewest, most = plan.micro_steps
    micro = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    return [
        Choice(
            name="global batch",
            value=f"{recipe.global_batch_tokens:,} tokens",
            reason=recipe.batch_reason,
        ),
        Choice(
            name="micro-steps",
            value=f"{micro} of {plan.micro_batch_sequences} windows",
            reason="each peer's share of the batch by its speed, in micro-batches that fit the "
            "weakest admitted memory beside the model",
        ),
        Choice(name="learning rate", value=f"{recipe.peak_lr:.3g}", reason=recipe.lr_reason),
        Choice(
            name="weight decay",
            value=f"{recipe.weight_decay:.3g}",
            reason=recipe.weight_decay_reason,
        ),
        Choice(name="steps", value=f"{recipe.steps:,}", reason=recipe.steps_reason),
    ]


def _swarm_choices(plan: Plan, request: PlanRequest) -> list[Choice]:
    if plan.admission is None:
        reason = "no pool was given, so no link decides; pass --pool to choose"
        return [Choice(name="strategy", value="sync", reason=reason)]
    chosen = plan.strategy
    if chosen is None:
        reason = (
            "the peers' links have not been measured (a peer measures them in its rounds), so "
            "nothing can be predicted of averaging"
        )
        return [Choice(name="strategy", value="sync", reason=reason)]
    value = chosen.name
    if chosen.name == "diloco":
        value += f", H = {chosen.inner_steps_per_outer}, {chosen.num_fragments} fragments"
    value += f", {chosen.codec}"
    found = [Choice(name="strategy", value=value, reason=_strategy_reason(plan, request, chosen))]
    if chosen.name == "diloco":
        reason = f"every peer is a replica; {chosen.num_replicas} of them keep "
        reason += (
            f"{chosen.replica_ratio:.0%} of the compute's worth, C M^-0.17; each holds 8 more "
        )
        reason += "bytes per parameter (anchor, outer momentum), which can lie in host memory"
        found.append(Choice(name="replicas", value=str(chosen.num_replicas), reason=reason))
        outer_lr, momentum, reason = outer_settings(
            chosen.num_replicas, plan.recipe.steps / chosen.inner_steps_per_outer
        )
        value = f"rate {outer_lr:g}, momentum {momentum:g}"
        found.append(Choice(name="outer step", value=value, reason=reason))
    else:
        reason = "sync makes one large data-parallel replica of all peers: no replica penalty"
        if plan.admission.admitted[1:] == ():
            reason = "one peer is one replica"
        found.append(Choice(name="replicas", value="1", reason=reason))
    if plan.merge is not None:
        value = f"{plan.merge.num_replicas} replicas after merging"
        found.append(Choice(name="close peers", value=value, reason=plan.merge.reason))
    return found


def _strategy_reason(plan: Plan, request: PlanRequest, chosen: StrategyChoice) -> str:
    reason = f"{chosen.reason}; {chosen.effective_ratio:.1%} of the FLOP count"
    for other in plan.strategies:
        if other.name == chosen.name:
            continue
        verdict = f"{other.effective_ratio:.1%}"
        if other.name not in request.strategies:
            verdict += " (not allowed here: --strategy, or this version cannot run it)"
        reason += f". Against it, {verdict}: {other.reason}"
    return reason


def _outcome_choices(plan: Plan, request: PlanRequest) -> list[Choice]:
    found = [_loss_choice(plan, request)]
    if plan.memorised_ratio:
        found.append(
            Choice(
                name="memory of text",
                value=f"{plan.memorised_ratio:.2g}",
                reason=f"3.6 bits x N over the bits of the text, U L / ln 2: the model "
                f"{'CAN' if plan.memorised_ratio > 1 else 'cannot'} hold the corpus by heart "
                f"({request.unique_tokens / plan.params_n:.3g} unique tokens per parameter)",
            )
        )
    if plan.wire_bytes_per_peer is not None:
        assert plan.strategy is not None, "wire bytes come from a strategy"
        every = plan.strategy.inner_steps_per_outer / plan.strategy.num_fragments
        reason = (
            f"{plan.recipe.steps:,} steps, a round of {size(plan.strategy.round_wire_bytes)} each "
            f"way every {'step' if every == 1 else f'{every:g} steps'}"
        )
        if not plan.strategy.round_wire_bytes:
            reason = "one peer has nobody to average with"
        value = f"{size(plan.wire_bytes_per_peer)} sent, as much received"
        found.append(Choice(name="wire per peer", value=value, reason=reason))
    if plan.calendar_seconds is not None:
        assert plan.calendar_low_seconds is not None and plan.calendar_high_seconds is not None
        found.append(
            Choice(
                name="time",
                value=duration(plan.calendar_seconds),
                reason=f"{plan.spent_flop:.4g} FLOP at the admitted peers' mean speed while "
                f"computing; 90 %: {duration(plan.calendar_low_seconds)} to "
                f"{duration(plan.calendar_high_seconds)}",
            )
        )
    elif request.seconds is not None:
        rate = plan.compute_flop / request.seconds
        reason = f"{plan.compute_flop:.4g} FLOP within {duration(request.seconds)}"
        found.append(Choice(name="needed speed", value=f"{rate:.3g} FLOP/s", reason=reason))
    return found


def _loss_choice(plan: Plan, request: PlanRequest) -> Choice:
    if not plan.is_loss_known:
        return Choice(
            name="loss",
            value="not known",
            reason="the law would say more than ln of the vocabulary, "
            f"{math.log(request.vocab_size):.3f} nats, which guessing reaches: it does not hold "
            "for so few parameters and tokens",
        )
    return Choice(
        name="loss",
        value=f"{plan.loss_nats:.3f} nats ({plan.loss_low_nats:.3f} to {plan.loss_high_nats:.3f})",
        reason=f"per token, 90 % band; the law's floor is {plan.floor_nats:.3f}; "
        f"{request.law.band_reason}",
    )


def _warnings(plan: Plan, request: PlanRequest) -> list[str]:
    found = []
    if not plan.is_loss_known:
        found.append(
            "no loss is predicted: the law does not hold for so few parameters and tokens, and N "
            "and D are rules of thumb; measure small runs (study create) and pass --observations"
        )
    if plan.spent_flop < request.law.smallest_flop <= plan.compute_flop:
        found.append(
            f"only {plan.spent_flop:.3g} FLOP are spent, less than the smallest compute that law "
            f"{request.law.name!r} was measured at, {request.law.smallest_flop:.3g}"
        )
    if plan.recipe.steps < FEWEST_STEPS:
        found.append(
            f"{plan.recipe.steps} optimizer steps: rules for batch, learning rate and weight decay "
            f"were made for {FEWEST_STEPS} and more"
        )
    if plan.memorised_ratio > 1:
        found.append(
            f"{plan.memorised_ratio:.2g} times the bits of the text fit into the model: it can "
            "learn the corpus by heart; get more text or a smaller model"
        )
    if plan.data_passes > FREE_DATA_PASSES:
        found.append(
            f"{plan.data_passes:.3g} passes over the text: {FREE_DATA_PASSES} are nearly free, "
            f"{PRACTICAL_DATA_PASSES} the practical end"
        )
    chosen = plan.strategy
    if chosen is not None and chosen.utilisation_ratio < AIM_UTILISATION:
        found.append(
            f"links leave {chosen.utilisation_ratio:.1%} of the time for computing under "
            f"{chosen.name}, below the aim of {AIM_UTILISATION:.0%}: {_aim_advice(plan, chosen)}"
        )
    is_wished = bool(request.serve_tokens) or not math.isinf(request.unique_tokens)
    if plan.efficiency_ratio < NEAR_OPTIMAL_EFFICIENCY and not is_wished:
        found.append(
            f"N = {count(plan.params_n)} keeps only {plan.efficiency_ratio:.0%} of the compute"
        )
    return found


def _aim_advice(plan: Plan, chosen: StrategyChoice) -> str:
    reaching = [one for one in plan.strategies if one.utilisation_ratio >= AIM_UTILISATION]
    if not reaching:
        return "no strategy, H, fragments or codec reaches it on these links"
    other = reaching[0]
    said = f"{other.name} would reach {other.utilisation_ratio:.1%}"
    if other.effective_ratio < chosen.effective_ratio:
        said += f", but with its replicas only {other.effective_ratio:.1%} of the FLOP would count"
    return said
