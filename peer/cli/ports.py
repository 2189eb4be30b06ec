"""The port for other peers, tried before a peer joins with it."""

import errno
import ipaddress
import socket

from protos.contract.errors import ErrorCode, MachineError, UsageError


def require_free_port(
    host: str, port: int, *, host_flag: str = "--listen-host", port_flag: str = "--listen-port"
) -> None:
    """Raise UsageError for what is no IPv4 address, MachineError (PORT_IN_USE) if this process
    could not listen there; port 0 is any.
    """
    try:
        ipaddress.IPv4Address(host)
    except ValueError as error:
        raise UsageError(
            f"{host_flag} {host}",
            allowed="an IPv4 address of this machine, or 0.0.0.0 for all of them",
            remedy=f"correct {host_flag}; names and IPv6 belong into --announce",
        ) from error
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((host, port))
            sock.listen(1)
    except OSError as error:
        is_taken = error.errno in (errno.EADDRINUSE, errno.EACCES)
        raise MachineError(
            f"cannot listen on {host}:{port}: {error.strerror or error}",
            allowed="a free port on an address of this machine",
            remedy=f"choose another with {port_flag}, or 0 for any"
            if is_taken
            else f"name an address of this machine with {host_flag}",
            code=ErrorCode.PORT_IN_USE,
        ) from error
