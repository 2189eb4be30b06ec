"""One coordinator per data directory: an exclusive flock on its lock file, which names the holder's
process. The directory is its owner's alone (mode 0700): its files hold keys of peers' sessions and
of the coordinator.

The lock dies with the process, so a SIGKILL leaves nothing to clean up.
"""

import errno
import fcntl
import os
import stat
from pathlib import Path

from protos.contract.errors import ErrorCode, MachineError

LOCK_FILE_NAME = "lock"
DISK_FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT})


def machine_error_from_os_error(error: OSError, *, doing: str) -> MachineError:
    """What to tell a person whose disk or permissions are in the way."""
    if error.errno in DISK_FULL_ERRNOS:
        return MachineError(
            f"no space left while {doing}",
            allowed="a directory with free space",
            remedy="free space or name another --data-dir",
            code=ErrorCode.DISK_FULL,
        )
    if isinstance(error, PermissionError):
        return MachineError(
            f"no permission while {doing}: {error.filename or error}",
            allowed="a directory that this user may write",
            remedy="name another --data-dir, or give this user the directory",
            code=ErrorCode.PERMISSION_DENIED,
        )
    return MachineError(
        f"failed while {doing}: {error.strerror or error}",
        allowed="a directory that this user may make and write",
        remedy="name another --data-dir",
        code=ErrorCode.PERMISSION_DENIED,
    )


def make_private(directory: Path) -> None:
    """Make the directory, or take the rights of others away from it if it is this user's. Raises
    OSError.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = directory.stat()
    if stat.S_IMODE(found.st_mode) & 0o077 and found.st_uid == os.geteuid():
        directory.chmod(0o700)


def make_data_dir(data_dir: Path) -> None:
    """`make_private` for a data directory. Raises MachineError."""
    try:
        make_private(data_dir)
    except OSError as error:
        raise machine_error_from_os_error(
            error, doing=f"opening data directory {data_dir}"
        ) from error


class DataDirLock:
    """Held from construction to `release`."""

    def __init__(self, data_dir: Path) -> None:
        """Create the directory if needed and lock it. Raises MachineError (DATA_DIR_LOCKED names
        the holder).
        """
        make_data_dir(data_dir)
        try:
            self._file = os.open(
                data_dir / LOCK_FILE_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
            )
        except OSError as error:
            raise machine_error_from_os_error(
                error, doing=f"opening data directory {data_dir}"
            ) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(self._file, 32).decode("ascii", "replace").strip() or "unknown"
            os.close(self._file)
            raise MachineError(
                f"data directory {data_dir} is in use by process {holder}",
                allowed="one coordinator per data directory",
                remedy=f"stop process {holder} or name another --data-dir",
                code=ErrorCode.DATA_DIR_LOCKED,
            ) from error
        try:
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, f"{os.getpid()}\n".encode(), 0)
        except OSError as error:
            os.close(self._file)
            raise machine_error_from_os_error(
                error, doing=f"writing the lock of {data_dir}"
            ) from error

    def release(self) -> None:
        """Unlock; the file stays."""
        os.close(self._file)
