"""One trial of a study: a small model trained alone at a constant learning rate, evaluated on
held-out text at the marks it was given.

`python -m peer.train.trial --spec SPEC --dataset DIR --marks T1,T2,... --result FILE --threads K`
in a process of its own beside the daemon. Data order, initial values and update are those of a run
with this spec (train/reference.py); nothing is averaged with anybody. The result is written whole
or not at all.
"""

import argparse
import gc
import hashlib
import json
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

from peer.parallel.devices import keep_freed_memory
from peer.parent_death import die_with_parent
from peer.train.reference import ReferenceRun
from protos.contract.errors import MusterError, UsageError
from protos.contract.model_shape import COUNTING_CONVENTION, ModelShape
from protos.contract.run_spec import RunSpec


def run_trial(spec: RunSpec, dataset_dir: Path, marks: list[int]) -> dict[str, Any]:
    """Train to every mark in turn; plain data with the fields of duties.proto's TrialResult.

    Raises UsageError for marks that do not rise to the budget, RunFailedError for a loss that is
    not finite.
    """
    if not marks or marks != sorted(set(marks)) or marks[-1] != spec.budget_tokens:
        raise UsageError(
            f"marks {marks} of a budget of {spec.budget_tokens} tokens",
            allowed="rising numbers of tokens, the last one the budget",
            remedy="run coordinator and peer from the same version",
        )
    shape = ModelShape.from_spec(spec.model)
    run = ReferenceRun(spec, dataset_dir)
    points = []
    train_seconds = 0.0
    for mark in marks:
        begin = time.monotonic()
        while run.schedule_tokens < mark:
            run.advance()
        train_seconds += time.monotonic() - begin
        found = run.evaluate(eval_tokens=spec.data.eval_tokens)
        points.append(
            {
                "tokens": run.schedule_tokens,
                "total_nats": found.total_nats,
                "num_tokens": found.num_tokens,
                "num_bytes": found.num_bytes,
            }
        )
    return {
        "run_digest": spec.run_digest,
        "seed": spec.seed,
        "convention": COUNTING_CONVENTION,
        "params_n": shape.num_matmul_parameters,
        "flop_per_token": shape.flop_per_token(),
        "points": points,
        "params_digest": hashlib.sha256(run.params.tobytes()).hexdigest(),
        "train_seconds": train_seconds,
    }


def main(arguments: list[str]) -> int:
    """Command line; 0, or the error's exit code with its message on standard error."""
    die_with_parent(signal.SIGKILL)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s")
    parser = argparse.ArgumentParser(prog="python -m peer.train.trial", description=__doc__)
    parser.add_argument("--spec", type=Path, required=True)
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--marks", required=True)
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    gc.freeze()
    try:
        spec = RunSpec.from_wire(options.spec.read_bytes())
        marks = [int(part) for part in options.marks.split(",")]
        result = run_trial(spec, options.dataset, marks)
    except MusterError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    part = options.result.with_name(options.result.name + ".part")
    part.write_text(json.dumps(result), encoding="ascii")
    os.replace(part, options.result)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
