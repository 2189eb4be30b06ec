"""How a peer reaches its coordinator and proves who it is: TLS, metadata, limits, deadlines, join
strings.

TLS: the coordinator has one self-signed ECDSA P-256 certificate that is its own CA (CA:TRUE, names
`TLS_NAME` and the hosts that it was made for). Its SHA-256 over DER is the fingerprint in the join
string. A client that does not know the certificate yet fetches it without verification, compares
the fingerprint, and from then on uses it as the only root; the name checked is always `TLS_NAME`,
so addresses may change. (A separate CA would have to be sent in the chain, and Python's `ssl` shows
only the leaf before 3.13.)

Identity: Join proves the peer's keys and returns a session key; every later call carries
`muster-peer`, `muster-time` (Unix milliseconds) and `muster-mac`, an HMAC-SHA256 with that key over
method, peer and time. gRPC for Python cannot ask for client certificates optionally, and an HMAC
costs microseconds.
"""

import base64
import binascii
import datetime
import hashlib
import hmac
import ipaddress
import json
import socket
import ssl
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from protos.contract.digest import canonical_json
from protos.contract.errors import (
    ERROR_CLASS_BY_STATUS,
    ErrorCode,
    MusterError,
    RefusedError,
    UnavailableError,
    UsageError,
)
from protos.contract.ids import PROTOCOL_VERSION, is_valid_run_id

TLS_NAME = "muster-coordinator"
"""Name in the certificate that clients check, whatever the address."""

METADATA_PEER = "muster-peer"
METADATA_TIME = "muster-time"
METADATA_MAC = "muster-mac"
METADATA_PROTOCOL = "muster-protocol"
METADATA_ERROR_CODE = "muster-error-code"
"""Trailing metadata: ErrorCode as a decimal number."""
METADATA_ERROR_PARTS = "muster-error-bin"
"""Trailing metadata: canonical JSON {found, allowed, remedy}."""
ADMIN_PEER = "admin"
"""Value of `muster-peer` for calls with the data directory's admin key."""
UNAUTHENTICATED_METHODS = frozenset(
    {"/muster.v1.Membership/Challenge", "/muster.v1.Membership/Join"}
)

MAC_TOLERANCE_SECONDS = 60.0
"""Largest difference between `muster-time` and the coordinator's clock."""
MAX_MESSAGE_BYTES = 4 * 2**20
"""Largest message in either direction; the largest needed is a batch of certificates."""
MAX_STREAM_PART_BYTES = 2**20
"""Largest data part of a streamed file."""

UNARY_DEADLINE_SECONDS = 10.0
JOIN_DEADLINE_SECONDS = 20.0
STREAM_DEADLINE_SECONDS = 600.0
CONNECT_DEADLINE_SECONDS = 10.0
SLOWEST_LINK_BYTES_PER_SECOND = 125_000.0
"""1 Mbit/s: a transfer that is slower is given up."""

_JOIN_PREFIX = "muster1:"
_VALIDITY_DAYS = 3650
_ENDED_WHILE_SENDING = "Internal error from Core"
"""What grpc.aio says of a call that the other side ended while a message was on its way."""
_MAX_JOIN_STRING_CHARACTERS = 2048

ChannelOptions = list[tuple[str, int | str]]


def transfer_deadline_seconds(num_bytes: int) -> float:
    """Longest that the transfer of a file of this size may take, for both sides."""
    return STREAM_DEADLINE_SECONDS + num_bytes / SLOWEST_LINK_BYTES_PER_SECOND


def request_mac(session_key: bytes, *, method: str, peer_id: str, unix_ms: int) -> str:
    """Hex HMAC-SHA256 that authenticates one call. `method` is the full gRPC path,
    `/package.Service/Method`.
    """
    text = f"{method}\n{peer_id}\n{unix_ms}"
    # hmac.digest would let go of the interpreter's lock, which costs a busy server far more
    return hmac.new(session_key, text.encode(), "sha256").hexdigest()


def auth_metadata(
    session_key: bytes, *, method: str, peer_id: str, now_unix_seconds: float
) -> tuple[tuple[str, str], ...]:
    """Metadata for one call."""
    unix_ms = int(now_unix_seconds * 1000)
    mac = request_mac(session_key, method=method, peer_id=peer_id, unix_ms=unix_ms)
    return (
        (METADATA_PEER, peer_id),
        (METADATA_TIME, str(unix_ms)),
        (METADATA_MAC, mac),
        (METADATA_PROTOCOL, str(PROTOCOL_VERSION)),
    )


