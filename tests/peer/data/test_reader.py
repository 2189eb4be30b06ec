"""Reader: no token of a damaged file is used, and windows come in the run's order."""

from pathlib import Path

import numpy as np
import pytest

from peer.data.reader import (
    ChunkReader,
    leased_range_from_signed,
    load_tokens,
    load_verified,
)
from protos.contract.errors import CorruptDataError
from protos.contract.schedule_order import window_order
from tests.peer.data.chunks import SEQ_LEN, VOCAB_SIZE, causal_builder, signed_lease, write_chunk


def reader() -> ChunkReader:
    """Reader of a run with seed 7."""
    return ChunkReader(causal_builder(), seed=7, seq_len=SEQ_LEN, vocab_size=VOCAB_SIZE)


def test_windows_come_in_permuted_order(tmp_path: Path) -> None:
    path = write_chunk(tmp_path)
    signed = signed_lease(path, lease_number=1, begin=2, end=6)
    leased = leased_range_from_signed(signed, path=path)
    assert (leased.lease, leased.num_windows, leased.data_pass) == (signed, 4, 1)
    examples = reader().read_windows(leased, 3, 6)
    inputs_BT, labels_BT = examples.inputs_BT, examples.labels_BT
    order = window_order(7, data_pass=1, chunk_index=3, chunk_windows=10)
    expected_BT = order[3:6, None] * SEQ_LEN + np.arange(SEQ_LEN)
    np.testing.assert_array_equal(inputs_BT, expected_BT)
    np.testing.assert_array_equal(labels_BT, expected_BT + 1)
    assert inputs_BT.dtype == labels_BT.dtype == np.int64


def test_a_reader_changes_chunks(tmp_path: Path) -> None:
    chunk_reader = reader()
    for first in (0, 500, 0):
        path = write_chunk(tmp_path, first=first)
        signed = signed_lease(path, lease_number=1, begin=0, end=10)
        leased = leased_range_from_signed(signed, path=path)
        inputs_BT = chunk_reader.read_windows(leased, 0, 10).inputs_BT
        assert sorted(inputs_BT.ravel()) == list(range(first, first + 40))


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing", "extended"])
def test_damaged_files_are_refused(tmp_path: Path, damage: str) -> None:
    path = write_chunk(tmp_path)
    digest = bytes.fromhex(path.name)
    leased = leased_range_from_signed(signed_lease(path, lease_number=1, begin=0, end=1), path=path)
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(data[:-1])
    elif damage == "extended":
        path.write_bytes(data + b"\0")
    else:
        data[11] ^= 0x40
        path.write_bytes(data)
    for digest_or_name in (digest, None):
        with pytest.raises(CorruptDataError):
            load_verified(path, digest=digest_or_name)
    with pytest.raises(CorruptDataError):
        reader().read_windows(leased, 0, 1)


def test_files_of_another_dataset_are_refused(tmp_path: Path) -> None:
    path = write_chunk(tmp_path, first=VOCAB_SIZE - 3)
    with pytest.raises(CorruptDataError, match="tokens below"):
        load_tokens(path, vocab_size=VOCAB_SIZE)
    path = write_chunk(tmp_path)
    assert load_tokens(path, vocab_size=VOCAB_SIZE).size == 41
    with pytest.raises(CorruptDataError, match="whole tokens"):
        load_tokens(path, vocab_size=70_000)
    leased = leased_range_from_signed(
        signed_lease(path, lease_number=1, begin=8, end=11), path=path
    )
    with pytest.raises(CorruptDataError, match="windows up to 11"):
        reader().read_windows(leased, 8, 9)


def test_only_digests_name_files(tmp_path: Path) -> None:
    path = tmp_path / "chunk.bin"
    path.write_bytes(b"x")
    with pytest.raises(CorruptDataError, match="file name"):
        load_verified(path)


def test_bytes_that_are_no_lease_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CorruptDataError, match="does not parse"):
        leased_range_from_signed(b"\xff\xff", path=tmp_path)
    path = write_chunk(tmp_path)
    for number, begin, end in ((0, 0, 1), (1, 2, 2), (1, 3, 2)):
        signed = signed_lease(path, lease_number=number, begin=begin, end=end)
        with pytest.raises(CorruptDataError, match="at least one window"):
            leased_range_from_signed(signed, path=path)
