"""Datasets: the manifest, chunk files, and the windows inside a chunk.

A dataset directory holds `manifest.json` (canonical JSON; its SHA-256 is the dataset id),
`tokenizer.json` and chunk files of little-endian token ids, documents ended by the EOS id. Chunk
and tokenizer are checked by the digests in the manifest.

A chunk of n tokens holds (n - 1) // T windows of T tokens: window w reads tokens [w T, w T + T) and
predicts the same range shifted by one, so every window lies inside its chunk, nothing is masked and
each token is predicted at most once. Letters: B windows, T positions.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from protos.contract.digest import canonical_json
from protos.contract.errors import CorruptDataError, MusterError
from protos.contract.run_spec import parse_fields, plain_fields, wire_fields
from protos.contract.strategy_spec import ADDED_LATER

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
TOKENIZER_FILE = "tokenizer.json"
TOKEN_DTYPES: tuple[str, ...] = ("<u2", "<u4")
_MAX_U2_VOCAB = 65_536
MIN_ANSWER_SEQ_LEN = 4
"""A prompt and an answer of a token each, and what ends them."""

Int64Array = npt.NDArray[np.int64]
TokenArray = npt.NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where text came from and how much of it there is, held-out text included."""

    name: str
    origin: str
    """Path, address or `stdlib:` name, as given."""
    licence: str
    weight: float
    """Share in the mixture; relative to the other sources, above 0."""
    num_documents: int
    num_bytes: int
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkEntry:
    """One chunk file."""

    source_index: int
    num_tokens: int
    digest: str
    """Hex SHA-256 of the file."""
    num_bytes: int
    """Bytes of UTF-8 text that its tokens stand for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Contents of a dataset."""

    format_version: int = FORMAT_VERSION
    vocab_size: int
    eos_token_id: int
    token_dtype: str
    """numpy name of the token type: "<u2" or "<u4"; see token_dtype_for."""
    tokenizer_digest: str
    """Hex SHA-256 of tokenizer.json."""
    chunk_bytes: int
    """Largest chunk file."""
    seed: int
    """What the split into training and held-out text depends on."""
    sources: tuple[Source, ...]
    training_chunks: tuple[ChunkEntry, ...]
    heldout_chunks: tuple[ChunkEntry, ...]
    answer_seq_len: int = field(default=0, metadata=ADDED_LATER)
    """Tokens of the windows that hold whole records of a prompt and its answer
    (answer_records.py); 0: running text.
    """

    def __post_init__(self) -> None:
        _check(
            self.format_version == FORMAT_VERSION,
            f"format_version {self.format_version}",
            f"{FORMAT_VERSION}",
        )
        _check(
            self.answer_seq_len == 0 or self.answer_seq_len >= MIN_ANSWER_SEQ_LEN,
            f"answer_seq_len {self.answer_seq_len}",
            f"0, or at least {MIN_ANSWER_SEQ_LEN}",
        )
        expected = token_dtype_for(self.vocab_size)
        _check(self.token_dtype == expected, f"token_dtype {self.token_dtype!r}", expected)
        _check(
            0 <= self.eos_token_id < self.vocab_size,
            f"eos_token_id {self.eos_token_id}",
            "below vocab_size",
        )
        _check(_is_digest(self.tokenizer_digest), "tokenizer_digest", "64 lower-case hex digits")
        for index, source in enumerate(self.sources):
            _check(
                source.weight > 0, f"source {index} with weight {source.weight}", "a weight above 0"
            )
        for kind, chunks in (("training", self.training_chunks), ("heldout", self.heldout_chunks)):
            for index, chunk in enumerate(chunks):
                where = f"{kind} chunk {index}"
                in_range = 0 <= chunk.source_index < len(self.sources)
                _check(
                    in_range,
                    f"{where} of source {chunk.source_index}",
                    f"below {len(self.sources)}",
                )
                size_bytes = self.file_bytes(chunk)
                fits = 0 < size_bytes <= self.chunk_bytes
                _check(
                    fits, f"{where} of {size_bytes} bytes", f"1 to chunk_bytes = {self.chunk_bytes}"
                )
                _check(_is_digest(chunk.digest), f"digest of {where}", "64 lower-case hex digits")
                is_whole = not self.answer_seq_len or chunk.num_tokens % self.answer_seq_len == 1
                _check(
                    is_whole,
                    f"{where} of {chunk.num_tokens} tokens",
                    f"windows of answer_seq_len = {self.answer_seq_len}, and one token",
                )

    def to_bytes(self) -> bytes:
        """Canonical JSON; the contents of manifest.json."""
        plain = wire_fields(self)
        for name in ("sources", "training_chunks", "heldout_chunks"):
            plain[name] = [plain_fields(item) for item in plain[name]]
        return canonical_json(plain)

    @classmethod
    def from_bytes(cls, data: bytes) -> "Manifest":
        """Parse manifest.json. Raises CorruptDataError for anything but what `to_bytes` writes."""
        try:
            plain = json.loads(data)
            lists: dict[str, Any] = {
                "sources": _parse_list(Source, plain.pop("sources"), where="sources"),
                "training_chunks": _parse_list(
                    ChunkEntry, plain.pop("training_chunks"), where="training_chunks"
                ),
                "heldout_chunks": _parse_list(
                    ChunkEntry, plain.pop("heldout_chunks"), where="heldout_chunks"
                ),
            }
            scalars = parse_fields(_ManifestScalars, plain, where="manifest")
            manifest = cls(**plain_fields(scalars), **lists)
        except (
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            RecursionError,
            MusterError,
        ) as error:
            raise _corrupt_manifest(f"it does not parse ({error})") from error
        if manifest.to_bytes() != data:
            raise _corrupt_manifest("it is not in canonical form")
        return manifest

    @property
    def dataset_id(self) -> str:
        """Hex SHA-256 of the canonical bytes."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def file_bytes(self, chunk: ChunkEntry) -> int:
        """Size of a chunk's file."""
        return chunk.num_tokens * np.dtype(self.token_dtype).itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class _ManifestScalars:
    """The fields of a Manifest that are not lists, for strict parsing."""

    format_version: int
    vocab_size: int
    eos_token_id: int
    token_dtype: str
    tokenizer_digest: str
    chunk_bytes: int
    seed: int
    answer_seq_len: int = 0


