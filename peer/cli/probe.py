"""Measured training speed of this machine, in a process of its own: `python -m peer.cli.probe
--threads N --device D`.

Prints one JSON object. The figure is what the trainer itself reaches on the tiny preset (its own
choice of precision and micro-batch, forward and backward), so it includes everything that training
includes but the optimizer.
"""

import argparse
import json
import sys
import time

import numpy as np
import torch

from peer.model.decoder import Decoder, FlatParameters
from peer.model.objectives import Examples
from peer.parallel.devices import choose_device, describe_device, keep_freed_memory
from peer.train.step import MicroStep, probe_plan
from protos.contract.errors import MusterError
from protos.contract.model_shape import ModelShape
from protos.contract.run_spec import TINY_MODEL

MEASURE_SECONDS = 1.5


def main(arguments: list[str]) -> int:
    """Measure and print; 0, or the error's exit code."""
    parser = argparse.ArgumentParser(prog="python -m peer.cli.probe", description=__doc__)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args(arguments)
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    try:
        device = choose_device(options.device)
    except MusterError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    model = Decoder(TINY_MODEL, device=device)
    step = MicroStep(model, FlatParameters(model, device=device))
    plan = probe_plan(step)
    shape = (plan.micro_batch_sequences, TINY_MODEL.seq_len)
    tokens_BT = np.random.default_rng(0).integers(0, TINY_MODEL.vocab_size, shape)
    examples = Examples(inputs_BT=tokens_BT, labels_BT=tokens_BT)
    num_tokens, began_seconds = 0, time.monotonic()
    while time.monotonic() - began_seconds < MEASURE_SECONDS:
        num_tokens += step.run(examples).num_tokens
    tokens_per_second = num_tokens / (time.monotonic() - began_seconds)
    info = describe_device(device, num_threads=torch.get_num_threads())
    plain = {
        "device": info.device,
        "device_name": info.name,
        "device_memory_bytes": info.total_memory_bytes,
        "threads": options.threads,
        "precision": plan.precision.value,
        "tokens_per_second": tokens_per_second,
        "flop_per_second": tokens_per_second * ModelShape.from_spec(TINY_MODEL).flop_per_token(),
        "torch_version": torch.__version__,
    }
    sys.stdout.write(json.dumps(plain) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
