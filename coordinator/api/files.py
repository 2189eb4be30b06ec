"""Files on the wire: reading them in parts without blocking the event loop, receiving them into a
temporary file.
"""

import asyncio
import hashlib
import logging
import os
from collections.abc import AsyncIterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from protos.contract.channel import MAX_STREAM_PART_BYTES
from protos.contract.errors import CorruptDataError, ErrorCode, MachineError, UsageError

_LOGGER = logging.getLogger(__name__)
_ABSENT: tuple[tuple[int, ...], str] = ((), "")
"""Verdict on a file that cannot be read."""


async def read_parts(path: Path) -> AsyncIterator[tuple[bytes, int]]:
    """Yield (part, size of the whole file); at least one part. Raises CorruptDataError if the file
    is gone.
    """
    try:
        file = await asyncio.to_thread(path.open, "rb")
    except OSError as error:
        raise CorruptDataError(
            f"{path.name} cannot be read: {error.strerror}",
            allowed="complete datasets and checkpoints in the data directory",
            remedy="the operator restores the file",
        ) from error
    with file:
        total_bytes = os.fstat(file.fileno()).st_size
        is_first = True
        while part := await asyncio.to_thread(file.read, MAX_STREAM_PART_BYTES):
            is_first = False
            yield part, total_bytes
        if is_first:
            yield b"", 0


class VerifiedFiles:
    """Remembers which files had the right digest, so that each is hashed once per change of it.

    Receivers check every byte themselves; this is for the operator, who would otherwise only hear
    from them that something on this disk is damaged.
    """

    def __init__(self) -> None:
        self._verdict_by_path: dict[Path, tuple[tuple[int, ...], str]] = {}

    async def require(self, path: Path, *, digest: str) -> None:
        """Raise CorruptDataError unless the file has this hex SHA-256; logged once per change."""
        try:
            status = await asyncio.to_thread(path.stat)
            stamp = (status.st_ino, status.st_size, status.st_mtime_ns)
            known_stamp, found = self._verdict_by_path.get(path, _ABSENT)
            if known_stamp != stamp:
                found = await asyncio.to_thread(_file_digest, path)
                self._verdict_by_path[path] = (stamp, found)
        except OSError as error:
            is_new = self._verdict_by_path.get(path) != _ABSENT
            self._verdict_by_path[path] = _ABSENT
            raise self._damaged(path, error.strerror or str(error), is_new=is_new) from error
        if found != digest:
            raise self._damaged(path, f"digest {found[:16]}...", is_new=known_stamp != stamp)

    def _damaged(self, path: Path, found: str, *, is_new: bool) -> CorruptDataError:
        if is_new:
            _LOGGER.error("%s is damaged (%s); restore or build it again", path, found)
        return CorruptDataError(
            f"{path.name} on the coordinator's disk: {found}",
            allowed="complete datasets, as their manifests say",
            remedy="the operator restores the file; work goes on without it until then",
        )


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class IncomingFile:
    """Receives a file of known size beside its later place; removed unless `keep` was called. Use
    with `async with`.
    """

    def __init__(self, path: Path, *, total_bytes: int) -> None:
        self._final_path = path
        self.path = path.with_name(f".{path.name}.{os.getpid()}.{id(self):x}.part")
        self._total_bytes = total_bytes
        self._received_bytes = 0
        self._file: BinaryIO | None = None

    async def __aenter__(self) -> Self:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("wb")
        except OSError as error:
            raise _disk_error(self._final_path, error) from error
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()
        self.path.unlink(missing_ok=True)

    async def write(self, part: bytes) -> None:
        """Append a part. Raises UsageError (TOO_LARGE) beyond the announced size, MachineError if
        the disk is full.
        """
        self._received_bytes += len(part)
        if len(part) > MAX_STREAM_PART_BYTES or self._received_bytes > self._total_bytes:
            raise UsageError(
                f"received {self._received_bytes} bytes in parts of {len(part)}",
                allowed=f"{self._total_bytes} bytes as announced, at most "
                f"{MAX_STREAM_PART_BYTES} in a part",
                remedy="upload the file that was announced",
                code=ErrorCode.TOO_LARGE,
            )
        assert self._file is not None
        try:
            await asyncio.to_thread(self._file.write, part)
        except OSError as error:
            raise _disk_error(self._final_path, error) from error

    async def finish(self) -> None:
        """Everything is on disk. Raises CorruptDataError if bytes are missing."""
        if self._received_bytes != self._total_bytes:
            raise CorruptDataError(
                f"received {self._received_bytes} bytes",
                allowed=f"{self._total_bytes}",
                remedy="upload it again",
            )
        assert self._file is not None
        try:
            self._file.flush()
            await asyncio.to_thread(os.fsync, self._file.fileno())
        except OSError as error:
            raise _disk_error(self._final_path, error) from error

    def keep(self) -> None:
        """Put the file in its place, durably."""
        try:
            self.path.replace(self._final_path)
            directory = os.open(self._final_path.parent, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        except OSError as error:
            raise _disk_error(self._final_path, error) from error


def _disk_error(path: Path, error: OSError) -> MachineError:
    return MachineError(
        f"the coordinator cannot write {path.name}: {error.strerror}",
        allowed="free space in the data directory",
        remedy="the operator frees space",
        code=ErrorCode.DISK_FULL,
    )
