"""Builds: deterministic, reused when equal, split cleanly, clear about input that cannot work."""

import errno
import fcntl
import os
import resource
from dataclasses import replace
from pathlib import Path

import pytest

from coordinator.corpus.build import (
    BuildProgress,
    BuildStage,
    build_corpus,
    check_corpus_fits,
    load_manifest,
    load_report,
    load_tokenizer_json,
    verify_dataset,
)
from coordinator.corpus.chunks import load_chunks
from coordinator.corpus.files import machine_errors, require_free_bytes
from coordinator.corpus.split import split_at_line
from protos.contract.chunk_format import Manifest, token_bytes_table, training_chunk_path
from protos.contract.errors import CorruptDataError, ErrorCode, MachineError, UsageError
from tests.coordinator.corpus.texts import made_up_text, write_folder

VOCAB_SIZE = 400
CHUNK_BYTES = 2_048


def build(folder: Path, out_dir: Path, **options: object) -> Manifest:
    """Build one folder with small chunks."""
    defaults: dict[str, object] = {"vocab_size": VOCAB_SIZE, "chunk_bytes": CHUNK_BYTES}
    return build_corpus([str(folder)], out_dir, **(defaults | options))  # type: ignore[arg-type]


def stages_of(folder: Path, out_dir: Path, **options: object) -> list[str]:
    """Stages that a build went through, the detail of the last one at the end."""
    seen: list[BuildProgress] = []
    build(folder, out_dir, on_progress=seen.append, **options)
    return [*dict.fromkeys(str(progress.stage) for progress in seen), seen[-1].detail]


