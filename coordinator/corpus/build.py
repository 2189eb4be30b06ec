"""Build a dataset directory: scan -> split -> tokenizer -> chunks -> manifest.

The tokenizer is trained on training text only, never on held-out text. Chunks are cut from one
stream per source and split: no chunk mixes sources or crosses the line to held-out text. Everything
depends on texts and parameters only, so equal input gives an equal dataset id.

`manifest.json` is written last, so a directory without it is unfinished. `build.json` beside it
holds the key of the build (digest of all texts and parameters) and what was left out: a finished
build with the same key is verified and reused, any other is replaced. The default corpus takes
about 7 s on two cores.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import Any

from coordinator.corpus.answers import pack_answers
from coordinator.corpus.chunks import ChunkWriter, load_chunks, load_dataset_file
from coordinator.corpus.files import (
    building_in,
    clear_build,
    require_free_bytes,
    sync_folder,
    write_file,
)
from coordinator.corpus.sources import Source, scan_sources, scan_summary
from coordinator.corpus.split import Part, Split, order_key, split_source
from coordinator.corpus.tokenizer import (
    DEFAULT_VOCAB_SIZE,
    EOS_TOKEN_ID,
    GivenTokenizer,
    check_vocab_size,
    encode_documents,
    load_tokenizer,
    take_sample,
    train_tokenizer,
)
from protos.contract import chunk_format
from protos.contract.chunk_format import ChunkEntry, Manifest, TokenArray
from protos.contract.digest import canonical_json
from protos.contract.errors import CorruptDataError, ErrorCode, MachineError, UsageError

PIPELINE_VERSION = 1
"""Rises when the same texts would give another dataset."""

REPORT_FILE = "build.json"
SMALL_CHUNK_BYTES = 2**16
LARGE_CHUNK_BYTES = 2**20
LARGE_CORPUS_TEXT_BYTES = 96 * 2**20
"""Larger corpora, which have more than about 64 MiB of tokens, are cut into large chunks."""

MIN_TRAINING_TOKENS = 1_024
"""Below that there is nothing to train, whatever the model; `check_corpus_fits` knows the batch."""


class BuildStage(StrEnum):
    """What a build is doing."""

    SCAN = "SCAN"
    TOKENIZER = "TOKENIZER"
    ANSWERS = "ANSWERS"
    """Encoding and packing of records; then there is no tokenizer to train."""
    TRAINING_CHUNKS = "TRAINING_CHUNKS"
    HELDOUT_CHUNKS = "HELDOUT_CHUNKS"
    DONE = "DONE"


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildProgress:
    """Reported through `on_progress`."""

    stage: BuildStage
    done_ratio: float
    """Share of the stage that is done, 0 to 1."""
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceReport:
    """What became of the files of one source."""

    name: str
    num_documents: int
    num_heldout_documents: int
    """Documents that are wholly or partly held out."""
    num_skipped_by_reason: dict[str, int]
    skipped_names_by_reason: dict[str, list[str]]
    """The first few of each reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildReport:
    """Contents of build.json: what the manifest does not say."""

    build_key: str
    dataset_id: str
    sources: tuple[SourceReport, ...]


OnProgress = Callable[[BuildProgress], None]


