"""Who this peer is: an Ed25519 key for everything signed and an RSA key for libp2p, both under the
home directory.

`identity.key` is the raw Ed25519 private key. `p2p.key` is libp2p's private key protobuf (08 00 12
length DER-PKCS1), the form that hivemind's `identity_path` wants; it is RSA because p2pd's
transport checks that kind. Both files are made once, mode 0600, and never replaced: a damaged key
is refused, since a new one would be a new peer.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from protos.contract.errors import CorruptDataError, MachineError
from protos.contract.ids import PeerId
from protos.contract.signing import SigningKey

IDENTITY_KEY_NAME = "identity.key"
P2P_KEY_NAME = "p2p.key"
_RSA_BITS = 2048
_KEY_TYPE_RSA = b"\x08\x00"
_DATA_FIELD = b"\x12"


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Both keys of a peer."""

    signing_key: SigningKey
    """Ed25519."""
    p2p_private_key: rsa.RSAPrivateKey
    """RSA; proves the libp2p identity at Join."""
    identity_key_path: Path
    """File of the Ed25519 key, for the swarm process."""
    p2p_key_path: Path
    """File of the RSA key, for p2pd."""

    @property
    def peer_id(self) -> PeerId:
        """Identity in the run."""
        return self.signing_key.peer_id

    @property
    def p2p_public_key(self) -> bytes:
        """libp2p's public key protobuf (08 00 12 length DER-SubjectPublicKeyInfo)."""
        der = self.p2p_private_key.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        return _rsa_protobuf(der)

    def sign_with_p2p_key(self, data: bytes) -> bytes:
        """RSA PKCS#1 v1.5 SHA-256 signature, as Join wants it."""
        return self.p2p_private_key.sign(data, padding.PKCS1v15(), hashes.SHA256())


def load_identity(home: Path) -> Identity:
    """Read both keys, making those that do not exist yet. Raises CorruptDataError, MachineError."""
    identity_path, p2p_path = home / IDENTITY_KEY_NAME, home / P2P_KEY_NAME
    if not identity_path.exists():
        _write_private(identity_path, SigningKey.generate().private_bytes())
    if not p2p_path.exists():
        _write_private(p2p_path, _rsa_protobuf(_new_rsa_der()))
    try:
        signing_key = SigningKey(_read(identity_path))
    except ValueError as error:
        raise _damaged(identity_path, "32 bytes", error) from error
    try:
        der = _data_of_rsa_protobuf(_read(p2p_path))
        p2p_key = serialization.load_der_private_key(der, password=None)
    except ValueError as error:
        raise _damaged(p2p_path, "libp2p's RSA private key", error) from error
    if not isinstance(p2p_key, rsa.RSAPrivateKey):
        raise _damaged(p2p_path, "an RSA key", ValueError(type(p2p_key).__name__))
    return Identity(
        signing_key=signing_key,
        p2p_private_key=p2p_key,
        identity_key_path=identity_path,
        p2p_key_path=p2p_path,
    )


def _damaged(path: Path, allowed: str, error: ValueError) -> CorruptDataError:
    return CorruptDataError(
        f"{path} is damaged: {error}",
        allowed=allowed,
        remedy="restore it from a backup, or delete it and join as a new peer with an unused token",
    )


def _new_rsa_der() -> bytes:
    key = rsa.generate_private_key(public_exponent=65537, key_size=_RSA_BITS)
    return key.private_bytes(
        serialization.Encoding.DER,
        serialization.PrivateFormat.TraditionalOpenSSL,
        serialization.NoEncryption(),
    )


def _rsa_protobuf(der: bytes) -> bytes:
    return _KEY_TYPE_RSA + _DATA_FIELD + _varint(len(der)) + der


def _data_of_rsa_protobuf(data: bytes) -> bytes:
    prefix = _KEY_TYPE_RSA + _DATA_FIELD
    if not data.startswith(prefix):
        raise ValueError(f"begins with {data[:3].hex()}, not {prefix.hex()}")
    length, shift, position = 0, 0, len(prefix)
    while True:
        if position >= len(data) or shift > 28:
            raise ValueError("ends inside its length")
        byte = data[position]
        length |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            break
    if len(data) - position != length:
        raise ValueError(f"has {len(data) - position} bytes of key, says {length}")
    return data[position:]


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number >= 0x80:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise MachineError(
            f"cannot read {path}: {error.strerror}",
            allowed="a key file that this user may read",
            remedy=f"check its owner and mode: ls -l {path}",
        ) from error


def _write_private(path: Path, data: bytes) -> None:
    """Create with mode 0600, whole or not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise MachineError(
            f"cannot write {path}: {error.strerror}",
            allowed="a home directory that this user may write",
            remedy="choose another with --home",
        ) from error