def text_of(out_dir: Path, manifest: Manifest, *, is_heldout: bool) -> list[str]:
    """Documents of one split, decoded from the chunks."""
    table = token_bytes_table(load_tokenizer_json(out_dir, manifest))
    ids = [int(t) for c in load_chunks(out_dir, manifest, is_heldout=is_heldout) for t in c]
    documents: list[bytes] = [b""]
    for token in ids:
        if token == manifest.eos_token_id:
            documents.append(b"")
        else:
            documents[-1] += table[token]
    assert documents.pop() == b""
    return [document.decode() for document in documents]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty text files of about one kilobyte."""
    return write_folder(tmp_path_factory.mktemp("texts"), num_files=40, num_words=150)


def test_two_builds_are_equal(folder: Path, tmp_path: Path) -> None:
    one = build(folder, tmp_path / "one")
    moved = tmp_path / "elsewhere" / folder.name
    moved.parent.mkdir()
    moved.symlink_to(folder)
    two = build(moved, tmp_path / "two")
    assert one.dataset_id == two.dataset_id
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*"))
    assert len(files) > 5
    for path in files:
        assert (tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes()


def test_seed_and_parameters_change_the_dataset(folder: Path, tmp_path: Path) -> None:
    variants = [{}, {"seed": 1}, {"heldout_ratio": 0.1}, {"chunk_bytes": 4_096}]
    manifests = [
        build(folder, tmp_path / str(index), **options) for index, options in enumerate(variants)
    ]
    assert len({manifest.dataset_id for manifest in manifests}) == len(variants)


def test_every_document_is_in_exactly_one_split(folder: Path, tmp_path: Path) -> None:
    manifest = build(folder, tmp_path / "out")
    training = text_of(tmp_path / "out", manifest, is_heldout=False)
    heldout = text_of(tmp_path / "out", manifest, is_heldout=True)
    assert len(heldout) == 2
    originals = sorted(path.read_text() for path in folder.rglob("*.txt"))
    assert sorted(training + heldout) == originals
    assert training != sorted(training), "documents are shuffled"
    (source,) = manifest.sources
    assert source.num_documents == 40
    assert source.num_bytes == sum(len(text.encode()) for text in originals)
    entries = manifest.training_chunks + manifest.heldout_chunks
    assert source.num_tokens == sum(entry.num_tokens for entry in entries)
    assert source.num_bytes == sum(entry.num_bytes for entry in entries)
    assert all(e.num_tokens == CHUNK_BYTES // 2 for e in manifest.training_chunks[:-1])
    report = load_report(tmp_path / "out")
    assert report.dataset_id == manifest.dataset_id
    assert report.sources[0].num_heldout_documents == 2


def test_a_single_file_gives_its_end(tmp_path: Path) -> None:
    text = made_up_text(7, num_words=4_000)
    (tmp_path / "book.txt").write_text(text)
    manifest = build(tmp_path / "book.txt", tmp_path / "out")
    (training,) = text_of(tmp_path / "out", manifest, is_heldout=False)
    (heldout,) = text_of(tmp_path / "out", manifest, is_heldout=True)
    assert training + heldout == text
    assert training.endswith("\n")
    assert 0.04 < len(heldout) / len(text) < 0.06


def test_text_is_cut_at_a_line_end() -> None:
    assert split_at_line("one line", tail_ratio=0.05) == len("one line")
    assert split_at_line("a\nlong line", tail_ratio=0.05) == 2
    assert split_at_line("a long line\nb", tail_ratio=0.5) == 12
    assert split_at_line("1\n2\n3\n4\n", tail_ratio=0.5) == 4


def test_chunks_hold_one_source_each(folder: Path, tmp_path: Path) -> None:
    other = write_folder(tmp_path / "other", num_files=25, num_words=100, first_seed=1_000)
    manifest = build_corpus(
        [f"weight=1:{folder}", f"weight=3,name=other:{other}"],
        tmp_path / "out",
        vocab_size=VOCAB_SIZE,
        chunk_bytes=CHUNK_BYTES,
    )
    assert [source.weight for source in manifest.sources] == [1.0, 3.0]
    assert manifest.sources[1].name == "other"
    for is_heldout, entries in ((False, manifest.training_chunks), (True, manifest.heldout_chunks)):
        indices = [entry.source_index for entry in entries]
        assert indices == sorted(indices) and set(indices) == {0, 1}
        chunks = load_chunks(tmp_path / "out", manifest, is_heldout=is_heldout)
        assert chunks[indices.index(1) - 1][-1] == manifest.eos_token_id


def test_an_equal_build_is_reused_and_a_damaged_one_is_not(folder: Path, tmp_path: Path) -> None:
    out_dir = tmp_path / "out"
    assert stages_of(folder, out_dir)[-1] == "built"
    assert stages_of(folder, out_dir) == [BuildStage.SCAN, BuildStage.DONE, "reused"]
    chunk = out_dir / training_chunk_path(1)
    data = bytearray(chunk.read_bytes())
    data[100] ^= 1
    chunk.write_bytes(data)
    assert stages_of(folder, out_dir)[-1] == "built"
    (out_dir / "manifest.json").unlink()
    assert stages_of(folder, out_dir)[-1] == "built"
    (out_dir / "chunks" / "train-000000.bin.part").write_bytes(b"left by a crash")
    assert stages_of(folder, out_dir, seed=5)[-1] == "built"
    verify_dataset(out_dir)
    assert not list(out_dir.rglob("*.part"))


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_a_damaged_chunk_is_found(folder: Path, tmp_path: Path, damage: str) -> None:
    manifest = build(folder, tmp_path / "out")
    path = tmp_path / "out" / training_chunk_path(0)
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(data[:-2])
    else:
        data[7] ^= 0x10
        path.write_bytes(data)
    with pytest.raises(CorruptDataError):
        load_chunks(tmp_path / "out", manifest, is_heldout=False)
    with pytest.raises(CorruptDataError):
        verify_dataset(tmp_path / "out")


def test_progress_says_what_was_left_out(tmp_path: Path) -> None:
    seen: list[BuildProgress] = []
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "book.txt").write_text(made_up_text(3, num_words=4_000))
    (tmp_path / "texts" / "latin.txt").write_bytes(b"Gr\xfc\xdfe\n")
    build(tmp_path / "texts", tmp_path / "out", on_progress=seen.append)
    (detail,) = [p.detail for p in seen if p.stage is BuildStage.TOKENIZER]
    assert detail == ("1 documents of 0.0 MiB; left out: 1 NOT_IN_ENCODING (such as latin.txt)")
    assert all(0 <= progress.done_ratio <= 1 for progress in seen)
    report = load_report(tmp_path / "out")
    assert report.sources[0].num_skipped_by_reason == {"NOT_IN_ENCODING": 1}


def test_a_damaged_tokenizer_or_report_is_found(folder: Path, tmp_path: Path) -> None:
    build(folder, tmp_path / "out")
    with (tmp_path / "out" / "tokenizer.json").open("ab") as file:
        file.write(b" ")
    with pytest.raises(CorruptDataError, match=r"tokenizer\.json"):
        verify_dataset(tmp_path / "out")
    (tmp_path / "out" / "build.json").write_bytes(b"[]")
    with pytest.raises(CorruptDataError, match=r"build\.json"):
        load_report(tmp_path / "out")


def test_a_folder_without_a_finished_build_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no finished corpus"):
        load_manifest(tmp_path)


def test_corpora_too_small_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.txt").write_text("a\nb\n")
    with pytest.raises(UsageError, match="training tokens"):
        build(tmp_path / "tiny.txt", tmp_path / "tiny")
    (tmp_path / "line.txt").write_text("word " * 5_000)
    with pytest.raises(UsageError, match="no held-out text"):
        build(tmp_path / "line.txt", tmp_path / "line")
    manifest = build(folder, tmp_path / "out")
    check_corpus_fits(manifest, seq_len=32, global_batch_tokens=1_024)
    with pytest.raises(UsageError, match="less than one batch of 1000000"):
        check_corpus_fits(manifest, seq_len=32, global_batch_tokens=1_000_000)
    with pytest.raises(UsageError, match="less than one batch"):
        check_corpus_fits(manifest, seq_len=CHUNK_BYTES, global_batch_tokens=1)
    with pytest.raises(UsageError, match="no held-out chunk"):
        nothing_held_out = replace(manifest, heldout_chunks=())
        check_corpus_fits(nothing_held_out, seq_len=32, global_batch_tokens=1)


def test_an_empty_corpus_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no usable text"):
        build(tmp_path / "empty", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [{"chunk_bytes": 1_000}, {"chunk_bytes": 2**21}, {"heldout_ratio": 0.0}, {"vocab_size": 100}],
)
def test_bad_parameters_are_refused(folder: Path, tmp_path: Path, options: dict) -> None:
    with pytest.raises(UsageError):
        build(folder, tmp_path / "out", **options)


def test_foreign_files_are_never_touched(folder: Path, tmp_path: Path) -> None:
    out_dir = tmp_path / "out"
    (out_dir / "chunks").mkdir(parents=True)
    (out_dir / "chunks" / "holiday.jpg").write_bytes(b"\1")
    with pytest.raises(UsageError, match=r"holiday\.jpg"):
        build(folder, out_dir)
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UsageError, match="cannot be a folder"):
        build(folder, tmp_path / "file")
    with pytest.raises(UsageError, match="cannot be a folder"):
        build(folder, tmp_path / "file" / "below")


def test_one_build_per_folder(folder: Path, tmp_path: Path) -> None:
    out_dir = tmp_path / "out"
    out_dir.mkdir()
    descriptor = os.open(out_dir, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(MachineError, match="another process") as caught:
            build(folder, out_dir)
    finally:
        os.close(descriptor)
    assert caught.value.code == ErrorCode.DATA_DIR_LOCKED


def test_a_full_disk_is_reported_and_the_build_can_be_repeated(
    folder: Path, tmp_path: Path
) -> None:
    """A limit on file sizes stands for the full disk; the tokenizer does not fit below it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_096, hard))
    try:
        with pytest.raises(MachineError, match="no room left") as caught:
            build(folder, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.code == ErrorCode.DISK_FULL
    assert not (tmp_path / "out" / "manifest.json").exists()
    build(folder, tmp_path / "out")
    verify_dataset(tmp_path / "out")


def test_disk_errors_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(MachineError) as caught, machine_errors(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.code == ErrorCode.DISK_FULL
    with pytest.raises(MachineError) as caught, machine_errors(tmp_path):
        raise OSError(errno.EROFS, "Read-only file system")
    assert caught.value.code == ErrorCode.PERMISSION_DENIED
    with pytest.raises(MachineError, match="bytes are free"):
        require_free_bytes(tmp_path, needed_bytes=2**60)


def test_a_folder_that_cannot_be_made_is_reported(folder: Path) -> None:
    """Nobody, root included, can make a folder in /proc."""
    with pytest.raises(MachineError, match="cannot be written"):
        build(folder, Path("/proc/muster-corpus"))
