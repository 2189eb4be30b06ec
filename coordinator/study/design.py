"""Which small runs a study makes, in which order, and who should do which.

Every trial has a constant learning rate, so each point of its curve counts as a run of that length
(Haegele 2024, 2405.18392), and one run per size gives a slice at every compute below the largest.
Order: learning rates at two widths first (the best one for all sizes), then the sizes, each to the
same compute, then some of them again with another seed by another peer, which measures the noise.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum

from protos.contract.errors import UsageError
from protos.contract.model_shape import ModelShape
from protos.contract.run_spec import (
    DataSpec,
    ModelSpec,
    OptimizerSpec,
    RunSpec,
    ScheduleSpec,
    StrategySpec,
)

MIN_SIZES = 3
MAX_SIZES = 32
_LR_SHARE = 0.125
"""A learning-rate trial takes this share of a size trial's compute."""
_SLICES_PER_DOUBLING = 2
_NUM_SLICES = 12
_MIN_STEPS = 60
"""Points before so many steps are still in the warm-up."""
_CUT_RATIO = 1.1
"""Whole batches alone make less of a difference to a trial's compute."""
_HEAD_DIM = 8
_MOST_LAYERS = 6


class StudyStage(StrEnum):
    """Where a study stands."""

    RATES = "RATES"
    SIZES = "SIZES"
    DONE = "DONE"
    FAILED = "FAILED"