def check_auth(
    session_key: bytes, metadata: Mapping[str, str], *, method: str, now_unix_seconds: float
) -> None:
    """Return if the metadata authenticates this call, else raise RefusedError (SESSION_INVALID,
    CLOCK_SKEW or PROTOCOL_MISMATCH: a session lives on when one side is upgraded).
    """
    peer_id, time_text = metadata.get(METADATA_PEER, ""), metadata.get(METADATA_TIME, "")
    if not (time_text.isascii() and time_text.isdigit() and len(time_text) <= 15):
        raise RefusedError(
            f"call to {method} without a usable {METADATA_TIME}",
            allowed="every call but Challenge and Join is authenticated",
            remedy="join first",
        )
    expected = request_mac(session_key, method=method, peer_id=peer_id, unix_ms=int(time_text))
    if not hmac.compare_digest(expected.encode(), metadata.get(METADATA_MAC, "").encode()):
        raise RefusedError(
            f"{METADATA_MAC} of {peer_id!r} is not that of its session",
            allowed="only calls made with the session key that Join returned",
            remedy="join again",
        )
    skew_seconds = int(time_text) / 1000 - now_unix_seconds
    if abs(skew_seconds) > MAC_TOLERANCE_SECONDS:
        raise RefusedError(
            f"clock of {peer_id} differs by {skew_seconds:+.0f} s",
            allowed=f"at most {MAC_TOLERANCE_SECONDS:.0f} s",
            remedy="synchronise the machine's clock (timedatectl set-ntp true)",
            code=ErrorCode.CLOCK_SKEW,
        )
    found = metadata.get(METADATA_PROTOCOL, "3 or older")
    if found != str(PROTOCOL_VERSION):
        raise RefusedError(
            f"{peer_id} speaks protocol version {found[:20]}",
            allowed=f"version {PROTOCOL_VERSION}",
            remedy="install the package version that the operator runs",
            code=ErrorCode.PROTOCOL_MISMATCH,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinString:
    """What a volunteer pastes: where to go, whom to trust, which run, and the right to come in."""

    address: str
    """host:port or [ipv6]:port."""
    ca_fingerprint: str
    """Hex SHA-256 of the coordinator's certificate (DER)."""
    run_id: str
    secret: str
    """Token secret, as the coordinator printed it."""
    expire_unix_seconds: int
    """When the token stops admitting new keys; 0 = never."""

    def encode(self) -> str:
        """One line without spaces."""
        plain = {name: getattr(self, name) for name in self.__slots__}
        return _JOIN_PREFIX + base64.urlsafe_b64encode(canonical_json(plain)).decode().rstrip("=")

    @classmethod
    def decode(cls, text: str) -> "JoinString":
        """Parse what `encode` wrote, surrounding blanks allowed. Raises UsageError for anything
        else.
        """
        text = text.strip()
        if not text.startswith(_JOIN_PREFIX) or len(text) > _MAX_JOIN_STRING_CHARACTERS:
            shown = text if len(text) <= 16 else text[:16] + "..."
            raise _bad_join_string(f"{shown!r} ({len(text)} characters)")
        body = text.removeprefix(_JOIN_PREFIX)
        try:
            data = base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True)
            plain = json.loads(data)
        except (binascii.Error, ValueError) as error:
            raise _bad_join_string(f"text that does not decode ({error})") from error
        if not isinstance(plain, dict) or set(plain) != set(cls.__slots__):
            raise _bad_join_string("fields that are not those of a join string")
        expire = plain.pop("expire_unix_seconds")
        if type(expire) is not int or expire < 0:
            raise _bad_join_string(f"expiry {expire!r}")
        if not all(isinstance(value, str) for value in plain.values()):
            raise _bad_join_string("a field that is not text")
        fingerprint = plain["ca_fingerprint"]
        if len(fingerprint) != 64 or not set(fingerprint) <= set("0123456789abcdef"):
            raise _bad_join_string(f"CA fingerprint of {len(fingerprint)} characters")
        if not is_valid_run_id(plain["run_id"]) or not plain["secret"]:
            raise _bad_join_string(f"run {plain['run_id']!r} or an empty secret")
        split_address(plain["address"])
        join_string = cls(expire_unix_seconds=expire, **plain)
        if join_string.encode() != text:
            raise _bad_join_string("text that was changed after it was printed")
        return join_string


def _bad_join_string(found: str) -> UsageError:
    return UsageError(
        f"join string: found {found}",
        allowed=f"the whole line {_JOIN_PREFIX}... that `muster-coordinator token create` printed",
        remedy="copy it again without line breaks",
    )


def split_address(address: str) -> tuple[str, int]:
    """Host and port of host:port or [ipv6]:port. Raises UsageError."""
    host, separator, port_text = address.rpartition(":")
    is_bracketed = host.startswith("[") and host.endswith("]")
    is_port = port_text.isascii() and port_text.isdigit() and 0 < int(port_text) < 65536
    if not separator or not is_port or not host.strip("[]") or (":" in host and not is_bracketed):
        raise UsageError(
            f"address {address!r}",
            allowed="HOST:PORT or [IPV6]:PORT with port 1 to 65535",
            remedy="correct it",
        )
    return host.strip("[]"), int(port_text)


