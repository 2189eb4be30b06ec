"""Files that are whole and on disk when the call returns, also after power loss.

A name in a folder is as durable as the folder, so both are synced.
"""

import os
from pathlib import Path


def replace_durably(path: Path, data: bytes | memoryview) -> None:
    """Write a file under a temporary name, sync it, give it its name and sync that. Raises
    OSError.
    """
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
