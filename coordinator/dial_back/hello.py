"""Who answers at a libp2p address: half a Noise handshake over plain TCP, without hivemind.

The listener's first Noise message holds its identity key and a signature by it over the key of this
very exchange, so reading that far proves who listens; nothing is sent after it. Forms after
https://github.com/multiformats/multistream-select,
https://github.com/libp2p/specs/tree/master/noise and the Noise Protocol Framework, revision 34
(section 7.5, pattern XX; names as there).
"""

import asyncio
import contextlib
import hashlib
import hmac
import ipaddress
import os

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from coordinator.operations.join import is_signed_by_p2p_key
from protos.contract.ids import p2p_peer_id_from_public_key

_MULTISTREAM, _NOISE = b"/multistream/1.0.0\n", b"/noise\n"
_PROTOCOL_NAME = b"Noise_XX_25519_ChaChaPoly_SHA256"
_SIGNED_PREFIX = b"noise-libp2p-static-key:"
_KEY_BYTES, _TAG_BYTES = 32, 16
_MAX_LINE_BYTES = 128
_IDENTITY_KEY, _IDENTITY_SIG = 0x0A, 0x12
"""Fields 1 and 2 of NoiseHandshakePayload, length-delimited."""
_KINDS = ("ip4", "ip6", "dns", "dns4", "dns6")


class HelloError(Exception):
    """Nobody, or somebody else, answers."""


def tcp_endpoint(address: str) -> tuple[str, int] | None:
    """(host, port) of a multiaddress that is dialled by plain TCP; None for relays, QUIC and
    websockets.
    """
    parts = address.split("/")
    is_tcp = len(parts) in (5, 7) and parts[1] in _KINDS and parts[3] == "tcp"
    if not is_tcp or (len(parts) == 7 and parts[5] != "p2p"):
        return None
    return parts[2], int(parts[4])


def is_loopback(address: str) -> bool:
    """True for an address at which only this machine answers."""
    host = address.split("/")[2]
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


async def identity_at(host: str, port: int, *, timeout_seconds: float) -> str:
    """libp2p identity (base58) that is proven by whoever listens there. Raises HelloError."""
    try:
        async with asyncio.timeout(timeout_seconds):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                return await _shake_hands(reader, writer)
            finally:
                writer.close()
    except TimeoutError as error:
        raise HelloError(f"no answer within {timeout_seconds:.0f} s") from error
    except asyncio.IncompleteReadError as error:
        raise HelloError("it hung up") from error
    except OSError as error:
        raise HelloError(os.strerror(error.errno) if error.errno else str(error)) from error


async def _shake_hands(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
    writer.write(_line(_MULTISTREAM) + _line(_NOISE))
    for wanted in (_MULTISTREAM, _NOISE):
        if (found := await _read_line(reader)) != wanted:
            raise HelloError(f"it says {found[:40]!r}, not {wanted!r}: no libp2p listener of ours")
    exchange = _Exchange()
    first = exchange.public_bytes
    writer.write(len(first).to_bytes(2, "big") + first)
    length = int.from_bytes(await reader.readexactly(2), "big")
    return exchange.identity_of(await reader.readexactly(length))


def _line(data: bytes) -> bytes:
    return bytes([len(data)]) + data


async def _read_line(reader: asyncio.StreamReader) -> bytes:
    (length,) = await reader.readexactly(1)
    if length >= _MAX_LINE_BYTES:
        raise HelloError("it does not speak multistream")
    return await reader.readexactly(length)


class _Exchange:
    """The initiator of XX up to the responder's message: `-> e`, `<- e, ee, s, es`."""

    def __init__(self) -> None:
        self._e = X25519PrivateKey.generate()
        self._h = self._ck = _PROTOCOL_NAME
        self._k = b""
        self._mix_hash(b"")  # empty prologue
        self._mix_hash(self.public_bytes)
        self._mix_hash(b"")  # empty payload of the first message

    @property
    def public_bytes(self) -> bytes:
        """The own ephemeral key, e.pub."""
        return self._e.public_key().public_bytes_raw()

    def identity_of(self, message: bytes) -> str:
        """Who wrote the responder's message. Raises HelloError."""
        least = 2 * _KEY_BYTES + 2 * _TAG_BYTES
        if len(message) < least:
            raise HelloError(f"its handshake has {len(message)} bytes; at least {least} are needed")
        re, rest = message[:_KEY_BYTES], message[_KEY_BYTES:]
        encrypted_s, payload = rest[: _KEY_BYTES + _TAG_BYTES], rest[_KEY_BYTES + _TAG_BYTES :]
        try:
            self._mix_hash(re)
            self._mix_key(re)
            rs = self._decrypt(encrypted_s)
            self._mix_key(rs)
            fields = _length_delimited(self._decrypt(payload))
        except (InvalidTag, ValueError, IndexError) as error:
            raise HelloError("its handshake does not decrypt") from error
        key, signature = fields.get(_IDENTITY_KEY, b""), fields.get(_IDENTITY_SIG, b"")
        if not is_signed_by_p2p_key(key, _SIGNED_PREFIX + rs, signature):
            raise HelloError("its handshake is not signed by its identity")
        return p2p_peer_id_from_public_key(key)

    def _mix_hash(self, data: bytes) -> None:
        self._h = hashlib.sha256(self._h + data).digest()

    def _mix_key(self, public: bytes) -> None:
        shared = self._e.exchange(X25519PublicKey.from_public_bytes(public))
        temporary = hmac.digest(self._ck, shared, "sha256")
        self._ck = hmac.digest(temporary, b"\x01", "sha256")
        self._k = hmac.digest(temporary, self._ck + b"\x02", "sha256")

    def _decrypt(self, data: bytes) -> bytes:
        """DecryptAndHash; every key is used once, so the nonce is 0."""
        plain: bytes = ChaCha20Poly1305(self._k).decrypt(bytes(12), data, self._h)
        self._mix_hash(data)
        return plain


def _length_delimited(data: bytes) -> dict[int, bytes]:
    """Length-delimited protobuf fields by their tag byte. Raises IndexError, ValueError."""
    fields, position = {}, 0
    while position < len(data):
        tag, length, shift = data[position], 0, 0
        if tag & 7 != 2:
            raise ValueError(f"field of wire type {tag & 7}")
        position += 1
        while True:
            byte = data[position]
            position, length, shift = position + 1, length | (byte & 0x7F) << shift, shift + 7
            if byte < 0x80:
                break
        fields[tag] = data[position : position + length]
        position += length
    return fields
