"""Which windows of a dataset a run was trained on, by its schedule, and a sample of them.

Peers lease the schedule in order, so after S tokens the first S / seq_len windows of it were
trained, but for a few at the end that are on their way. Repeats of a data pass count once.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from protos.contract.chunk_format import (
    Int64Array,
    Manifest,
    heldout_chunk_path,
    num_windows,
    tokens_from_chunk,
    training_chunk_path,
)
from protos.contract.errors import CorruptDataError, UsageError
from protos.contract.run_spec import RunSpec
from protos.contract.schedule_order import ScheduleOrder


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedText:
    """Windows of seq_len + 1 tokens, and how much text all trained windows hold."""

    windows: list[Int64Array]
    trained_bytes: int


def trained_windows(
    spec: RunSpec,
    dataset: Path,
    manifest: Manifest,
    *,
    schedule_tokens: int,
    max_windows: int,
    byte_lengths: Int64Array,
) -> TrainedText:
    """A sample, evenly spread. Raises UsageError if nothing was trained or a chunk is not there,
    CorruptDataError for damaged chunks.
    """
    seq_len = spec.model.seq_len
    order = ScheduleOrder(spec.seed, manifest, seq_len)
    wanted = {index: set[int]() for index in range(len(manifest.training_chunks))}
    left, position = schedule_tokens // seq_len, 0
    total = sum(order.num_windows(index) for index in wanted)
    while left > 0 and sum(map(len, wanted.values())) < total:
        data_pass, chunk_index = order.chunk_at(position)
        dealt = [int(i) for i in order.window_order(data_pass, chunk_index)[:left]]
        wanted[chunk_index].update(dealt)
        left -= len(dealt)
        position += 1
    pairs = [(chunk, window) for chunk, found in wanted.items() for window in sorted(found)]
    if not pairs:
        raise UsageError(
            f"a state of {schedule_tokens} trained tokens",
            allowed=f"at least one window of {seq_len}",
            remedy="use a later checkpoint",
        )
    trained_bytes = 0
    windows = []
    chosen = {pairs[i * len(pairs) // max_windows] for i in range(max_windows)}
    for chunk_index, found in wanted.items():
        if not found:
            continue
        tokens = _chunk(dataset / training_chunk_path(chunk_index), manifest, chunk_index)
        for window in sorted(found):
            part = tokens[window * seq_len : window * seq_len + seq_len + 1]
            trained_bytes += int(byte_lengths[part[1:]].sum())
            if (chunk_index, window) in chosen:
                windows.append(part.astype(np.int64))
    return TrainedText(windows=windows, trained_bytes=trained_bytes)


def heldout_windows(
    spec: RunSpec, dataset: Path, manifest: Manifest, *, max_windows: int
) -> list[Int64Array]:
    """A sample of held-out windows, evenly spread."""
    seq_len = spec.model.seq_len
    pairs = [
        (chunk_index, window)
        for chunk_index, chunk in enumerate(manifest.heldout_chunks)
        for window in range(num_windows(chunk.num_tokens, seq_len))
    ]
    chosen = sorted(
        {pairs[i * len(pairs) // max_windows] for i in range(max_windows)} if pairs else ()
    )
    windows = []
    for chunk_index, window in chosen:
        path = dataset / heldout_chunk_path(chunk_index)
        tokens = _chunk(path, manifest, chunk_index, is_heldout=True)
        windows.append(tokens[window * seq_len : window * seq_len + seq_len + 1].astype(np.int64))
    return windows


def _chunk(
    path: Path, manifest: Manifest, chunk_index: int, *, is_heldout: bool = False
) -> Int64Array:
    chunks = manifest.heldout_chunks if is_heldout else manifest.training_chunks
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"cannot read {path}: {error.strerror or error}",
            allowed="a dataset directory with its chunks, such as the coordinator's",
            remedy="run this where the corpus was built",
        ) from error
    try:
        tokens = tokens_from_chunk(data, manifest=manifest, chunk=chunks[chunk_index])
    except CorruptDataError as error:
        raise CorruptDataError(
            f"{path}: {error.found}", allowed=error.allowed, remedy=error.remedy
        ) from error
    return tokens.astype(np.int64)
