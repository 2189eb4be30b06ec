"""`muster-peer reference` (hidden): train one process on the same tokens, for comparison."""

from pathlib import Path
from typing import Annotated

import typer

from peer.cli.options import AsJson, ExecutionName, HomeDir, StepCache, print_json, print_line


def reference(
    spec_path: Annotated[Path, typer.Option("--spec", help="RunSpec as TOML or wire JSON.")],
    dataset: Annotated[Path, typer.Option(help="Dataset directory.")],
    num_tokens: Annotated[int, typer.Option(help="Tokens to train; 0: the spec's budget.")] = 0,
    eval_tokens: Annotated[int, typer.Option(help="Held-out tokens; 0: all.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 1,
    home: HomeDir = None,
    execution: ExecutionName = None,
    step_cache: StepCache = None,
    is_json: AsJson = False,
) -> None:
    """Train one process in the order of the data and evaluate it."""
    from dataclasses import asdict, replace

    from peer.config import load_config, quiet_libraries

    quiet_libraries()
    import torch

    from peer.cli.checkpoints import load_spec
    from peer.parallel.devices import keep_freed_memory
    from peer.train.reference import run_reference

    keep_freed_memory()
    torch.set_num_threads(threads)
    spec = load_spec(spec_path)
    spec = replace(spec, data=replace(spec.data, eval_tokens=eval_tokens))
    config = load_config(flags={"home": home, "execution": execution, "step_cache": step_cache})
    result = run_reference(
        spec,
        dataset,
        num_tokens=num_tokens,
        execution=config.execution,
        step_cache=config.shared_step_cache,
    )
    plain = asdict(result)
    del plain["loss_nats_by_step"]
    if is_json:
        print_json(plain)
        return
    for key, value in plain.items():
        print_line(f"{key:<24} {value}")
