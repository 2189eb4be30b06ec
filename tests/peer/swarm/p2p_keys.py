"""libp2p identities, as hivemind reads them."""

from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from protos.contract.ids import p2p_peer_id_from_public_key


def write_p2p_key(path: Path) -> str:
    """Make a libp2p identity as hivemind reads it; returns its peer id."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    private = key.private_bytes(
        serialization.Encoding.DER,
        serialization.PrivateFormat.TraditionalOpenSSL,
        serialization.NoEncryption(),
    )
    public = key.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    path.write_bytes(_wrapped(private))
    return p2p_peer_id_from_public_key(_wrapped(public))


def _wrapped(data: bytes) -> bytes:
    length = len(data)
    return b"\x08\x00\x12" + bytes([length & 0x7F | 0x80, length >> 7]) + data
