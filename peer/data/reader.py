"""Chunk files on this machine: verified by digest before a token of them is used.

A file in the cache is named by the SHA-256 of its contents, so a path alone says what the bytes
must be; where a lease names the digest, that one is checked. The check costs 0.5 ms per MiB.
Letters: B windows, T positions.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from google.protobuf.message import DecodeError

from peer.model.objectives import ExampleBuilder, Examples
from protos.contract import chunk_format
from protos.contract.chunk_format import TokenArray
from protos.contract.errors import CorruptDataError
from protos.contract.schedule_order import window_order
from protos.muster.v1 import common_pb2

_DIGEST_BYTES = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class LeasedRange:
    """A lease as the feed uses it: which windows, in which file, and the bytes that prove it."""

    lease: bytes
    """Serialised Signed Lease, as the coordinator gave it."""
    lease_number: int
    data_pass: int
    chunk_index: int
    begin_window: int
    """In the chunk's permuted order of this pass."""
    end_window: int
    chunk_digest: bytes
    path: Path
    """Where the chunk lies on this machine."""

    @property
    def num_windows(self) -> int:
        """Windows in the lease."""
        return self.end_window - self.begin_window


def leased_range_from_signed(signed_lease: bytes, *, path: Path) -> LeasedRange:
    """Unpack a lease whose signature the daemon has checked.

    Raises CorruptDataError for anything else.
    """
    try:
        signed = common_pb2.Signed.FromString(signed_lease)
        lease = common_pb2.Lease.FromString(signed.payload)
    except DecodeError as error:
        raise CorruptDataError(
            f"lease of {len(signed_lease)} bytes does not parse: {error}",
            allowed="a Signed Lease",
            remedy="acquire leases again",
        ) from error
    window_range = lease.range
    if window_range.begin_window >= window_range.end_window or lease.lease_number < 1:
        raise CorruptDataError(
            f"lease {lease.lease_number} of windows {window_range.begin_window} to "
            f"{window_range.end_window}",
            allowed="a lease number from 1 and at least one window",
            remedy="acquire leases again",
        )
    return LeasedRange(
        lease=signed_lease,
        lease_number=lease.lease_number,
        data_pass=window_range.data_pass,
        chunk_index=window_range.chunk_index,
        begin_window=window_range.begin_window,
        end_window=window_range.end_window,
        chunk_digest=lease.chunk_digest,
        path=path,
    )


def load_verified(path: Path, *, digest: bytes | None = None) -> bytes:
    """Bytes of a file whose SHA-256 is `digest` (None: the one that names the file).

    Raises CorruptDataError.
    """
    expected = digest_from_name(path) if digest is None else digest
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CorruptDataError(
            f"{path.name[:16]}: {error.strerror or error}",
            allowed="a file of the dataset that was fetched before",
            remedy="it is fetched again when it is needed",
        ) from error
    found = hashlib.sha256(data).digest()
    if found != expected:
        raise CorruptDataError(
            f"{path.name[:16]} has {len(data)} bytes with digest {found.hex()[:16]}...",
            allowed=f"digest {expected.hex()[:16]}...",
            remedy="the file is damaged and must be fetched again; check the disk if this repeats",
        )
    return data


def digest_from_name(path: Path) -> bytes:
    """Digest that names a cache file. Raises CorruptDataError for other names."""
    try:
        digest = bytes.fromhex(path.name)
    except ValueError:
        digest = b""
    if len(digest) != _DIGEST_BYTES:
        raise CorruptDataError(
            f"file name {path.name!r}",
            allowed="the hex SHA-256 of its contents",
            remedy="give the digest, or fetch the file through the cache",
        )
    return digest


def load_tokens(path: Path, *, vocab_size: int, digest: bytes | None = None) -> TokenArray:
    """Verified ids of a chunk file; `vocab_size` is the manifest's. Raises CorruptDataError."""
    data = load_verified(path, digest=digest)
    dtype = np.dtype(chunk_format.token_dtype_for(vocab_size))
    if len(data) % dtype.itemsize:
        raise _not_the_run(f"{len(data)} bytes", f"whole tokens of {dtype.itemsize} bytes")
    tokens: TokenArray = np.frombuffer(data, dtype=dtype)
    if tokens.size and int(tokens.max()) >= vocab_size:
        raise _not_the_run(f"token {tokens.max()}", f"tokens below {vocab_size}")
    return tokens


class ChunkReader:
    """Windows of leased chunks, in the run's order; keeps the last chunk, since leases share it."""

    def __init__(
        self, builder: ExampleBuilder, *, seed: int, seq_len: int, vocab_size: int
    ) -> None:
        """`seed` and `seq_len` are the RunSpec's, `vocab_size` the tokenizer's."""
        self._builder = builder
        self._seed = seed
        self._seq_len = seq_len
        self._vocab_size = vocab_size
        self._last_digest = b""
        self._last_tokens: TokenArray = np.empty(0, np.uint16)

    def read_windows(self, leased: LeasedRange, begin_window: int, end_window: int) -> Examples:
        """Examples of some windows of a lease. Raises CorruptDataError."""
        if leased.chunk_digest != self._last_digest:
            self._last_tokens = load_tokens(
                leased.path, vocab_size=self._vocab_size, digest=leased.chunk_digest
            )
            self._last_digest = leased.chunk_digest
        chunk_windows = chunk_format.num_windows(self._last_tokens.size, self._seq_len)
        if leased.end_window > chunk_windows:
            raise _not_the_run(
                f"lease {leased.lease_number} of windows up to {leased.end_window}",
                f"the {chunk_windows} windows of chunk {leased.chunk_index}",
            )
        order = window_order(
            self._seed,
            data_pass=leased.data_pass,
            chunk_index=leased.chunk_index,
            chunk_windows=chunk_windows,
        )
        indices = order[begin_window:end_window]
        windows = chunk_format.windows_from_chunk(self._last_tokens, self._seq_len, indices)
        keys = [(leased.data_pass, leased.chunk_index, int(index)) for index in indices]
        return self._builder.build(*windows, keys)


def _not_the_run(found: str, allowed: str) -> CorruptDataError:
    return CorruptDataError(
        found, allowed=allowed, remedy="the file is not of this run's dataset; fetch it again"
    )