def token_dtype_for(vocab_size: int) -> str:
    """Type of token ids in chunk files."""
    return "<u2" if vocab_size <= _MAX_U2_VOCAB else "<u4"


def training_chunk_path(chunk_index: int) -> str:
    """Path of a training chunk inside the dataset directory."""
    return f"chunks/train-{chunk_index:06d}.bin"


def heldout_chunk_path(chunk_index: int) -> str:
    """Path of a held-out chunk inside the dataset directory."""
    return f"chunks/heldout-{chunk_index:06d}.bin"


def num_windows(num_tokens: int, seq_len: int) -> int:
    """Whole windows in a chunk; the label of the last token needs one token more."""
    return max(num_tokens - 1, 0) // seq_len


def chunk_from_tokens(token_ids: Sequence[int] | Int64Array, *, vocab_size: int) -> bytes:
    """Contents of a chunk file. Raises ValueError for ids outside the vocabulary."""
    wide = np.asarray(token_ids, dtype=np.int64)
    if wide.size and not (int(wide.min()) >= 0 and int(wide.max()) < vocab_size):
        raise ValueError(
            f"token ids {wide.min()} to {wide.max()} are outside the vocabulary of {vocab_size}"
        )
    return wide.astype(token_dtype_for(vocab_size)).tobytes()


