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


def measured_bytes(names: list[str], *, is_fake: bool) -> dict[str, int]:
    cases = [
        {
            "model": asdict(CASES[name][0]),
            "windows": CASES[name][1],
            "has_checkpointing": CASES[name][2],
            "is_bf16": CASES[name][3],
        }
        for name in names
    ]
    arguments = json.dumps([is_fake, cases])
    command = [sys.executable, "-m", "tests.peer.parallel.peak_memory", arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return dict(zip(names, json.loads(done.stdout), strict=True))


def table_of(name: str) -> MemoryTable:
    model, windows, has_checkpointing, is_bf16 = CASES[name]
    layout = Layout(micro_batch_sequences=windows, has_checkpointing=has_checkpointing)
    setting = Setting(shape=ModelShape.from_spec(model), activation_bytes=2 if is_bf16 else 4)
    return estimate(layout, setting)


@pytest.mark.slow
def test_tensors_are_estimated_as_the_tracker_counts_them() -> None:
    measured = measured_bytes(list(CASES), is_fake=True)
    ratios = {name: table_of(name).tensors_bytes / measured[name] for name in CASES}
    assert all(LEAST_RATIO <= ratio <= MOST_RATIO for ratio in ratios.values()), ratios


@pytest.mark.slow
@pytest.mark.parametrize("name", ["layers-recomputed", "vocabulary", "bf16"])
def test_a_process_takes_what_the_table_says(name: str) -> None:
    ratio = table_of(name).device_bytes / measured_bytes([name], is_fake=False)[name]
    assert LEAST_RATIO <= ratio <= MOST_RATIO, f"{ratio:.2f}"