def create_server_identity(hosts: Iterable[str]) -> tuple[bytes, bytes]:
    """Make a self-signed certificate for `TLS_NAME` and the given hosts; returns certificate and
    key as PEM.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, TLS_NAME)])
    now_time = datetime.datetime.now(datetime.UTC)
    names: list[x509.GeneralName] = [x509.DNSName(TLS_NAME)]
    for host in hosts:
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            names.append(x509.DNSName(host))
    usage = x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=True,
        crl_sign=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now_time - datetime.timedelta(days=1))
        .not_valid_after(now_time + datetime.timedelta(days=_VALIDITY_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(key, hashes.SHA256())
    )
    key_pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return certificate.public_bytes(serialization.Encoding.PEM), key_pem


def ca_fingerprint(cert_pem: bytes) -> str:
    """Hex SHA-256 of the certificate's DER bytes."""
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(cert_pem.decode())).hexdigest()


def fetch_pinned_ca(host: str, port: int, ca_fingerprint: str, *, timeout_seconds: float) -> bytes:
    """Fetch the server's certificate (PEM) and check it against the fingerprint of the join string.
    Blocking.

    Raises UnavailableError if nobody answers with TLS, RefusedError (CA_MISMATCH) if it is somebody
    else.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # verified below, by fingerprint
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection((host, port), timeout=timeout_seconds) as sock,
            context.wrap_socket(sock, server_hostname=TLS_NAME) as tls,
        ):
            certificate_der = tls.getpeercert(binary_form=True) or b""
    except OSError as error:
        raise UnavailableError(
            f"no coordinator answers at {host}:{port} ({error})",
            allowed="a coordinator that this machine can reach over TLS",
            remedy="check the address and the firewall, or try again when it is up",
        ) from error
    found = hashlib.sha256(certificate_der).hexdigest()
    if not hmac.compare_digest(found, ca_fingerprint):
        raise RefusedError(
            f"the server at {host}:{port} has certificate {found[:16]}..., not the expected one",
            allowed=f"only {ca_fingerprint[:16]}..., which the join string names",
            remedy="ask the operator for a new join string, or whether somebody is in between",
            code=ErrorCode.CA_MISMATCH,
        )
    return ssl.DER_cert_to_PEM_cert(certificate_der).encode()


def channel_options() -> ChannelOptions:
    """Options of every client channel: one name for TLS, limits, keepalive, quick reconnection."""
    return [
        ("grpc.ssl_target_name_override", TLS_NAME),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.min_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 5_000),
        ("grpc.enable_http_proxy", 0),
    ]


def server_options() -> ChannelOptions:
    """Options of the coordinator's server: limits; a taken port is an error, not shared."""
    return [
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.http2.min_ping_interval_without_data_ms", 20_000),
        ("grpc.max_metadata_size", 16 * 2**10),
    ]


def open_aio_channel(address: str, cert_pem: bytes) -> grpc.aio.Channel:
    """Open an asyncio channel that trusts this certificate only; connects at the first call."""
    split_address(address)
    credentials = grpc.ssl_channel_credentials(root_certificates=cert_pem)
    return grpc.aio.secure_channel(address, credentials, options=channel_options())


def server_credentials(cert_pem: bytes, key_pem: bytes) -> grpc.ServerCredentials:
    """Credentials of the coordinator's server."""
    return grpc.ssl_server_credentials([(key_pem, cert_pem)])


def error_metadata(error: MusterError) -> tuple[tuple[str, str | bytes], ...]:
    """Trailing metadata that carries an error's code and parts; the status' details are
    `str(error)`.
    """
    parts = {"found": error.found, "allowed": error.allowed, "remedy": error.remedy}
    return (METADATA_ERROR_CODE, str(int(error.code))), (
        METADATA_ERROR_PARTS,
        canonical_json(parts),
    )


def error_from_rpc(error: grpc.aio.AioRpcError) -> MusterError:
    """The error that the other side raised; statuses without our metadata (unreachable, deadline)
    included. One that ended the call while it was being sent to is unavailable: gRPC then loses
    its reason.
    """
    status_name = error.code().name
    if (status_name, error.details()) == ("INTERNAL", _ENDED_WHILE_SENDING):
        status_name = "UNAVAILABLE"
    error_class = ERROR_CLASS_BY_STATUS.get(status_name, MusterError)
    metadata = {str(key): value for key, value in (error.trailing_metadata() or ())}
    try:
        code = ErrorCode(int(metadata[METADATA_ERROR_CODE]))
        parts = json.loads(metadata[METADATA_ERROR_PARTS])
        found, allowed, remedy = (str(parts[name]) for name in ("found", "allowed", "remedy"))
    except (KeyError, ValueError, TypeError):
        return error_class(f"coordinator: {status_name}: {error.details()}")
    return error_class(found, allowed=allowed, remedy=remedy, code=code)
