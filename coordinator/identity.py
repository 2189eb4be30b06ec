"""Key files of a coordinator: made once, at the first start, and the reason why a data directory
must be kept private.

- ca.pem, ca.key: TLS certificate (its own CA; join strings carry its fingerprint) and key
- signing.key: raw Ed25519 key that signs leases, directives, incarnation records and votes
- admin.key: 32 random bytes; whoever can read it may command the running coordinator
- coordinator.json: where the running coordinator is; absent when none runs

Files are written whole (temporary name, fsync, rename) and readable by their owner only.
"""

import json
import os
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path

from protos.contract.channel import ca_fingerprint, create_server_identity
from protos.contract.errors import CorruptDataError, ErrorCode, MachineError, UnavailableError
from protos.contract.signing import SigningKey

_CERTIFICATE_FILE = "ca.pem"
_PRIVATE_KEY_FILE = "ca.key"
_SIGNING_FILE = "signing.key"
_ADMIN_FILE = "admin.key"
_ADDRESS_FILE = "coordinator.json"
_KEY_BYTES = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Everything that makes this coordinator the one that peers know."""

    cert_pem: bytes
    key_pem: bytes
    signing_key: SigningKey
    admin_key: bytes

    @property
    def ca_fingerprint(self) -> str:
        """Hex SHA-256 that join strings carry."""
        return ca_fingerprint(self.cert_pem)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningCoordinator:
    """Contents of coordinator.json."""

    address: str
    """HOST:PORT for peers, as advertised."""
    local_address: str
    """HOST:PORT for commands on this machine."""
    http_address: str
    """Base address of the page, beginning with http://."""
    pid: int
    ca_fingerprint: str


def load_identity(data_dir: Path, *, hosts: tuple[str, ...]) -> Identity:
    """Read the key files, making those that are missing. Call with the data directory locked.

    A certificate without its key, or a key of the wrong size, is refused: making a new one would
    lock out every peer.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    cert_path, key_path = data_dir / _CERTIFICATE_FILE, data_dir / _PRIVATE_KEY_FILE
    if not cert_path.exists() and not key_path.exists():
        cert_pem, key_pem = create_server_identity(hosts)
        write_whole(key_path, key_pem, mode=0o600)
        write_whole(cert_path, cert_pem, mode=0o644)
    if not cert_path.exists() and key_path.exists():
        # The first start was interrupted between the two files: nobody has seen the certificate.
        key_path.unlink()
        return load_identity(data_dir, hosts=hosts)
    signing_path, admin_path = data_dir / _SIGNING_FILE, data_dir / _ADMIN_FILE
    if not signing_path.exists():
        write_whole(signing_path, SigningKey.generate().private_bytes(), mode=0o600)
    if not admin_path.exists():
        write_whole(admin_path, secrets.token_bytes(_KEY_BYTES), mode=0o600)
    return Identity(
        cert_pem=_read(cert_path),
        key_pem=_read(key_path),
        signing_key=SigningKey(_read_key(signing_path)),
        admin_key=_read_key(admin_path),
    )


def load_certificate(data_dir: Path) -> bytes:
    """The TLS certificate (PEM) of a coordinator that has run here."""
    return _read(data_dir / _CERTIFICATE_FILE)


def load_signing_key(data_dir: Path) -> SigningKey:
    """Key of a coordinator that has run here, for reading commands. Raises MachineError."""
    return SigningKey(_read_key(data_dir / _SIGNING_FILE))


def load_admin_key(data_dir: Path) -> bytes:
    """Key for Admin.Perform. Raises MachineError when this user may not read it."""
    return _read_key(data_dir / _ADMIN_FILE)


def save_running(data_dir: Path, running: RunningCoordinator) -> None:
    """Say where the coordinator is."""
    write_whole(
        data_dir / _ADDRESS_FILE, json.dumps(asdict(running), indent=1).encode() + b"\n", mode=0o644
    )


def forget_running(data_dir: Path) -> None:
    """Remove what `save_running` wrote, at a stop in good order."""
    (data_dir / _ADDRESS_FILE).unlink(missing_ok=True)


def load_running(data_dir: Path) -> RunningCoordinator:
    """Where the coordinator of this data directory says it is; it may have died since. Raises
    UnavailableError.
    """
    path = data_dir / _ADDRESS_FILE
    try:
        return RunningCoordinator(**json.loads(path.read_bytes()))
    except FileNotFoundError as error:
        raise UnavailableError(
            f"no coordinator runs on {data_dir}",
            allowed="a running coordinator",
            remedy=f"start one: muster-coordinator serve --data-dir {data_dir}",
            code=ErrorCode.COORDINATOR_UNREACHABLE,
        ) from error
    except (OSError, ValueError, TypeError) as error:
        raise CorruptDataError(
            f"{path} cannot be read: {error}",
            allowed="what a running coordinator writes there",
            remedy="restart the coordinator, which writes it anew",
        ) from error


def is_served(data_dir: Path) -> bool:
    """True if the process that said it serves this data directory is alive."""
    try:
        return Path(f"/proc/{load_running(data_dir).pid}").exists()
    except UnavailableError:
        return False


def write_whole(path: Path, data: bytes, *, mode: int) -> None:
    """Replace a file so that a reader or a crash sees the old or the new contents, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with os.fdopen(
            os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb"
        ) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise MachineError(
            f"cannot write {path}: {error.strerror}",
            allowed="a data directory with free space that this user may write",
            remedy="check --data-dir, its permissions and the disk",
            code=ErrorCode.PERMISSION_DENIED
            if isinstance(error, PermissionError)
            else ErrorCode.DISK_FULL,
        ) from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise MachineError(
            f"cannot read {path}: {error.strerror}",
            allowed="a complete data directory, read by the user that owns it",
            remedy="restore the file from a backup, or run as that user",
            code=ErrorCode.PERMISSION_DENIED,
        ) from error


def _read_key(path: Path) -> bytes:
    data = _read(path)
    if len(data) != _KEY_BYTES:
        raise CorruptDataError(
            f"{path} has {len(data)} bytes",
            allowed=f"{_KEY_BYTES}",
            remedy="restore it from a backup",
        )
    return data