def tokens_from_chunk(data: bytes, *, manifest: Manifest, chunk: ChunkEntry) -> TokenArray:
    """Token ids of a chunk file. Raises CorruptDataError unless size, digest and vocabulary are as
    the manifest says.
    """
    expected_bytes = manifest.file_bytes(chunk)
    if len(data) != expected_bytes:
        raise _corrupt_chunk(f"{len(data)} bytes", f"{expected_bytes} bytes")
    digest = hashlib.sha256(data).hexdigest()
    if digest != chunk.digest:
        raise _corrupt_chunk(f"digest {digest[:16]}...", f"digest {chunk.digest[:16]}...")
    tokens: TokenArray = np.frombuffer(data, dtype=manifest.token_dtype)
    if tokens.size and int(tokens.max()) >= manifest.vocab_size:
        raise _corrupt_chunk(f"token {tokens.max()}", f"tokens below {manifest.vocab_size}")
    return tokens


def windows_from_chunk(
    tokens: TokenArray, seq_len: int, indices: Sequence[int] | Int64Array
) -> tuple[Int64Array, Int64Array]:
    """(inputs_BT, labels_BT) of the windows with these indices in the file (not permuted)."""
    starts_B = np.asarray(indices, dtype=np.int64) * seq_len
    limit = num_windows(tokens.size, seq_len) * seq_len
    if starts_B.size and not (int(starts_B.min()) >= 0 and int(starts_B.max()) < limit):
        raise IndexError(f"windows {list(indices)} of a chunk with {limit // seq_len} windows")
    positions_BT = starts_B[:, None] + np.arange(seq_len, dtype=np.int64)
    return tokens[positions_BT].astype(np.int64), tokens[positions_BT + 1].astype(np.int64)


def token_bytes_table(tokenizer_json: bytes) -> tuple[bytes, ...]:
    """Bytes of text that each token id of a byte-level tokenizer stands for; special tokens stand
    for none.

    Raises CorruptDataError for anything but a tokenizer.json with a byte-level BPE vocabulary.
    """
    try:
        plain = json.loads(tokenizer_json)
        id_by_word: dict[str, int] = plain["model"]["vocab"]
        special_ids = {int(token["id"]) for token in plain["added_tokens"]}
        table = [b""] * (max([*id_by_word.values(), *special_ids]) + 1)
        for word, token_id in id_by_word.items():
            if token_id not in special_ids:
                table[token_id] = bytes(_BYTE_BY_LETTER[letter] for letter in word)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CorruptDataError(
            f"tokenizer.json: {error!r}",
            allowed="a byte-level BPE vocabulary",
            remedy="fetch it again, or build the corpus again",
        ) from error
    return tuple(table)


def token_byte_lengths(tokenizer_json: bytes) -> Int64Array:
    """Bytes of text per token id; see token_bytes_table. Index it with token ids to count bytes."""
    return np.array([len(text) for text in token_bytes_table(tokenizer_json)], dtype=np.int64)


def _byte_by_letter() -> dict[str, int]:
    """Inverse of GPT-2's byte-level alphabet: printable Latin-1 stands for itself, the rest for 256
    + n in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(256 + order): byte for order, byte in enumerate(others)}


_BYTE_BY_LETTER = _byte_by_letter()


def _parse_list(cls: type[Any], plain: Any, *, where: str) -> tuple[Any, ...]:
    if not isinstance(plain, list):
        raise ValueError(f"{where} is not a list")
    return tuple(
        parse_fields(cls, item, where=f"{where}[{index}]") for index, item in enumerate(plain)
    )


def _is_digest(text: str) -> bool:
    return len(text) == 64 and set(text) <= set("0123456789abcdef")


def _check(is_allowed: bool, found: str, allowed: str) -> None:
    if not is_allowed:
        raise CorruptDataError(
            f"manifest: {found}", allowed=allowed, remedy="build the corpus again"
        )


def _corrupt_manifest(found: str) -> CorruptDataError:
    return CorruptDataError(
        f"manifest: {found}",
        allowed="the canonical JSON that `muster-coordinator corpus build` writes",
        remedy="fetch it or build it again; a dataset is never edited by hand",
    )


def _corrupt_chunk(found: str, allowed: str) -> CorruptDataError:
    return CorruptDataError(
        f"chunk: {found}", allowed=f"{allowed}, as the manifest says", remedy="fetch it again"
    )
