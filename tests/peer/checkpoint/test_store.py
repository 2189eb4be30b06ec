"""Local checkpoints: whole or not there, rotated, checked before they are used."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from peer.checkpoint.safetensors_io import load_tensors, save_tensors
from peer.checkpoint.store import (
    CheckpointHeader,
    CheckpointStore,
    load_checkpoint,
    open_checkpoint,
)
from protos.contract.digest import StateMeta, state_digest
from protos.contract.errors import CorruptDataError, MachineError

NUM_VALUES = 70_000
RUN = "ab" * 32


def state(outer_step: int, *, incarnation: int = 1) -> tuple[CheckpointHeader, list[np.ndarray]]:
    generator = np.random.default_rng(outer_step)
    vectors = [generator.standard_normal(NUM_VALUES).astype(np.float32) for _ in range(3)]
    meta = StateMeta(
        run_digest=RUN,
        incarnation=incarnation,
        outer_step=outer_step,
        schedule_tokens=1000 * outer_step,
        directive_number=3,
        lease_cursor_by_peer={"p": (4, 7)},
    )
    header = CheckpointHeader(
        meta=meta,
        state_digest=state_digest(meta, vectors),
        directive=b"directive",
        incarnation_record=b"record",
        unreported_certificates=(b"one", b"two"),
    )
    return header, vectors


def empty_targets() -> list[np.ndarray]:
    return [np.zeros(NUM_VALUES, dtype=np.float32) for _ in range(3)]


def damage(path: Path, offset_bytes: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset_bytes] ^= 1
    path.write_bytes(data)


def test_round_trip_and_the_library_reads_it_too(tmp_path: Path) -> None:
    header, vectors = state(5)
    path = CheckpointStore(tmp_path / "state").save(header, vectors)
    assert path.name == "1-5.safetensors"
    targets = empty_targets()
    assert load_checkpoint(path, targets) == header
    for vector, target in zip(vectors, targets, strict=True):
        assert np.array_equal(vector, target)
    by_library = safetensors.numpy.load_file(path)
    assert np.array_equal(by_library["exp_avg_sq"], vectors[2])


def test_two_are_kept_newest_by_incarnation_then_step(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for outer_step, incarnation in ((9, 1), (10, 1), (3, 2)):
        store.save(*state(outer_step, incarnation=incarnation))
    assert [path.name for path in store.paths()] == ["2-3.safetensors", "1-10.safetensors"]
    loaded = store.load_newest(empty_targets(), run_digest=RUN, max_incarnation=1)
    assert loaded.path is not None and loaded.path.name == "1-10.safetensors"
    assert "later incarnation" in loaded.reason


@pytest.mark.parametrize("offset_bytes", [3, -10])
def test_a_damaged_newest_gives_the_one_before_and_says_so(
    tmp_path: Path, offset_bytes: int
) -> None:
    store = CheckpointStore(tmp_path)
    store.save(*state(1))
    damage(store.save(*state(2)), offset_bytes)
    loaded = store.load_newest(targets := empty_targets(), run_digest=RUN)
    assert loaded.header is not None and loaded.header.meta.outer_step == 1
    assert np.array_equal(targets[0], state(1)[1][0])
    assert "1-2.safetensors" in loaded.reason


def test_a_truncated_file_leaves_the_vectors_alone(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    path = store.save(*state(1))
    path.write_bytes(path.read_bytes()[:-4])
    targets = empty_targets()
    with pytest.raises(CorruptDataError):
        load_checkpoint(path, targets)
    assert not any(target.any() for target in targets)
    assert store.load_newest(targets, run_digest=RUN).header is None


def test_another_run_or_model_is_not_loaded(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    path = store.save(*state(1))
    loaded = store.load_newest(empty_targets(), run_digest="cd" * 32)
    assert loaded.header is None and "another run" in loaded.reason
    with pytest.raises(CorruptDataError, match="70000 parameters where the run has 9"):
        load_checkpoint(path, [np.zeros(9, dtype=np.float32)] * 3)


def test_metadata_is_covered_by_the_digest(tmp_path: Path) -> None:
    header, vectors = state(1)
    forged = replace(header, meta=replace(header.meta, schedule_tokens=7))
    path = CheckpointStore(tmp_path).save(forged, vectors)
    with pytest.raises(CorruptDataError, match="digest"):
        open_checkpoint(path)


def test_leftovers_of_an_interrupted_write_are_cleared(tmp_path: Path) -> None:
    leftover = tmp_path / ".1-7.safetensors.99.tmp"
    leftover.write_bytes(b"half")
    assert CheckpointStore(tmp_path).paths() == []
    assert not leftover.exists()


def test_a_folder_that_is_gone_is_said(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="cannot write"):
        save_tensors(tmp_path / "no" / "x.safetensors", {"a": np.zeros(3, np.float32)}, {})


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b'{"a":{"dtype":"F64","shape":[1],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,-4]}}',
    ],
)
def test_hostile_headers_are_refused(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(CorruptDataError):
        load_tensors(path)
    path.write_bytes((2**62).to_bytes(8, "little"))
    with pytest.raises(CorruptDataError):
        load_tensors(path)
