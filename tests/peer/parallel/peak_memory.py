"""Program of test_memory and ops/bench/memory: steps of several decoders on fake tensors, of
one in this process, or of one on the local ranks of a node. Prints peaks in bytes: of the tensors,
or of each process without what it shares with others.
"""

import json
import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from peer.model.decoder import Decoder, FlatParameters
from peer.model.kernels import find_kernels
from peer.model.loss import head_loss
from peer.model.objectives import Examples
from peer.parallel.devices import keep_freed_memory
from peer.parallel.rank_messages import layout_from
from peer.parallel.ranks import LocalRanks
from peer.train.step import MicroStep, Precision
from protos.contract.model_shape import ModelShape
from protos.contract.run_spec import ModelSpec, OptimizerSpec

_PATIENCE_SECONDS = 300.0


def _status_bytes(pid: int, field: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise AssertionError(field)


def _own_peak_bytes(pid: int) -> int:
    """Without pages of the node's canonical vector, which stay mapped once they were used."""
    return _status_bytes(pid, "VmHWM") - _status_bytes(pid, "RssShmem")


def _tracked_bytes(plain: dict[str, Any]) -> list[int]:
    with FakeTensorMode():
        model = Decoder(ModelSpec(**plain["model"]))
        model.has_checkpointing = plain["layout"]["has_checkpointing"]
        FlatParameters(model)
        tracker = MemTracker()
        tracker.track_external(model)
        windows = plain["layout"]["micro_batch_sequences"]
        tokens = torch.zeros((windows, model.spec.seq_len), dtype=torch.int64)
        with tracker:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=plain["is_bf16"]):
                loss = model(tokens, head=partial(head_loss, labels_BT=tokens))
            loss.backward()
    return [max(tracker.get_tracker_snapshot("peak")[torch.device("cpu")].values())]


def _process_bytes(plain: dict[str, Any]) -> list[int]:
    keep_freed_memory()
    model = Decoder(ModelSpec(**plain["model"]))
    model.has_checkpointing = plain["layout"]["has_checkpointing"]
    flat = FlatParameters(model)
    flat.values.fill_(0.01)
    step = MicroStep(model, flat, precision=Precision.BF16 if plain["is_bf16"] else Precision.FP32)
    if plain.get("is_native"):
        with tempfile.TemporaryDirectory() as folder:
            step.use_native(find_kernels(Path(folder)))
    tokens = np.zeros((plain["layout"]["micro_batch_sequences"], model.spec.seq_len), np.int64)
    for _ in range(2):
        step.run(Examples(inputs_BT=tokens, labels_BT=tokens))
    return [_own_peak_bytes(os.getpid())]


def _rank_bytes(plain: dict[str, Any]) -> list[int]:
    keep_freed_memory()
    spec, layout = ModelSpec(**plain["model"]), layout_from(plain["layout"])
    num_values = ModelShape.from_spec(spec).num_parameters
    ranks = LocalRanks(layout.num_ranks, num_values=num_values)
    try:
        ranks.configure(spec, OptimizerSpec(), layout, timeout_seconds=_PATIENCE_SECONDS)
        ranks.vector[:] = 0.01
        ranks.call("load")
        tokens = np.zeros((layout.turn_sequences, spec.seq_len), np.int64)
        for _ in range(2):  # the second adds to the gradients of the first
            ranks.run(Examples(inputs_BT=tokens, labels_BT=tokens), is_bf16=plain["is_bf16"])
        if plain.get("has_inner_optimizer"):
            for _ in range(2):
                ranks.call("inner_step", num_tokens=tokens.size, learning_rate=1e-4)
                ranks.run(Examples(inputs_BT=tokens, labels_BT=tokens), is_bf16=plain["is_bf16"])
        ranks.call("store_grads")
        pids = [os.getpid(), *(process.pid for process in ranks.processes.values())]
        return [_own_peak_bytes(pid) for pid in pids]
    finally:
        ranks.close()


MEASURES = {"tracker": _tracked_bytes, "process": _process_bytes, "ranks": _rank_bytes}


def main() -> None:
    torch.set_num_threads(1)
    how, cases = json.loads(sys.argv[1])
    print(json.dumps([MEASURES[how](plain) for plain in cases]))


if __name__ == "__main__":
    main()
