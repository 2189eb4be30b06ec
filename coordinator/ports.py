"""Ports that are taken are found out before anything is started on them, with a message that names
the flag.

Nothing is shared: neither the probe nor the real listeners set SO_REUSEPORT. Between the probe of
another process' port and its start the port could be lost; that process then fails in its own
words.
"""

import errno
import socket

from protos.contract.errors import ErrorCode, MachineError

_BACKLOG = 128


def listen(host: str, port: int, *, what: str, flag: str) -> socket.socket:
    """A listening socket; port 0 lets the system choose. Raises MachineError (PORT_IN_USE).

    `what` begins the message ("the page"), `flag` is the option that names another port.
    """
    bare_host = host.strip("[]")
    family = socket.AF_INET6 if ":" in bare_host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((bare_host, port))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        is_taken = error.errno in (errno.EADDRINUSE, errno.EACCES)
        raise MachineError(
            f"{what} cannot listen on {host}:{port}: {error.strerror or error}",
            allowed="a free port on an interface of this machine",
            remedy=f"pass {flag} PORT (0 lets the system choose) or stop what holds the port"
            if is_taken
            else "name an address of this machine as host",
            code=ErrorCode.PORT_IN_USE,
        ) from error
    return listener


def require_free(host: str, port: int, *, what: str, flag: str) -> None:
    """Raise MachineError (PORT_IN_USE) if `listen` could not have the port."""
    listen(host, port, what=what, flag=flag).close()
