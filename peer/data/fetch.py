"""Disk cache of dataset files, named by the SHA-256 of their contents, filled from whatever stream
the caller has.

A file (at most a few MiB) enters the cache whole and verified or not at all; on every hit it is
verified again (0.5 ms per MiB), and a damaged one is fetched anew. The least recently used files go
when the limit is reached, never those that are held for a lease: if the held ones leave no room,
the fetch is refused, because a limit that a volunteer set is kept. One process per folder, which
the lock of the peer's home ensures. Runs on the daemon's event loop; concurrent fetches of one file
share one download.
"""

import asyncio
import errno
import hashlib
import os
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from peer.data.reader import load_verified
from protos.contract.errors import CorruptDataError, ErrorCode, MachineError

MAX_ATTEMPTS = 3
"""Downloads of one file that may arrive damaged before it is given up."""

_DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedFile:
    """A file of the dataset."""

    name: str
    """For messages, such as "training chunk 17"."""
    digest: bytes
    """SHA-256 of the contents."""
    max_bytes: int
    """A stream that sends more is cut off."""
    num_bytes: int = 0
    """Size, where it is known: room is made before the download; 0: room is made afterwards."""


Source = Callable[[WantedFile], AsyncIterator[bytes]]
"""Opens a stream of the file's bytes; raises whatever its transport raises."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheStats:
    """Sums since the start."""

    num_hits: int
    num_fetches: int
    num_corrupt: int
    """Damaged files found, in streams and on disk."""
    num_evicted: int
    fetched_bytes: int
    stored_bytes: int
    """In the cache now."""


class ChunkCache:
    """Verified files under `folder`, at most `limit_bytes` of them."""

    def __init__(self, folder: Path, *, limit_bytes: int) -> None:
        """Take over what an earlier process left, oldest use first.

        Raises MachineError when the folder cannot be used.
        """
        self._folder = folder
        self._limit_bytes = limit_bytes
        self._size_by_digest: OrderedDict[bytes, int] = OrderedDict()
        self._holds: Counter[bytes] = Counter()
        self._downloads: dict[bytes, asyncio.Task[Path]] = {}
        self._counts: Counter[str] = Counter()
        with _disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._take_over()

    @property
    def stats(self) -> CacheStats:
        """Sums since the start."""
        return CacheStats(
            num_hits=self._counts["hits"],
            num_fetches=self._counts["fetches"],
            num_corrupt=self._counts["corrupt"],
            num_evicted=self._counts["evicted"],
            fetched_bytes=self._counts["fetched_bytes"],
            stored_bytes=self._stored_bytes(),
        )

    def path_of(self, digest: bytes) -> Path:
        """Where a file lies, if it is there."""
        return self._folder / digest.hex()

    def hold(self, digest: bytes) -> None:
        """Keep a file, there already or not, from eviction until as many `release` calls follow."""
        self._holds[digest] += 1

    def release(self, digest: bytes) -> None:
        """Undo one `hold`."""
        if self._holds[digest] < 1:
            raise ValueError(f"{digest.hex()[:16]} is not held")
        self._holds[digest] -= 1
        if not self._holds[digest]:
            del self._holds[digest]

    def discard(self, digest: bytes) -> None:
        """Forget a file that a reader found damaged; the next fetch downloads it again."""
        self._size_by_digest.pop(digest, None)
        self.path_of(digest).unlink(missing_ok=True)

    async def fetch(self, wanted: WantedFile, source: Source) -> Path:
        """Path of the verified file, from the disk or else from `source`.

        Raises CorruptDataError when `source` sent damaged bytes MAX_ATTEMPTS times, MachineError
        when there is no room, and whatever `source` raises. Cancelling one of several waiters does
        not stop the others.
        """
        if self._is_present(wanted):
            self._counts["hits"] += 1
            return self.path_of(wanted.digest)
        download = self._downloads.get(wanted.digest)
        if download is None:
            download = asyncio.create_task(self._download(wanted, source))
            self._downloads[wanted.digest] = download
            download.add_done_callback(lambda _: self._downloads.pop(wanted.digest, None))
            download.add_done_callback(_note_end)
        return await asyncio.shield(download)

    async def close(self) -> None:
        """Stop the downloads under way."""
        downloads = list(self._downloads.values())
        for download in downloads:
            download.cancel()
        await asyncio.gather(*downloads, return_exceptions=True)

    def _take_over(self) -> None:
        found = []
        for path in self._folder.iterdir():
            if path.suffix == ".part":
                path.unlink()
            elif path.is_file() and _is_digest_name(path.name):
                status = path.stat()
                found.append((status.st_mtime_ns, bytes.fromhex(path.name), status.st_size))
        for _, digest, size_bytes in sorted(found):
            self._size_by_digest[digest] = size_bytes
        self._evict_down_to(self._limit_bytes)

    def _is_present(self, wanted: WantedFile) -> bool:
        if wanted.digest not in self._size_by_digest:
            return False
        path = self.path_of(wanted.digest)
        try:
            load_verified(path, digest=wanted.digest)
            os.utime(path)  # the order of use survives a restart
        except (CorruptDataError, OSError):
            self._counts["corrupt"] += 1
            self.discard(wanted.digest)
            return False
        self._size_by_digest.move_to_end(wanted.digest)
        return True

    async def _download(self, wanted: WantedFile, source: Source) -> Path:
        self.hold(wanted.digest)
        try:
            for _ in range(MAX_ATTEMPTS - 1):
                try:
                    return await self._download_once(wanted, source)
                except CorruptDataError:
                    continue
            return await self._download_once(wanted, source)
        finally:
            self.release(wanted.digest)

    async def _download_once(self, wanted: WantedFile, source: Source) -> Path:
        self._make_room(wanted, num_bytes=wanted.num_bytes)
        data = bytearray()
        async for part in source(wanted):
            data += part
            if len(data) > wanted.max_bytes:
                raise self._corrupt(wanted, f"more than {wanted.max_bytes} bytes")
        digest = hashlib.sha256(data)
        if digest.digest() != wanted.digest:
            found = f"{len(data)} bytes with digest {digest.hexdigest()[:16]}..."
            raise self._corrupt(wanted, found)
        self._make_room(wanted, num_bytes=len(data))
        path = self.path_of(wanted.digest)
        part_path = path.with_name(path.name + ".part")
        with _disk_errors(path):
            try:
                part_path.write_bytes(data)
                part_path.replace(path)
            finally:
                part_path.unlink(missing_ok=True)
        self._size_by_digest[wanted.digest] = len(data)
        self._counts["fetches"] += 1
        self._counts["fetched_bytes"] += len(data)
        return path

    def _corrupt(self, wanted: WantedFile, found: str) -> CorruptDataError:
        self._counts["corrupt"] += 1
        return CorruptDataError(
            f"{wanted.name}: {found}",
            allowed=f"digest {wanted.digest.hex()[:16]}..., at most {wanted.max_bytes} bytes",
            remedy="it was asked for again without success; the sender's copy is damaged",
        )

    def _make_room(self, wanted: WantedFile, *, num_bytes: int) -> None:
        """Evict until the file fits. Raises MachineError when what is held leaves no room."""
        self._evict_down_to(self._limit_bytes - num_bytes)
        stored_bytes = self._stored_bytes()
        if stored_bytes + num_bytes > self._limit_bytes:
            raise MachineError(
                f"{wanted.name} needs {num_bytes} bytes beside {stored_bytes} bytes in use",
                allowed=f"the disk limit of {self._limit_bytes} bytes",
                remedy="raise --disk-limit",
                code=ErrorCode.DISK_FULL,
            )

    def _evict_down_to(self, limit_bytes: int) -> None:
        """Remove the files that were not used for longest, held ones apart."""
        stored_bytes = self._stored_bytes()
        for digest, size_bytes in list(self._size_by_digest.items()):
            if stored_bytes <= limit_bytes:
                return
            if digest not in self._holds:
                self.discard(digest)
                self._counts["evicted"] += 1
                stored_bytes -= size_bytes

    def _stored_bytes(self) -> int:
        return sum(self._size_by_digest.values())


def _is_digest_name(name: str) -> bool:
    return len(name) == 64 and set(name) <= set("0123456789abcdef")


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of this disk into a MachineError; errors of the stream are not touched."""
    try:
        yield
    except OSError as error:
        raise _machine_error(path, error) from error


def _note_end(download: "asyncio.Task[Path]") -> None:
    """Mark the error of a download as seen, also when every waiter was cancelled."""
    if not download.cancelled():
        download.exception()


def _machine_error(path: Path, error: OSError) -> MachineError:
    if error.errno in _DISK_FULL:
        return MachineError(
            f"no room left for {path}: {error.strerror}",
            allowed="a disk with room for the cache",
            remedy="free some space, lower --disk-limit or choose another --home",
            code=ErrorCode.DISK_FULL,
        )
    return MachineError(
        f"{path} cannot be used: {error.strerror or error}",
        allowed="a folder that this user may write",
        remedy="correct the permissions or choose another --home",
        code=ErrorCode.PERMISSION_DENIED,
    )
