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
MICRO_4 = Layout(micro_batch_sequences=4)
CASES = {
    "layers": (WIDE, MICRO_4, False),
    "layers-recomputed": (
        WIDE,
        Layout(micro_batch_sequences=8, has_checkpointing=True),
        False,
    ),
    "vocabulary": (WORDY, MICRO_4, False),
    "vocabulary-recomputed": (
        WORDY,
        Layout(micro_batch_sequences=2, has_checkpointing=True),
        False,
    ),
    "vocabulary-in-pieces": (WORDY, Layout(micro_batch_sequences=16), False),
    "bf16": (WIDE, MICRO_4, True),
}
NODES = {
    "tp-pp": (WORDY, Layout(tp=2, pp=2, micro_batch_sequences=4, num_micro_batches=4), False),
    "fsdp": (WORDY, Layout(dp=2, is_sharded=True, micro_batch_sequences=4), False),
}
LEAST_RATIO = 0.85
MOST_RATIO = 1.25
MOST_RATIO_OF_NODES = 1.4


def measured_bytes(how: str, names: list[str]) -> dict[str, int]:
    """Peak of each case; of a node that of the rank that needs most."""
    cases = []
    for name in names:
        model, layout, is_bf16 = (CASES | NODES)[name]
        plain = {"model": asdict(model), "layout": asdict(layout), "is_bf16": is_bf16}
        cases.append(plain)
    command = [sys.executable, "-m", "tests.peer.parallel.peak_memory", json.dumps([how, cases])]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    peaks = json.loads(done.stdout.splitlines()[-1])
    return dict(zip(names, map(max, peaks), strict=True))


def table_of(name: str) -> MemoryTable:
    model, layout, is_bf16 = (CASES | NODES)[name]
    setting = Setting(shape=ModelShape.from_spec(model), activation_bytes=2 if is_bf16 else 4)
    return estimate(layout, setting)


@pytest.mark.slow
def test_tensors_are_estimated_as_the_tracker_counts_them() -> None:
    measured = measured_bytes("tracker", list(CASES))
    ratios = {name: table_of(name).tensors_bytes / measured[name] for name in CASES}
    assert all(LEAST_RATIO <= ratio <= MOST_RATIO for ratio in ratios.values()), ratios


@pytest.mark.slow
@pytest.mark.parametrize("name", ["layers-recomputed", "vocabulary", "bf16"])
def test_a_process_takes_what_the_table_says(name: str) -> None:
    ratio = table_of(name).device_bytes / measured_bytes("process", [name])[name]
    assert LEAST_RATIO <= ratio <= MOST_RATIO, f"{ratio:.2f}"


@pytest.mark.slow
@pytest.mark.parametrize("name", list(NODES))
def test_local_ranks_take_what_the_table_says(name: str) -> None:
    """Larger models, more layouts: ops/bench/memory."""
    ratio = table_of(name).device_bytes / measured_bytes("ranks", [name])[name]
    assert LEAST_RATIO <= ratio <= MOST_RATIO_OF_NODES, f"{ratio:.2f}"
