"""The bare training step in a plain loop: what ops/bench/overhead compares a peer with.

Reads windows of the dataset in the run's order into memory first, then repeats `MicroStep.run` over
micro-batches of the size and precision given (or probed, as the trainer does), and adds the
gradient to a sum as any trainer must. No leases, no rounds, no update. Answers one JSON line.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

from peer.model.decoder import Decoder, FlatParameters
from peer.model.init import initial_vector
from peer.model.objectives import Examples
from peer.parallel.devices import keep_freed_memory
from peer.train.probe import probe_plan
from peer.train.step import MicroStep, Precision
from protos.contract.chunk_format import (
    MANIFEST_FILE,
    Manifest,
    tokens_from_chunk,
    training_chunk_path,
    windows_from_chunk,
)
from protos.contract.run_spec import RunSpec

_NUM_CHUNKS = 4
_WARM_UP_MICRO_BATCHES = 3


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spec", type=Path, required=True)
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--precision", choices=[p.value for p in Precision], default=None)
    parser.add_argument("--micro-batch-sequences", type=int, default=0)
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    spec = RunSpec.from_wire(options.spec.read_bytes())
    model = Decoder(spec.model)
    parameters = FlatParameters(model)
    parameters.values.numpy()[:] = initial_vector(spec)
    step = MicroStep(model, parameters)
    plan = probe_plan(step)
    if options.precision is not None:
        step.precision = Precision(options.precision)
    num_sequences = options.micro_batch_sequences or plan.micro_batch_sequences
    manifest = Manifest.from_bytes((options.dataset / MANIFEST_FILE).read_bytes())
    inputs, labels = [], []
    for index in range(min(_NUM_CHUNKS, len(manifest.training_chunks))):
        data = (options.dataset / training_chunk_path(index)).read_bytes()
        chunk = manifest.training_chunks[index]
        tokens = tokens_from_chunk(data, manifest=manifest, chunk=chunk)
        num_windows = (chunk.num_tokens - 1) // spec.model.seq_len
        inputs_BT, labels_BT = windows_from_chunk(
            tokens, spec.model.seq_len, np.arange(num_windows)
        )
        inputs.append(inputs_BT)
        labels.append(labels_BT)
    all_inputs_BT, all_labels_BT = np.concatenate(inputs), np.concatenate(labels)
    total = np.zeros(parameters.values.numel(), np.float32)
    num_tokens, begin_seconds = 0, 0.0
    count = 0
    while count <= _WARM_UP_MICRO_BATCHES or time.monotonic() - begin_seconds < options.seconds:
        if count == _WARM_UP_MICRO_BATCHES:
            num_tokens, begin_seconds = 0, time.monotonic()
        at = (count * num_sequences) % (len(all_inputs_BT) - num_sequences)
        rows = slice(at, at + num_sequences)
        examples = Examples(inputs_BT=all_inputs_BT[rows], labels_BT=all_labels_BT[rows])
        result = step.run(examples)
        total += step.parameters.grads.numpy()
        num_tokens += result.num_tokens
        count += 1
    seconds = time.monotonic() - begin_seconds
    answer = {
        "tokens_per_second": num_tokens / seconds,
        "precision": step.precision.value,
        "micro_batch_sequences": num_sequences,
        "num_parameters": int(parameters.values.numel()),
        "seconds": seconds,
    }
    sys.stdout.write(json.dumps(answer) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
