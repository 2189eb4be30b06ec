"""Files of a dataset directory: whole or not at all, one builder at a time, and errors that say
what to do.

A dataset directory belongs to this package only if it holds nothing but what a build writes;
anything else is refused before a byte is changed.
"""

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from protos.contract.errors import ErrorCode, MachineError, UsageError

_OWN_NAMES = ("manifest.json", "build.json", "tokenizer.json")
_OWN_CHUNK = re.compile(r"(train|heldout)-\d{6,}\.bin(\.part)?")
_CHUNK_FOLDER = "chunks"
_DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@contextmanager
def building_in(folder: Path) -> Iterator[None]:
    """Create the folder if needed and hold it for one build; disk errors become MachineError.

    Raises UsageError when it holds anything that no build wrote, MachineError when another build
    holds it.
    """
    with machine_errors(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise UsageError(
                f"{folder} cannot be a folder: {error.strerror}",
                allowed="a new folder or that of an earlier build",
                remedy="name another --out",
            ) from error
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise MachineError(
                f"another process builds a corpus in {folder}",
                allowed="one build per folder at a time",
                remedy="wait until it is done or name another --out",
                code=ErrorCode.DATA_DIR_LOCKED,
            ) from error
        try:
            _refuse_foreign_files(folder)
            yield
        finally:
            os.close(descriptor)


@contextmanager
def machine_errors(path: Path) -> Iterator[None]:
    """Turn an OSError into a MachineError that names the path and the remedy."""
    try:
        yield
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise MachineError(
                f"no room left for {path}: {error.strerror}",
                allowed="a disk with room for the whole corpus",
                remedy="free some space or name a folder on another disk",
                code=ErrorCode.DISK_FULL,
            ) from error
        raise MachineError(
            f"{path} cannot be written: {error.strerror or error}",
            allowed="a folder that this user may write",
            remedy="correct the permissions or name another folder",
            code=ErrorCode.PERMISSION_DENIED,
        ) from error


def clear_build(folder: Path) -> None:
    """Remove an earlier build, the manifest first, so that what is left never looks finished."""
    for name in _OWN_NAMES:
        for path in (folder / name, folder / f"{name}.part"):
            path.unlink(missing_ok=True)
    chunk_folder = folder / _CHUNK_FOLDER
    if chunk_folder.is_dir():
        for path in list(chunk_folder.iterdir()):
            path.unlink()
    chunk_folder.mkdir(exist_ok=True)


def require_free_bytes(folder: Path, *, needed_bytes: int) -> None:
    """Raise MachineError before a long build when the disk has plainly too little room."""
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise MachineError(
            f"{free_bytes:,} bytes are free for {folder}",
            allowed=f"at least {needed_bytes:,} bytes",
            remedy="free some space or name a folder on another disk",
            code=ErrorCode.DISK_FULL,
        )


def write_file(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all, also after power loss."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _refuse_foreign_files(folder: Path) -> None:
    foreign = [
        path.name
        for path in folder.iterdir()
        if path.name.removesuffix(".part") not in _OWN_NAMES and path.name != _CHUNK_FOLDER
    ]
    chunk_folder = folder / _CHUNK_FOLDER
    if chunk_folder.is_dir():
        foreign += [p.name for p in chunk_folder.iterdir() if not _OWN_CHUNK.fullmatch(p.name)]
    if foreign:
        raise UsageError(
            f"{folder} holds files that no corpus build wrote, such as {sorted(foreign)[0]!r}",
            allowed="a new or empty folder, or that of an earlier build",
            remedy="name another --out",
        )
