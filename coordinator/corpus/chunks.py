"""Chunk files: written from a stream of tokens, read back verified."""

import hashlib
from pathlib import Path

import numpy as np

from coordinator.corpus.files import write_file
from protos.contract import chunk_format
from protos.contract.chunk_format import ChunkEntry, Manifest, TokenArray
from protos.contract.errors import CorruptDataError


class ChunkWriter:
    """Cuts the token streams of one split into chunk files; `entries` describes those written."""

    def __init__(
        self,
        *,
        dataset_dir: Path,
        is_heldout: bool,
        chunk_bytes: int,
        byte_lengths: chunk_format.Int64Array,
        answer_seq_len: int = 0,
        eos_token_id: int = 0,
    ) -> None:
        """`byte_lengths` has an element for each entry of the vocabulary. With `answer_seq_len`
        chunks are cut between windows of that length, and end with an EOS.
        """
        self.entries: list[ChunkEntry] = []
        self.dtype = np.dtype(chunk_format.token_dtype_for(byte_lengths.size))
        self._dataset_dir = dataset_dir
        self._is_heldout = is_heldout
        self._chunk_tokens = chunk_bytes // self.dtype.itemsize
        self._end = np.full(min(answer_seq_len, 1), eos_token_id, self.dtype)
        if answer_seq_len:
            self._chunk_tokens = (self._chunk_tokens - 1) // answer_seq_len * answer_seq_len
        self._byte_lengths = byte_lengths
        self._pending: list[TokenArray] = []
        self._num_pending_tokens = 0

    def add(self, tokens: TokenArray, *, source_index: int) -> None:
        """Append a document's tokens and write the chunks that are full."""
        self._pending.append(tokens)
        self._num_pending_tokens += tokens.size
        if self._num_pending_tokens < self._chunk_tokens:
            return
        joined = np.concatenate(self._pending)
        num_full_tokens = joined.size // self._chunk_tokens * self._chunk_tokens
        for begin in range(0, num_full_tokens, self._chunk_tokens):
            self._write(joined[begin : begin + self._chunk_tokens], source_index=source_index)
        self._pending = [joined[num_full_tokens:].copy()]
        self._num_pending_tokens = joined.size - num_full_tokens

    def end_source(self, *, source_index: int) -> None:
        """Write what is left as a shorter chunk; the next source begins a new one."""
        if self._num_pending_tokens:
            self._write(np.concatenate(self._pending), source_index=source_index)
        self._pending, self._num_pending_tokens = [], 0

    def _write(self, tokens: TokenArray, *, source_index: int) -> None:
        tokens = np.concatenate([tokens, self._end])
        data = chunk_format.chunk_from_tokens(
            tokens.astype(np.int64), vocab_size=self._byte_lengths.size
        )
        write_file(_chunk_path(self._dataset_dir, len(self.entries), self._is_heldout), data)
        self.entries.append(
            ChunkEntry(
                source_index=source_index,
                num_tokens=int(tokens.size),
                digest=hashlib.sha256(data).hexdigest(),
                num_bytes=int(self._byte_lengths[tokens].sum()),
            )
        )


def load_chunks(dataset_dir: Path, manifest: Manifest, *, is_heldout: bool) -> list[TokenArray]:
    """Verified tokens of all chunks of one split.

    Raises CorruptDataError for any that is missing or damaged.
    """
    chunks = manifest.heldout_chunks if is_heldout else manifest.training_chunks
    arrays = []
    for index, chunk in enumerate(chunks):
        path = _chunk_path(dataset_dir, index, is_heldout)
        data = load_dataset_file(path)
        try:
            arrays.append(chunk_format.tokens_from_chunk(data, manifest=manifest, chunk=chunk))
        except CorruptDataError as error:
            raise CorruptDataError(
                f"{path} is damaged: {error.found}",
                allowed=error.allowed,
                remedy="restore it, or build the corpus again",
            ) from error
    return arrays


def load_dataset_file(path: Path) -> bytes:
    """Bytes of a file that a finished dataset must have.

    Raises CorruptDataError when it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise CorruptDataError(
            f"{path} cannot be read: {error.strerror or error}",
            allowed="every file that the manifest names",
            remedy="build the corpus again",
        ) from error


def _chunk_path(dataset_dir: Path, chunk_index: int, is_heldout: bool) -> Path:
    if is_heldout:
        return dataset_dir / chunk_format.heldout_chunk_path(chunk_index)
    return dataset_dir / chunk_format.training_chunk_path(chunk_index)
