"""Every error that a person or the other side can meet.

MusterError
 +- UsageError        the person's input: flags, files, specs                            exit 2
 +- RefusedError      the other side says no: token, version, roster, fence             exit 3
 +- MachineError      this machine: port, disk, permissions, lock, missing package      exit 4
 +- CorruptDataError  bytes that do not match their digest or cannot be parsed          exit 5
 +- UnavailableError  the other side cannot be reached or is not ready; try again       exit 6
 +- RunFailedError    the run cannot go on                                              exit 7

A message has three parts: what was found, what is allowed, what to do. `ErrorCode` is the number
both sides share; `grpc_status_name` says which gRPC status carries it. Exit code 130 is an
interrupt that was asked for twice; 141 says that nobody reads the output any more.
"""

from enum import IntEnum


class ErrorCode(IntEnum):
    """Numbers on the wire (trailing metadata `muster-error-code`); never reused."""

    INTERNAL = 1
    INVALID_ARGUMENT = 10
    UNKNOWN_RUN = 11
    UNKNOWN_OPERATION = 12
    TOKEN_UNKNOWN = 20
    TOKEN_EXPIRED = 21
    TOKEN_EXHAUSTED = 22
    TOKEN_REVOKED = 23
    SIGNATURE_INVALID = 24
    SESSION_INVALID = 25
    PEER_EVICTED = 26
    PROTOCOL_MISMATCH = 27
    CAPABILITY_MISSING = 28
    IDENTITY_CONFLICT = 29
    CLOCK_SKEW = 30
    CA_MISMATCH = 31
    STALE_INCARNATION = 40
    STALE_FENCE = 41
    LEASE_UNKNOWN = 42
    DIGEST_MISMATCH = 43
    CERTIFICATE_INVALID = 44
    EQUIVOCATION = 45
    NOT_LEASED = 46
    RUN_NOT_ACTIVE = 50
    ALREADY_EXISTS = 51
    RATE_LIMITED = 60
    TOO_LARGE = 61
    STORE_UNAVAILABLE = 62
    NOT_READY = 63
    COORDINATOR_UNREACHABLE = 64
    PORT_IN_USE = 70
    DATA_DIR_LOCKED = 71
    HOME_LOCKED = 72
    DISK_FULL = 73
    PERMISSION_DENIED = 74
    DEPENDENCY_MISSING = 75
    DATA_CORRUPT = 80
    RUN_FAILED = 90


class MusterError(Exception):
    """Base: found / allowed / remedy, a shared code and a process exit code."""

    exit_code = 1
    default_code = ErrorCode.INTERNAL
    grpc_status_name = "INTERNAL"

    def __init__(
        self, found: str, *, allowed: str = "", remedy: str = "", code: ErrorCode | None = None
    ) -> None:
        self.found = found
        self.allowed = allowed
        self.remedy = remedy
        self.code = self.default_code if code is None else code
        super().__init__("; ".join(part for part in (found, allowed, remedy) if part))


class UsageError(MusterError):
    """Bad input from a person or a malformed request."""

    exit_code = 2
    default_code = ErrorCode.INVALID_ARGUMENT
    grpc_status_name = "INVALID_ARGUMENT"


class RefusedError(MusterError):
    """The other side understood and said no; trying again unchanged will not help."""

    exit_code = 3
    default_code = ErrorCode.SESSION_INVALID
    grpc_status_name = "PERMISSION_DENIED"


class MachineError(MusterError):
    """This machine cannot: port, disk, permissions, lock, missing package."""

    exit_code = 4
    default_code = ErrorCode.DEPENDENCY_MISSING
    grpc_status_name = "FAILED_PRECONDITION"


class CorruptDataError(MusterError):
    """Bytes that do not match their digest or do not parse."""

    exit_code = 5
    default_code = ErrorCode.DATA_CORRUPT
    grpc_status_name = "DATA_LOSS"


class UnavailableError(MusterError):
    """Cannot be reached, not ready or over a rate; trying again later may help."""

    exit_code = 6
    default_code = ErrorCode.COORDINATOR_UNREACHABLE
    grpc_status_name = "UNAVAILABLE"


class RunFailedError(MusterError):
    """The run cannot go on."""

    exit_code = 7
    default_code = ErrorCode.RUN_FAILED
    grpc_status_name = "FAILED_PRECONDITION"


INTERRUPTED_EXIT_CODE = 130
"""Exit code of a command that was interrupted before its end."""
READER_GONE_EXIT_CODE = 141
"""What a shell shows for a program that SIGPIPE ended, as in `yes | head -1`."""

ERROR_CLASS_BY_STATUS: dict[str, type[MusterError]] = {
    "INVALID_ARGUMENT": UsageError,
    "PERMISSION_DENIED": RefusedError,
    "UNAUTHENTICATED": RefusedError,
    "FAILED_PRECONDITION": MachineError,
    "DATA_LOSS": CorruptDataError,
    "UNAVAILABLE": UnavailableError,
    "DEADLINE_EXCEEDED": UnavailableError,
    "RESOURCE_EXHAUSTED": UnavailableError,
}
"""Which class a client raises for a gRPC status; others become MusterError itself."""
