"""What a plan is asked for and what it says: plain data, every decision with its sentence."""

import math
from dataclasses import dataclass, field

from coordinator.scaling.admission import Admission
from coordinator.scaling.laws import LossLaw, Optimum
from coordinator.scaling.links import Codec, MergeAdvice, StrategyChoice
from coordinator.scaling.plan_law import PlanLaw
from coordinator.scaling.pool import ComputeEstimate, Pool
from coordinator.scaling.recipe import Recipe
from coordinator.scaling.sizing import Size
from protos.contract.model_shape import ModelShape


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """Everything that a plan depends on.

    Exactly one of: a pool with `seconds` (or with `compute_flop`, then time follows), or
    `compute_flop` alone, or `params_n` (then the compute at which it is optimal, or as much as the
    tokens to be served ask for).
    """

    law: PlanLaw
    pool: Pool | None = None
    seconds: float | None = None
    compute_flop: float | None = None
    params_n: float | None = None
    compute_reason: str = ""
    """How `compute_flop` came about."""
    compute_log_std: float | None = None
    """None: from the pool, 0 without one."""
    serve_tokens: float = 0.0
    unique_tokens: float = math.inf
    text_reason: str = ""
    vocab_size: int
    seq_len: int
    bytes_per_parameter: float = 16.0
    codecs: tuple[Codec, ...]
    """What this version can send."""
    strategies: tuple[str, ...]
    """What may be chosen: sync, diloco or both."""
    tuned_lr: float | None = None
    tuned_width: int = 0
    """Width of the trial that `tuned_lr` comes from."""
    is_extrapolation_forced: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """Everything that depends on the strategy: size and strategy that fit each other."""

    compute: ComputeEstimate
    effective_flop: float
    law: LossLaw
    """With its optimum at effective_flop."""
    size: Size
    """Before the memory's cap and the shape."""
    shape: ModelShape
    tokens_d: int
    recipe: Recipe
    strategy: StrategyChoice | None
    loss_nats: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One decision."""

    name: str
    value: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Cap:
    """Something that keeps N, D or C from the law's optimum, and its price."""

    name: str
    is_binding: bool
    params_n: float
    """N with this cap (and those before it)."""
    efficiency_ratio: float
    """Share of the compute that is left when only this is taken into account."""
    regret_nats: float
    """Loss against the optimum without it."""
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The whole plan. Numbers are what a machine reads, `choices` is what a person reads."""

    law_name: str
    law_source: str
    compute_flop: float
    """Median training compute of those admitted, after utilisation."""
    compute_log_std: float
    effective_flop: float
    """After the replica penalty; what the law is asked at."""
    law_optimum: Optimum
    """The law's own, at effective_flop and 6 N D."""
    growth_params_ratio: float
    growth_tokens_ratio: float
    params_n: float
    """Matrices and head of the shape; what the law calls N."""
    num_parameters: int
    """All of them."""
    shape: ModelShape
    tokens_d: int
    data_passes: float
    """0 where the amount of text was not given."""
    flop_per_token: float
    spent_flop: float
    plain_flop: float
    """6 N D."""
    efficiency_ratio: float
    """eta of the chosen N against the law's optimum, text and serving left aside."""
    near_optimal_params_n: tuple[float, float]
    near_optimal_params_n_90: tuple[float, float]
    caps: tuple[Cap, ...]
    loss_nats: float
    """nan, like its band, where the law says more than ln of the vocabulary: it does not hold."""
    loss_low_nats: float
    loss_high_nats: float
    floor_nats: float
    memorised_ratio: float
    """Bits that the model can hold over bits of the text; 0 if the text is not known."""
    recipe: Recipe
    lr_warmup_tokens: int
    micro_batch_sequences: int
    micro_steps: tuple[int, int]
    """Fewest and most micro-batches of a peer per optimizer step."""
    admission: Admission | None
    strategy: StrategyChoice | None
    """None where no pool, or no measured link, could decide."""
    strategies: tuple[StrategyChoice, ...]
    """All that were compared, allowed or not."""
    merge: MergeAdvice | None
    wire_bytes_per_peer: float | None
    calendar_seconds: float | None
    calendar_low_seconds: float | None
    calendar_high_seconds: float | None
    choices: tuple[Choice, ...]
    warnings: tuple[str, ...] = field(default=())

    @property
    def is_loss_known(self) -> bool:
        """False where the law's loss would be above that of guessing."""
        return not math.isnan(self.loss_nats)

    @property
    def strategy_name(self) -> str:
        """sync where nothing could decide."""
        return "sync" if self.strategy is None else self.strategy.name
