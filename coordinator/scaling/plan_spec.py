"""From a plan to a run spec that `run create` takes."""

import math

from coordinator.scaling.links import StrategyChoice
from coordinator.scaling.plan_types import Plan
from coordinator.scaling.recipe import outer_settings
from protos.contract.errors import ErrorCode, MachineError
from protos.contract.run_spec import (
    STRATEGIES,
    DataSpec,
    ModelSpec,
    OptimizerSpec,
    RunSpec,
    ScheduleSpec,
    StrategySpec,
)

_NO_DATASET = "0" * 64
_DILOCO_BETA2 = 0.99
"""Charles et al. 2025, section 3."""


def run_spec(plan: Plan, *, dataset_id: str = "", seed: int = 0) -> RunSpec:
    """The RunSpec of a plan. Raises MachineError if this version cannot run the plan's strategy.

    Without a dataset its id is all zeros: leave it out of the file (`spec_toml`).
    """
    return RunSpec(
        seed=seed,
        budget_tokens=plan.tokens_d,
        model=ModelSpec.from_shape(plan.shape),
        optimizer=OptimizerSpec(
            peak_lr=plan.recipe.peak_lr,
            weight_decay=plan.recipe.weight_decay,
            beta2=_DILOCO_BETA2 if plan.strategy_name == "diloco" else OptimizerSpec().beta2,
        ),
        schedule=ScheduleSpec(lr_warmup_tokens=plan.lr_warmup_tokens),
        strategy=_strategy_spec(plan),
        data=DataSpec(
            dataset_id=dataset_id or _NO_DATASET,
            **(
                {"max_data_passes": max(1, math.ceil(plan.data_passes))} if plan.data_passes else {}
            ),
        ),
    )


def _strategy_spec(plan: Plan) -> StrategySpec:
    name = plan.strategy_name
    values: dict[str, object] = {
        "name": name,
        "global_batch_tokens": plan.recipe.global_batch_tokens,
    }
    if plan.strategy is not None:
        values["codec"] = plan.strategy.codec
    if plan.strategy is not None and name == "diloco":
        values |= _diloco_values(plan, plan.strategy)
    unknown = sorted(set(values) - set(StrategySpec.__dataclass_fields__))
    if name not in STRATEGIES or unknown:
        raise MachineError(
            f"the plan's strategy is {name}, which this version of muster cannot run",
            allowed=", ".join(STRATEGIES),
            remedy="plan with --strategy sync, or upgrade muster",
            code=ErrorCode.CAPABILITY_MISSING,
        )
    return StrategySpec(**values)  # type: ignore[arg-type]


def _diloco_values(plan: Plan, chosen: StrategyChoice) -> dict[str, object]:
    seq_len = plan.shape.seq_len
    outer_lr, outer_momentum, _ = outer_settings(
        chosen.num_replicas, plan.recipe.steps / chosen.inner_steps_per_outer
    )
    windows = max(1, round(plan.recipe.global_batch_tokens / chosen.num_replicas / seq_len))
    return {
        "inner_steps": chosen.inner_steps_per_outer,
        "inner_batch_tokens": windows * seq_len,
        "num_fragments": chosen.num_fragments,
        "overlap_inner_steps": chosen.overlap_inner_steps,
        "outer_lr": outer_lr,
        "outer_momentum": outer_momentum,
    }


def spec_toml(spec: RunSpec, plan: Plan) -> str:
    """The spec as a file for `run create --spec`, with the plan's sentences as comments."""
    lines = [f"# {choice.name}: {choice.value}" for choice in plan.choices]
    text = spec.to_toml()
    if spec.data.dataset_id == _NO_DATASET:
        text = text.replace(f'dataset_id = "{_NO_DATASET}"\n', "")
    return "\n".join(lines) + "\n\n" + text