def build_corpus(
    sources: Sequence[str],
    out_dir: Path,
    *,
    vocab_size: int = DEFAULT_VOCAB_SIZE,
    given_tokenizer: GivenTokenizer | None = None,
    answer_seq_len: int = 0,
    chunk_bytes: int | None = None,
    heldout_ratio: float = 0.05,
    seed: int = 0,
    min_training_tokens: int = MIN_TRAINING_TOKENS,
    on_progress: OnProgress | None = None,
) -> Manifest:
    """Build the dataset of the SOURCE strings in `out_dir`, or reuse an equal finished build.

    `chunk_bytes` None chooses by the size of the corpus; `given_tokenizer` replaces training one;
    `answer_seq_len`: the sources are records, to be packed into windows of that length. Raises
    UsageError for input that a person can correct, MachineError when the disk is full or the folder
    cannot be written, CorruptDataError when a file changed meanwhile.
    """
    report = on_progress or (lambda progress: None)
    check_vocab_size(vocab_size)
    _check_parameters(chunk_bytes=chunk_bytes, heldout_ratio=heldout_ratio)
    report(BuildProgress(stage=BuildStage.SCAN, done_ratio=0.0))
    scanned = scan_sources(sources)
    num_text_bytes = sum(d.num_text_bytes for source in scanned for d in source.documents)
    if chunk_bytes is None:
        is_large = num_text_bytes > LARGE_CORPUS_TEXT_BYTES
        is_large |= answer_seq_len >= SMALL_CHUNK_BYTES // 4  # a token has at most 4 bytes
        chunk_bytes = LARGE_CHUNK_BYTES if is_large else SMALL_CHUNK_BYTES
    builder = _Builder(
        out_dir=out_dir,
        seed=seed,
        chunk_bytes=chunk_bytes,
        vocab_size=vocab_size,
        given_tokenizer=given_tokenizer,
        answer_seq_len=answer_seq_len,
        heldout_ratio=heldout_ratio,
        min_training_tokens=min_training_tokens,
        report=report,
    )
    build_key = builder.build_key(scanned)
    with building_in(out_dir):
        manifest = _finished_build(out_dir, build_key)
        detail = "reused"
        if manifest is None:
            splits = [split_source(s, seed=seed, heldout_ratio=heldout_ratio) for s in scanned]
            windows_by_part = builder.pack_answers(scanned, splits) if answer_seq_len else {}
            clear_build(out_dir)
            require_free_bytes(out_dir, needed_bytes=num_text_bytes)
            manifest = builder.build(scanned, splits, windows_by_part, build_key=build_key)
            detail = "built"
    report(BuildProgress(stage=BuildStage.DONE, done_ratio=1.0, detail=detail))
    return manifest


def load_manifest(dataset_dir: Path) -> Manifest:
    """Manifest of a finished build.

    Raises UsageError when there is none, MachineError when this user may not read it,
    CorruptDataError when it is damaged.
    """
    path = dataset_dir / chunk_format.MANIFEST_FILE
    try:
        data = path.read_bytes()
    except PermissionError as error:
        raise MachineError(
            f"cannot read {path}: {error.strerror}",
            allowed="a dataset that this user may read",
            remedy="correct its owner and mode, or run as the user that owns it",
            code=ErrorCode.PERMISSION_DENIED,
        ) from error
    except OSError as error:
        raise UsageError(
            f"{dataset_dir} holds no finished corpus: {error.strerror or error}",
            allowed="a folder that `corpus build` finished",
            remedy="run `muster-coordinator corpus build SOURCE... --out DIR`",
        ) from error
    try:
        return Manifest.from_bytes(data)
    except CorruptDataError as error:
        raise CorruptDataError(
            f"{path} is damaged: {error.found}", allowed=error.allowed, remedy=error.remedy
        ) from error


def load_report(dataset_dir: Path) -> BuildReport:
    """What a finished build left out and why.

    Raises CorruptDataError when build.json is missing or damaged.
    """
    try:
        plain: dict[str, Any] = json.loads(load_dataset_file(dataset_dir / REPORT_FILE))
        reports = tuple(SourceReport(**source) for source in plain.pop("sources"))
        return BuildReport(sources=reports, **plain)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CorruptDataError(
            f"{dataset_dir / REPORT_FILE} cannot be parsed: {error!r}",
            allowed="what `corpus build` wrote",
            remedy="build the corpus again",
        ) from error


