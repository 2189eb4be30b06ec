"""Where p2pd's unix sockets lie: a private folder, emptied at start."""

import hashlib
import os
import tempfile
from pathlib import Path

from protos.contract.errors import ErrorCode, MachineError

_MAX_SOCKET_PATH_BYTES = 100
_SOCKET_NAME_BYTES = 32


def socket_folder(home: Path) -> Path:
    """Private folder for p2pd's unix sockets, emptied: `home` is locked, so what is there belongs
    to the dead.

    A unix socket's path is limited to about 100 bytes; a longer home gets a folder of its own in
    the temp folder.
    """
    folder = home.resolve() / "run"
    if len(os.fsencode(folder)) + _SOCKET_NAME_BYTES > _MAX_SOCKET_PATH_BYTES:
        name = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
        folder = Path(tempfile.gettempdir()) / f"muster-{os.getuid()}-{name}"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if folder.stat().st_uid != os.getuid():
        raise MachineError(
            f"{folder} belongs to another user",
            allowed="a folder of our own",
            remedy="remove it or choose another --home",
            code=ErrorCode.PERMISSION_DENIED,
        )
    for path in folder.glob("*.sock"):
        path.unlink(missing_ok=True)
    return folder
