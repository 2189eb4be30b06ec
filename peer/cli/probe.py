"""Measured training speed of this machine, in a process of its own: `python -m peer.cli.probe
--threads N --device D`.

Prints one JSON object. The figure is what the trainer itself reaches on the tiny preset (its own
choice of execution, precision and micro-batch, forward and backward), so it includes everything
that training includes but the optimizer. Beside it the ceiling: what one large matrix product of
that precision reaches on the same threads, and the ratio of both, the model FLOP utilisation.
"""

import argparse
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from peer.cli.options import print_json
from peer.model.decoder import Decoder, FlatParameters
from peer.model.objectives import Examples
from peer.parallel.devices import (
    choose_device,
    describe_device,
    keep_freed_memory,
    unused_gpu_note,
)
from peer.train.probe import AUTO, measure_product_flop_per_second, set_up_step
from peer.train.step import MicroStep
from protos.contract.command_line import say
from protos.contract.errors import MusterError
from protos.contract.model_shape import ModelShape
from protos.contract.run_spec import TINY_MODEL

MEASURE_SECONDS = 1.5


def main(arguments: list[str]) -> int:
    """Measure and print; 0, or the error's exit code."""
    parser = argparse.ArgumentParser(prog="python -m peer.cli.probe", description=__doc__)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--execution", default=AUTO)
    parser.add_argument("--cache", type=Path, default=None, help="keeps what is built")
    options = parser.parse_args(arguments)
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    try:
        print_json(measured(options))
    except MusterError as error:
        say(str(error))
        return error.exit_code
    return 0


def measured(options: argparse.Namespace) -> dict[str, object]:
    """The figures. Raises MusterError."""
    device = choose_device(options.device)
    model = Decoder(TINY_MODEL, device=device)
    step = MicroStep(model, FlatParameters(model, device=device))
    plan = set_up_step(step, wanted=options.execution, cache_dir=options.cache)
    ceiling = measure_product_flop_per_second(device, plan.precision)
    shape = (plan.micro_batch_sequences, TINY_MODEL.seq_len)
    tokens_BT = np.random.default_rng(0).integers(0, TINY_MODEL.vocab_size, shape)
    examples = Examples(inputs_BT=tokens_BT, labels_BT=tokens_BT)
    num_tokens, began_seconds = 0, time.monotonic()
    while time.monotonic() - began_seconds < MEASURE_SECONDS:
        num_tokens += step.run(examples).num_tokens
    tokens_per_second = num_tokens / (time.monotonic() - began_seconds)
    info = describe_device(device, num_threads=torch.get_num_threads())
    flop_per_second = tokens_per_second * ModelShape.from_spec(TINY_MODEL).flop_per_token()
    return {
        "device": info.device,
        "device_name": info.name,
        "device_memory_bytes": info.total_memory_bytes,
        "threads": options.threads,
        "precision": plan.precision.value,
        "tokens_per_second": tokens_per_second,
        "flop_per_second": flop_per_second,
        "product_flop_per_second": ceiling,
        "mfu_ratio": flop_per_second / ceiling,
        "execution": plan.execution.value,
        "reason": (unused_gpu_note() if options.device == AUTO else "") + str(plan),
        "tried": [asdict(trial) for trial in plan.trials],
        "torch_version": torch.__version__,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
