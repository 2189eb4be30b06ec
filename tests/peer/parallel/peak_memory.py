"""Program of test_memory: one training step of a decoder in this process or on fake tensors, and
what it took. Prints the peak in bytes: of the tensors, or of the whole process.
"""

import json
import sys
from pathlib import Path

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


def main() -> None:
    plain = json.loads(sys.argv[1])
    spec, windows = ModelSpec(**plain["model"]), plain["windows"]
    torch.set_num_threads(1)
    if plain["is_fake"]:
        with FakeTensorMode():
            model = Decoder(spec)
            model.has_checkpointing = plain["has_checkpointing"]
            FlatParameters(model)
            tracker = MemTracker()
            tracker.track_external(model)
            with tracker:
                _step(model, windows, is_bf16=plain["is_bf16"])
        snapshot = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
        print(max(snapshot.values()))
        return
    keep_freed_memory()
    model = Decoder(spec)
    model.has_checkpointing = plain["has_checkpointing"]
    flat = FlatParameters(model)
    flat.values.fill_(0.01)
    flat.grads.fill_(0.0)
    _step(model, windows, is_bf16=plain["is_bf16"])
    print(_status_bytes("VmHWM"))


if __name__ == "__main__":
    main()