def load_tokenizer_json(dataset_dir: Path, manifest: Manifest) -> bytes:
    """Contents of tokenizer.json. Raises CorruptDataError when it is missing or damaged."""
    data = load_dataset_file(dataset_dir / chunk_format.TOKENIZER_FILE)
    digest = hashlib.sha256(data).hexdigest()
    if digest != manifest.tokenizer_digest:
        raise CorruptDataError(
            f"tokenizer.json has digest {digest[:16]}...",
            allowed=f"{manifest.tokenizer_digest[:16]}..., as the manifest says",
            remedy="build the corpus again",
        )
    return data


def verify_dataset(dataset_dir: Path) -> Manifest:
    """Check every file of a finished build against the manifest.

    Raises CorruptDataError for the first that differs; the manifest itself is compared with
    build.json, where that was copied along.
    """
    manifest = load_manifest(dataset_dir)
    has_report = (dataset_dir / REPORT_FILE).is_file()
    built_id = load_report(dataset_dir).dataset_id if has_report else manifest.dataset_id
    if manifest.dataset_id != built_id:
        raise CorruptDataError(
            f"{dataset_dir / chunk_format.MANIFEST_FILE} has digest {manifest.dataset_id[:16]}...",
            allowed=f"{built_id[:16]}..., as {REPORT_FILE} says",
            remedy="build the corpus again; a dataset is never edited by hand",
        )
    load_tokenizer_json(dataset_dir, manifest)
    load_chunks(dataset_dir, manifest, is_heldout=False)
    load_chunks(dataset_dir, manifest, is_heldout=True)
    return manifest


