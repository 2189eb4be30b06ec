"""The memory table against torch's MemTracker and against peaks of real processes: within 15 %, or
above what was measured.
"""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from peer.parallel.layout import Layout
from peer.parallel.memory import MemoryTable, Setting, estimate
from protos.contract.model_shape import ModelShape
from protos.contract.run_spec import ModelSpec

ROOT = Path(__file__).resolve().parents[3]
WIDE = ModelSpec(
    vocab_size=4096,
    d_model=256,
    num_layers=6,
    num_heads=8,
    num_kv_heads=4,
    head_dim=32,
    d_ff=768,
    seq_len=256,
)
WORDY = replace(WIDE, vocab_size=16_384, num_layers=3, has_tied_embeddings=False)
CASES = {
    "layers": (WIDE, 4, False, False),
    "layers-recomputed": (WIDE, 8, True, False),
    "vocabulary": (WORDY, 4, False, False),
    "vocabulary-recomputed": (WORDY, 2, True, False),
    "bf16": (WIDE, 4, False, True),
}
LEAST_RATIO = 0.85
MOST_RATIO = 1.25


def measured_bytes(name: str, *, is_fake: bool) -> int:
    model, windows, has_checkpointing, is_bf16 = CASES[name]
    plain = {
        "model": asdict(model),
        "windows": windows,
        "has_checkpointing": has_checkpointing,
        "is_bf16": is_bf16,
        "is_fake": is_fake,
    }
    command = [sys.executable, "-m", "tests.peer.parallel.peak_memory", json.dumps(plain)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return int(done.stdout)


def table_of(name: str) -> MemoryTable:
    model, windows, has_checkpointing, is_bf16 = CASES[name]
    layout = Layout(micro_batch_sequences=windows, has_checkpointing=has_checkpointing)
    setting = Setting(shape=ModelShape.from_spec(model), activation_bytes=2 if is_bf16 else 4)
    return estimate(layout, setting)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("is_fake", [True, False], ids=["tracker", "process"])
def test_the_estimate_is_near_the_peak_or_above_it(name: str, is_fake: bool) -> None:
    table = table_of(name)
    expected_bytes = table.tensors_bytes if is_fake else table.device_bytes
    ratio = expected_bytes / measured_bytes(name, is_fake=is_fake)
    assert LEAST_RATIO <= ratio <= MOST_RATIO, f"{ratio:.2f}"
