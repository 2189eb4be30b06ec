"""Program of test_memory: one training step of each of several decoders on fake tensors, or of one
in this process. Prints the peaks in bytes: of the tensors, or of the whole process.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from peer.model.decoder import Decoder, FlatParameters
from peer.model.loss import summed_loss
from peer.parallel.devices import keep_freed_memory
from protos.contract.run_spec import ModelSpec


def _step(model: Decoder, windows: int, *, is_bf16: bool) -> None:
    tokens = torch.zeros((windows, model.spec.seq_len), dtype=torch.int64)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_bf16):
        loss = summed_loss(model(tokens), tokens)
    loss.backward()


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise AssertionError(field)


def _tracked_bytes(plain: dict[str, Any]) -> int:
    with FakeTensorMode():
        model = Decoder(ModelSpec(**plain["model"]))
        model.has_checkpointing = plain["has_checkpointing"]
        FlatParameters(model)
        tracker = MemTracker()
        tracker.track_external(model)
        with tracker:
            _step(model, plain["windows"], is_bf16=plain["is_bf16"])
    return max(tracker.get_tracker_snapshot("peak")[torch.device("cpu")].values())


def _process_bytes(plain: dict[str, Any]) -> int:
    keep_freed_memory()
    model = Decoder(ModelSpec(**plain["model"]))
    model.has_checkpointing = plain["has_checkpointing"]
    flat = FlatParameters(model)
    flat.values.fill_(0.01)
    flat.grads.fill_(0.0)
    _step(model, plain["windows"], is_bf16=plain["is_bf16"])
    return _status_bytes("VmHWM")


def main() -> None:
    torch.set_num_threads(1)
    is_fake, cases = json.loads(sys.argv[1])
    measure = _tracked_bytes if is_fake else _process_bytes
    print(json.dumps([measure(plain) for plain in cases]))


if __name__ == "__main__":
    main()