class Purpose(StrEnum):
    """What a trial is for."""

    RATE = "RATE"
    SIZE = "SIZE"
    REPEAT = "REPEAT"


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyDesign:
    """What the operator asked for, with everything filled in."""

    dataset_id: str
    vocab_size: int
    num_sizes: int = 8
    min_params: float = 8e3
    max_params: float = 2.5e5
    flop: float = 1e12
    """Compute of each size trial."""
    max_tokens: int = 4_000_000
    """Most tokens of a trial, whatever its compute."""
    learning_rates: tuple[float, ...] = (5e-3,)
    """One: used as it is. Several: tried at two widths first."""
    num_repeats: int = 2
    seq_len: int = 128
    batch_tokens: int = 1_024
    warmup_steps: int = 60
    heldout_tokens: int = 32_768
    seed: int = 0

    def __post_init__(self) -> None:
        checks = (
            ("sizes", self.num_sizes, MIN_SIZES <= self.num_sizes <= MAX_SIZES,
             f"{MIN_SIZES} to {MAX_SIZES}"),
            ("min-params", self.min_params, 1e3 <= self.min_params < self.max_params,
             "at least 1,000 and below --max-params"),
            ("max-params", self.max_params, self.max_params <= 1e10, "at most 1e10"),
            ("flop", self.flop, 1e6 <= self.flop <= 1e22, "1e6 to 1e22"),
            ("max-tokens", self.max_tokens, self.max_tokens >= self.batch_tokens,
             "at least one batch"),
            ("lr", list(self.learning_rates),
             0 < len(self.learning_rates) <= 16
             and all(0 < rate < 1 for rate in self.learning_rates)
             and len(set(self.learning_rates)) == len(self.learning_rates),
             "1 to 16 different rates in 0 to 1"),
            ("repeats", self.num_repeats, 0 <= self.num_repeats <= self.num_sizes,
             "0 to the number of sizes"),
            ("seq-len", self.seq_len, 16 <= self.seq_len <= 8_192, "16 to 8192"),
            ("batch-tokens", self.batch_tokens,
             self.batch_tokens >= self.seq_len and self.batch_tokens % max(self.seq_len, 1) == 0,
             f"a multiple of --seq-len {self.seq_len}"),
            ("warmup-steps", self.warmup_steps, 0 <= self.warmup_steps <= 10_000, "0 to 10000"),
            ("heldout-tokens", self.heldout_tokens, self.heldout_tokens >= 1, "at least 1"),
        )  # fmt: skip
        for name, value, is_good, allowed in checks:
            if not is_good:
                raise UsageError(f"--{name} {value}", allowed=allowed, remedy=f"correct --{name}")

    @property
    def least_steps(self) -> int:
        """Points before so many steps are still in the warm-up."""
        return max(_MIN_STEPS, self.warmup_steps)

    def to_json(self) -> str:
        """Stored form."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "StudyDesign":
        """The inverse."""
        plain = json.loads(text)
        return cls(**plain | {"learning_rates": tuple(plain["learning_rates"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialPlan:
    """One trial as it is handed out."""

    purpose: Purpose
    spec: RunSpec
    mark_tokens: tuple[int, ...]
    original_number: int = -1
    """Of a repeat: the trial that it repeats."""

    @property
    def shape(self) -> ModelShape:
        """What is trained."""
        return ModelShape.from_spec(self.spec.model)

    @property
    def flop(self) -> float:
        """Compute of the whole trial."""
        return self.shape.flop_per_token() * self.spec.budget_tokens

    def to_json(self) -> str:
        """Stored form; the spec is in its wire form."""
        return json.dumps(
            {
                "spec": self.spec.to_wire().decode(),
                "mark_tokens": list(self.mark_tokens),
                "flop_per_token": self.shape.flop_per_token(),
                "original_number": self.original_number,
            },
            sort_keys=True,
        )


def tiny_model(params_n: float, *, vocab_size: int, seq_len: int) -> ModelSpec:
    """The decoder whose matrices and head are nearest to `params_n`: width over depth near 24,
    SwiGLU of 8/3 the width, an untied head.
    """
    best: tuple[float, ModelSpec] | None = None
    for num_layers in range(1, _MOST_LAYERS + 1):
        d_model = _HEAD_DIM
        while True:
            model = ModelSpec(
                vocab_size=vocab_size,
                d_model=d_model,
                num_layers=num_layers,
                num_heads=d_model // _HEAD_DIM,
                num_kv_heads=d_model // _HEAD_DIM,
                head_dim=_HEAD_DIM,
                d_ff=max(8, round(8 * d_model / 3 / 8) * 8),
                seq_len=seq_len,
                has_tied_embeddings=False,
            )
            found = ModelShape.from_spec(model).num_matmul_parameters
            off = abs(math.log(found / params_n)) * 10
            off += abs(math.log(d_model / num_layers / 24))
            if best is None or off < best[0]:
                best = (off, model)
            if found > params_n:
                break
            d_model += _HEAD_DIM
    assert best is not None
    return best[1]


def sizes_of(design: StudyDesign) -> list[ModelSpec]:
    """Models of the sweep, smallest first, evenly spaced in ln N. Raises UsageError where the
    vocabulary leaves fewer than three different ones.
    """
    low, high = math.log(design.min_params), math.log(design.max_params)
    found: dict[int, ModelSpec] = {}
    for index in range(design.num_sizes):
        wanted = math.exp(low + (high - low) * index / (design.num_sizes - 1))
        model = tiny_model(wanted, vocab_size=design.vocab_size, seq_len=design.seq_len)
        found.setdefault(ModelShape.from_spec(model).num_matmul_parameters, model)
    if len(found) < MIN_SIZES:
        raise UsageError(
            f"{len(found)} different sizes between {design.min_params:g} and "
            f"{design.max_params:g} parameters with {design.vocab_size} token ids",
            allowed=f"at least {MIN_SIZES}",
            remedy="raise --max-params, or build the corpus with a smaller --vocab-size",
        )
    return [found[size] for size in sorted(found)]


def first_stage(design: StudyDesign) -> tuple[StudyStage, list[TrialPlan]]:
    """What a new study begins with."""
    models = sizes_of(design)
    _check_compute(design, models)
    if len(design.learning_rates) == 1:
        return StudyStage.SIZES, size_plans(design, design.learning_rates[0])
    chosen = (models[len(models) // 4], models[3 * len(models) // 4])
    return StudyStage.RATES, [
        _plan(design, model, rate, Purpose.RATE, flop=_LR_SHARE * design.flop, seed=design.seed)
        for model in chosen
        for rate in design.learning_rates
    ]


def _check_compute(design: StudyDesign, models: Sequence[ModelSpec]) -> None:
    """Raises UsageError where a size would be measured nowhere after its warm-up, or would reach no
    compute that the others share before --max-tokens.
    """
    per_token = [ModelShape.from_spec(model).flop_per_token() for model in models]
    least = max(per_token) * design.least_steps * design.batch_tokens
    top = min(per_token) * (design.max_tokens // design.batch_tokens) * design.batch_tokens
    most = top * 2.0 ** ((_NUM_SLICES - 1) / _SLICES_PER_DOUBLING)
    if least <= design.flop <= most:
        return
    steps = design.flop / max(per_token) / design.batch_tokens
    raise UsageError(
        f"--flop {design.flop:g}: the largest model would train {steps:.3g} steps"
        if design.flop < least
        else f"--flop {design.flop:g}: --max-tokens {design.max_tokens:,} ends the smallest model "
        f"at {top:.3g} FLOP",
        allowed=f"{least:.3g} to {most:.3g} FLOP for these sizes: at least {design.least_steps} "
        "steps of each size, and a compute that all sizes reach"
        if least <= most
        else f"a --max-tokens above {design.least_steps * design.batch_tokens:,} and sizes that "
        "reach one compute with it",
        remedy="choose such a --flop, other --min-params and --max-params, or another --max-tokens "
        "or --batch-tokens",
    )


def uneven_reason(design: StudyDesign, plans: Sequence[TrialPlan]) -> str:
    """Which sizes --max-tokens ends before --flop; "" if none."""
    cut = [
        plan for plan in plans
        if plan.purpose is Purpose.SIZE and plan.flop < design.flop / _CUT_RATIO
    ]  # fmt: skip
    if not cut:
        return ""
    flops = [plan.flop for plan in cut]
    return (
        f"{len(cut)} sizes end at --max-tokens {design.max_tokens:,}, after {min(flops):.3g} to "
        f"{max(flops):.3g} FLOP instead of {design.flop:.3g}"
    )


def size_plans(design: StudyDesign, learning_rate: float) -> list[TrialPlan]:
    """The sizes, then the repeats: evenly spread over the sizes, with another seed."""
    models = sizes_of(design)
    plans = [
        _plan(design, model, learning_rate, Purpose.SIZE, flop=design.flop, seed=design.seed)
        for model in models
    ]
    count = min(design.num_repeats, len(models))
    for index in range(count):
        original = (2 * index + 1) * len(models) // (2 * count)
        plans.append(
            _plan(
                design, models[original], learning_rate, Purpose.REPEAT,
                flop=design.flop, seed=design.seed + 1 + index, original_number=original,
            )
        )  # fmt: skip
    return plans


def _plan(
    design: StudyDesign,
    model: ModelSpec,
    learning_rate: float,
    purpose: Purpose,
    *,
    flop: float,
    seed: int,
    original_number: int = -1,
) -> TrialPlan:
    marks = mark_tokens(
        ModelShape.from_spec(model).flop_per_token(),
        flop=flop,
        batch_tokens=design.batch_tokens,
        max_tokens=design.max_tokens,
        min_steps=design.least_steps,
    )
    if purpose is Purpose.RATE:
        marks = marks[-1:]
    spec = RunSpec(
        seed=seed,
        budget_tokens=marks[-1],
        model=model,
        optimizer=OptimizerSpec(peak_lr=learning_rate),
        schedule=ScheduleSpec(
            lr_warmup_tokens=design.warmup_steps * design.batch_tokens, cooldown_ratio=0.0
        ),
        strategy=StrategySpec(global_batch_tokens=design.batch_tokens),
        data=DataSpec(
            dataset_id=design.dataset_id, max_data_passes=64, eval_tokens=design.heldout_tokens
        ),
    )
    return TrialPlan(purpose=purpose, spec=spec, mark_tokens=marks, original_number=original_number)


def mark_tokens(
    flop_per_token: float, *, flop: float, batch_tokens: int, max_tokens: int, min_steps: int
) -> tuple[int, ...]:
    """Where a trial is evaluated: at computes that all sizes share, down from `flop` by half
    doublings, in whole batches, later than `min_steps` batches. At least one.
    """
    found = set()
    for index in range(_NUM_SLICES):
        compute = flop * 2.0 ** (-index / _SLICES_PER_DOUBLING)
        steps = round(compute / flop_per_token / batch_tokens)
        if min_steps <= steps <= max_tokens // batch_tokens:
            found.add(steps * batch_tokens)
    if not found:
        steps = min(round(flop / flop_per_token / batch_tokens), max_tokens // batch_tokens)
        found.add(max(1, steps) * batch_tokens)
    return tuple(sorted(found))


def best_rate(losses: Mapping[tuple[float, float], float]) -> tuple[float, str]:
    """The learning rate whose losses, relative to each size's best, are smallest on the mean.

    Keys are (N, rate); an infinite loss is a trial that diverged; every size has a finite one.
    """
    sizes = sorted({size for size, _ in losses})
    rates = sorted({rate for _, rate in losses})
    best = {size: min(losses[size, rate] for rate in rates) for size in sizes}
    excess = {
        rate: sum(losses[size, rate] / best[size] - 1 for size in sizes) / len(sizes)
        for rate in rates
    }
    chosen = min(rates, key=lambda rate: excess[rate])
    if math.isinf(excess[chosen]):  # each rate diverges somewhere: the largest has the last word
        chosen = min(rates, key=lambda rate: losses[sizes[-1], rate])
    said = ", ".join(
        f"{rate:g} +{100 * excess[rate]:.2f} %"
        if math.isfinite(excess[rate])
        else f"{rate:g} diverged"
        for rate in rates
    )
    edge = "" if rates[0] < chosen < rates[-1] else "; it lies at the edge of those tried"
    return chosen, f"learning rate {chosen:g}: mean excess over each size's best: {said}{edge}"


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenTrial:
    """A trial that waits for somebody."""

    trial_id: str
    params_n: float
    flop: float
    avoided_peer_id: str = ""
    """Who did the original of a repeat."""


def choose_trial(
    open_trials: Sequence[OpenTrial], peer_id: str, speed_by_peer: Mapping[str, float]
) -> tuple[OpenTrial | None, str]:
    """The trial for a live peer that asks: the weakest peer gets the smallest model, the strongest
    the largest, those between by their rank in FLOP/s; a speed of 0 is unknown and counts as the
    middle. A repeat goes to somebody else than its original, while there is somebody else.
    """
    is_alone = len(speed_by_peer) < 2
    allowed = [t for t in open_trials if is_alone or t.avoided_peer_id != peer_id]
    if not allowed:
        return None, "no open trial is for this peer now"
    allowed.sort(key=lambda trial: (trial.params_n, trial.trial_id))
    own = speed_by_peer.get(peer_id, 0.0)
    known = sorted(speed for speed in speed_by_peer.values() if speed > 0)
    if own <= 0 or len(known) < 2:
        share, why = 0.5, "its speed cannot be compared yet: a middle size"
    else:
        share = known.index(own) / (len(known) - 1)
        why = f"its {own:.2g} FLOP/s are number {known.index(own) + 1} of {len(known)} from below"
    chosen = allowed[round(share * (len(allowed) - 1))]
    return chosen, f"{chosen.params_n:,.0f} parameters of {len(allowed)} open trials: {why}"
