"""Tasks of lm-evaluation-harness (the extra `eval`), on a model written in transformers' form."""

from pathlib import Path
from typing import Any

from protos.contract.errors import ErrorCode, MachineError, UsageError


def harness_tasks(
    folder: Path,
    tasks: list[str],
    *,
    num_few_shot: int,
    limit_examples: int | None,
    batch_sequences: int = 8,
    task_folder: Path | None = None,
) -> dict[str, dict[str, Any]]:
    """Metrics by task, as the harness names them; `task_folder` holds task files of your own.

    Most tasks fetch their data set. Raises MachineError if the harness is not installed, UsageError
    for unknown tasks.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MachineError(
            f"lm-evaluation-harness cannot be imported ({error})",
            allowed="the extra `eval`: lm-eval and transformers",
            remedy="pip install -c ops/constraints.txt '.[eval]' in Muster's folder, "
            "or leave --tasks out: `--in-context` needs nothing",
            code=ErrorCode.DEPENDENCY_MISSING,
        ) from error
    manager = TaskManager(include_path=None if task_folder is None else str(task_folder))
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise UsageError(
            f"--tasks {','.join(unknown)}",
            allowed=f"the harness' {len(manager.all_tasks)} tasks and those of --task-folder",
            remedy="`lm-eval ls tasks` lists them",
        )
    found = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "dtype": "float32"},
        tasks=list(tasks),
        num_fewshot=num_few_shot,
        limit=limit_examples,
        batch_size=batch_sequences,
        device="cpu",
        task_manager=manager,
        log_samples=False,
        bootstrap_iters=100,
    )
    return {str(name): dict(metrics) for name, metrics in found["results"].items()}