def check_corpus_fits(manifest: Manifest, *, seq_len: int, global_batch_tokens: int) -> None:
    """Raise UsageError unless there is one batch of whole windows and one held-out window."""
    training_tokens = seq_len * _num_windows(manifest.training_chunks, seq_len=seq_len)
    if training_tokens < global_batch_tokens:
        raise UsageError(
            f"the corpus holds {training_tokens} tokens in whole windows of {seq_len}, less than "
            f"one batch of {global_batch_tokens}",
            allowed="a corpus of at least one batch",
            remedy="add text, or lower strategy.global_batch_tokens or model.seq_len",
        )
    if not _num_windows(manifest.heldout_chunks, seq_len=seq_len):
        raise UsageError(
            f"no held-out chunk holds a window of {seq_len} tokens",
            allowed="at least one held-out window",
            remedy="add text, raise the held-out ratio or lower model.seq_len",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Builder:
    """Writes one dataset; holds what all stages need."""

    out_dir: Path
    seed: int
    chunk_bytes: int
    vocab_size: int
    given_tokenizer: GivenTokenizer | None
    answer_seq_len: int
    heldout_ratio: float
    min_training_tokens: int
    report: OnProgress

    def build_key(self, sources: Sequence[Source]) -> str:
        """Digest of everything that the dataset depends on."""
        plain_sources = []
        for source in sources:
            texts = hashlib.sha256()
            for document in source.documents:
                texts.update(document.text_digest)
            plain_sources.append(
                [source.name, source.origin, source.licence, source.weight, texts.hexdigest()]
            )
        plain: dict[str, Any] = {
            "pipeline_version": PIPELINE_VERSION,
            "tokenizers_version": version("tokenizers"),
            "vocab_size": self.vocab_size,
            "chunk_bytes": self.chunk_bytes,
            "heldout_ratio": self.heldout_ratio,
            "seed": self.seed,
            "sources": plain_sources,
        }
        given = self.given_tokenizer
        if given is not None:
            plain["tokenizer"] = hashlib.sha256(given.tokenizer_json).hexdigest()
            plain["eos_token_id"] = given.eos_token_id
        if self.answer_seq_len:
            plain["answer_seq_len"] = self.answer_seq_len
        return hashlib.sha256(canonical_json(plain)).hexdigest()

    @property
    def eos_token_id(self) -> int:
        """Token that ends a document."""
        return self.given_tokenizer.eos_token_id if self.given_tokenizer else EOS_TOKEN_ID

    def pack_answers(
        self, sources: Sequence[Source], splits: Sequence[Split]
    ) -> dict[Part, TokenArray]:
        """Windows of every part; nothing is written yet."""
        detail = scan_summary(sources)

        def report(done_ratio: float) -> None:
            self.report(
                BuildProgress(stage=BuildStage.ANSWERS, done_ratio=done_ratio, detail=detail)
            )

        report(0.0)
        return pack_answers(
            splits,
            self.given_tokenizer,
            seq_len=self.answer_seq_len,
            chunk_bytes=self.chunk_bytes,
            on_done_ratio=report,
        )

    def build(
        self,
        sources: Sequence[Source],
        splits: Sequence[Split],
        windows_by_part: Mapping[Part, TokenArray],
        *,
        build_key: str,
    ) -> Manifest:
        """Run the other stages; the manifest is written last."""
        if not self.answer_seq_len:
            detail = scan_summary(sources)
            self.report(BuildProgress(stage=BuildStage.TOKENIZER, done_ratio=0.0, detail=detail))
        tokenizer_json = self._train_tokenizer(splits)
        write_file(self.out_dir / chunk_format.TOKENIZER_FILE, tokenizer_json)
        training, heldout = (
            self._write_chunks(splits, windows_by_part, tokenizer_json, is_heldout=is_heldout)
            for is_heldout in (False, True)
        )
        _check_sizes(training, heldout, min_training_tokens=self.min_training_tokens)
        vocab_size = chunk_format.token_byte_lengths(tokenizer_json).size
        manifest = Manifest(
            vocab_size=vocab_size,
            eos_token_id=self.eos_token_id,
            token_dtype=chunk_format.token_dtype_for(vocab_size),
            tokenizer_digest=hashlib.sha256(tokenizer_json).hexdigest(),
            chunk_bytes=self.chunk_bytes,
            seed=self.seed,
            sources=tuple(
                _manifest_source(source, index, training, heldout)
                for index, source in enumerate(sources)
            ),
            training_chunks=tuple(training),
            heldout_chunks=tuple(heldout),
            answer_seq_len=self.answer_seq_len,
        )
        report = BuildReport(
            build_key=build_key,
            dataset_id=manifest.dataset_id,
            sources=tuple(map(_source_report, sources, splits)),
        )
        write_file(self.out_dir / REPORT_FILE, canonical_json(asdict(report)))
        sync_folder(self.out_dir / "chunks")
        write_file(self.out_dir / chunk_format.MANIFEST_FILE, manifest.to_bytes())
        sync_folder(self.out_dir)
        return manifest

    def _train_tokenizer(self, splits: Sequence[Split]) -> bytes:
        if self.given_tokenizer is not None:
            return self.given_tokenizer.tokenizer_json
        parts = [part for split in splits for part in split.training]
        parts.sort(key=lambda part: order_key(part.document, seed=self.seed, purpose="sample"))
        sizes_bytes = [part.document.num_text_bytes for part in parts]
        sample = take_sample(sizes_bytes, lambda index: parts[index].load_text())
        return train_tokenizer(sample, vocab_size=self.vocab_size)

    def _write_chunks(
        self,
        splits: Sequence[Split],
        windows_by_part: Mapping[Part, TokenArray],
        tokenizer_json: bytes,
        *,
        is_heldout: bool,
    ) -> list[ChunkEntry]:
        """Encode one split of all sources and write its chunks."""
        writer = ChunkWriter(
            dataset_dir=self.out_dir,
            is_heldout=is_heldout,
            chunk_bytes=self.chunk_bytes,
            byte_lengths=chunk_format.token_byte_lengths(tokenizer_json),
            answer_seq_len=self.answer_seq_len,
            eos_token_id=self.eos_token_id,
        )
        stage = BuildStage.HELDOUT_CHUNKS if is_heldout else BuildStage.TRAINING_CHUNKS
        parts_by_source = [split.heldout if is_heldout else split.training for split in splits]
        total_bytes = sum(p.document.num_text_bytes for parts in parts_by_source for p in parts)
        done_bytes = 0
        for source_index, parts in enumerate(parts_by_source):
            documents = encode_documents(
                load_tokenizer(tokenizer_json),
                (part.load_text() for part in parts),
                dtype=writer.dtype,
                eos_token_id=self.eos_token_id,
            )
            if self.answer_seq_len:
                documents = (windows_by_part[part] for part in parts)
            for part, tokens in zip(parts, documents, strict=True):
                writer.add(tokens, source_index=source_index)
                done_bytes += part.document.num_text_bytes
                self.report(BuildProgress(stage=stage, done_ratio=done_bytes / total_bytes))
            writer.end_source(source_index=source_index)
        return writer.entries


def _finished_build(out_dir: Path, build_key: str) -> Manifest | None:
    """The build in the folder if finished, whole and the same; a damaged one counts as none."""
    if not (out_dir / chunk_format.MANIFEST_FILE).exists():
        return None
    try:
        report = load_report(out_dir)
        if report.build_key != build_key:
            return None
        return verify_dataset(out_dir)
    except CorruptDataError:
        return None


def _check_parameters(*, chunk_bytes: int | None, heldout_ratio: float) -> None:
    if chunk_bytes is not None and not (
        1_024 <= chunk_bytes <= LARGE_CHUNK_BYTES and chunk_bytes % 4 == 0
    ):
        raise UsageError(
            f"chunks of {chunk_bytes} bytes",
            allowed=f"a multiple of 4 from 1024 to {LARGE_CHUNK_BYTES}",
            remedy="leave it out to choose by the size of the corpus",
        )
    if not 0 < heldout_ratio <= 0.5:
        raise UsageError(
            f"held-out ratio {heldout_ratio}",
            allowed="above 0, at most 0.5",
            remedy="0.05 is usual",
        )


def _check_sizes(
    training: Sequence[ChunkEntry], heldout: Sequence[ChunkEntry], *, min_training_tokens: int
) -> None:
    num_tokens = sum(chunk.num_tokens for chunk in training)
    if num_tokens < min_training_tokens:
        raise UsageError(
            f"the corpus gives {num_tokens} training tokens",
            allowed=f"at least {min_training_tokens}",
            remedy="add text",
        )
    if not any(chunk.num_bytes for chunk in heldout):
        raise UsageError(
            "the corpus gives no held-out text: no file has a second line",
            allowed="files of several lines, or at least 20 files",
            remedy="add text",
        )


def _manifest_source(
    source: Source, index: int, training: Sequence[ChunkEntry], heldout: Sequence[ChunkEntry]
) -> chunk_format.Source:
    num_training = sum(c.num_tokens for c in training if c.source_index == index)
    num_heldout = sum(c.num_tokens for c in heldout if c.source_index == index)
    return chunk_format.Source(
        name=source.name,
        origin=source.origin,
        licence=source.licence,
        weight=float(num_training if source.weight is None else source.weight),
        num_documents=len(source.documents),
        num_bytes=sum(document.num_text_bytes for document in source.documents),
        num_tokens=num_training + num_heldout,
    )


def _source_report(source: Source, split: Split) -> SourceReport:
    return SourceReport(
        name=source.name,
        num_documents=len(source.documents),
        num_heldout_documents=len(split.heldout),
        num_skipped_by_reason=dict(source.skipped.num_by_reason),
        skipped_names_by_reason=dict(source.skipped.names_by_reason),
    )


def _num_windows(chunks: Sequence[ChunkEntry], *, seq_len: int) -> int:
    return sum(chunk_format.num_windows(chunk.num_tokens, seq_len) for chunk in chunks)
