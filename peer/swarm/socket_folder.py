"""Where p2pd's unix sockets lie: a private folder that belongs to one living process.

A unix socket's path is limited to about 100 bytes, so a home with a longer path gets a folder in
the temp folder. A process that is killed cannot remove its folder; whoever starts next removes
those whose lock nobody holds, and what a dead predecessor has left in its own.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from protos.contract.errors import ErrorCode, MachineError

_MAX_SOCKET_PATH_BYTES = 100
_SOCKET_NAME_BYTES = 32
_LOCK_NAME = "lock"


def claim_socket_folder(home: Path) -> Path:
    """Folder for the sockets of this process, emptied and locked until it ends.

    `home` is locked by the caller, so what is there belongs to the dead. Raises MachineError.
    """
    temp = Path(tempfile.gettempdir())
    remove_dead_folders(temp)
    folder = home.resolve() / "run"
    if len(os.fsencode(folder)) + _SOCKET_NAME_BYTES > _MAX_SOCKET_PATH_BYTES:
        name = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
        folder = temp / f"{_prefix()}{name}"
    if folder.parent == temp:
        while not _hold(folder):
            pass
    else:
        _make(folder)
    for path in folder.glob("*.sock"):
        path.unlink(missing_ok=True)
    return folder


def _make(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if folder.stat().st_uid != os.getuid():
        raise MachineError(
            f"{folder} belongs to another user",
            allowed="a folder of our own",
            remedy="remove it or choose another --home",
            code=ErrorCode.PERMISSION_DENIED,
        )


def _hold(folder: Path) -> bool:
    """Make and lock the folder until this process ends, however it ends. False if another process
    has taken it for a dead one's meanwhile, and removed it: its lock is not held when it is made.
    """
    try:
        _make(folder)
        fd = os.open(folder / _LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:
        return False
    fcntl.flock(fd, fcntl.LOCK_EX)
    with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(fd), os.stat(folder / _LOCK_NAME)):
            return True
    os.close(fd)
    return False


def release_socket_folder(folder: Path) -> None:
    """Remove the folder, if it was made for the sockets alone."""
    if folder.name.startswith(_prefix()):
        (folder / _LOCK_NAME).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            folder.rmdir()


def remove_dead_folders(temp: Path) -> list[Path]:
    """Remove our folders in the temp folder whose owner has ended; returns them."""
    removed = []
    for folder in temp.glob(f"{_prefix()}*"):
        with contextlib.suppress(OSError):  # whoever else looks may be quicker
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            fd = os.open(folder / _LOCK_NAME, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
                removed.append(folder)
            finally:
                os.close(fd)
    return removed


def _prefix() -> str:
    return f"muster-{os.getuid()}-"
