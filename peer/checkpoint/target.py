"""The folder that a command writes a model to: checked before any work, so that no model shadows
another and hours of training do not end in a folder that cannot be written.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from protos.contract.errors import ErrorCode, MachineError, UsageError

_NUM_NAMED = 5


def check_target(folder: Path) -> None:
    """Raises UsageError if `folder` holds anything, MachineError if it cannot be written. Nothing
    is made, so that a command that is refused leaves nothing.
    """
    existing = folder.absolute()
    try:
        while not existing.exists():
            existing = existing.parent
        taken = (
            sorted(path.name for path in folder.iterdir()) if existing == folder.absolute() else ()
        )
        if not taken:
            with tempfile.TemporaryFile(dir=existing):
                return
    except OSError as error:
        raise MachineError(
            f"cannot write {folder}: {error.strerror or error}",
            allowed="a writable folder",
            remedy="choose another folder or free space",
            code=ErrorCode.PERMISSION_DENIED,
        ) from error
    more = len(taken) - _NUM_NAMED
    raise UsageError(
        f"{folder} holds {', '.join(taken[:_NUM_NAMED])}{f' and {more} more' if more > 0 else ''}",
        allowed="an empty or a new folder: files of yours could be replaced, or two models shadow "
        "each other",
        remedy="name another folder, or move that one away",
    )


@contextlib.contextmanager
def filling(folder: Path) -> Iterator[None]:
    """Make a folder that `check_target` allows; if what is written to it ends early, it is as it
    was before.
    """
    was_there = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for path in folder.iterdir():
            path.unlink()
        if not was_there:
            folder.rmdir()
        raise
