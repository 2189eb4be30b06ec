"""The port for other peers, tried before a peer joins with it."""

import errno
import socket

from protos.contract.errors import ErrorCode, MachineError


def require_free_port(host: str, port: int) -> None:
    """Raise MachineError (PORT_IN_USE) if this process could not listen there; port 0 is any."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((host, port))
            sock.listen(1)
    except OSError as error:
        is_taken = error.errno in (errno.EADDRINUSE, errno.EACCES)
        raise MachineError(
            f"cannot listen on {host}:{port}: {error.strerror or error}",
            allowed="a free port on an address of this machine",
            remedy="choose another with --listen-port, or 0 for any"
            if is_taken
            else "name an address of this machine with --listen-host",
            code=ErrorCode.PORT_IN_USE,
        ) from error
