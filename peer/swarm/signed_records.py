"""Only its owner writes a presence record: checked by every node that stores or reads one.

A record's subkey is a peer_id, which is the hash of an Ed25519 key; its value is that key, a
signature by it over key, subkey, value and expiry, and the value. So a record proves itself, also
to a rendezvous that knows no roster: nobody can write another's record, replace it, or let an old
one live longer. Anything else is refused, because the DHT carries nothing else; so is a
value that does not parse, which would end the search of everybody who looks the key up.
"""

import dataclasses

from hivemind.dht.validation import DHTRecord, RecordValidatorBase
from hivemind.utils import MSGPackSerializer

from protos.contract.certificate import Tag
from protos.contract.ids import peer_id_from_public_key
from protos.contract.signing import SigningKey, has_valid_signature

_KEY_BYTES, _SIGNATURE_BYTES = 32, 64
_HEAD_BYTES = _KEY_BYTES + _SIGNATURE_BYTES
_MAX_VALUE_BYTES = 8192


class OwnRecordsOnly(RecordValidatorBase):  # type: ignore[misc]
    """Signs own records, refuses what its owner has not signed; `key` is None for a node that
    publishes nothing.
    """

    def __init__(self, key: SigningKey | None) -> None:
        self._key = key

    def sign_value(self, record: DHTRecord) -> bytes:
        """The value with the own key and signature before it."""
        assert self._key is not None, "a node without a key publishes nothing"
        signature = self._key.sign(Tag.PRESENCE, _payload(record))
        value: bytes = record.value
        return self._key.public_key + signature + value

    def validate(self, record: DHTRecord) -> bool:
        """True if the owner of the subkey signed this record."""
        if not _HEAD_BYTES < len(record.value) <= _HEAD_BYTES + _MAX_VALUE_BYTES:
            return False
        public_key = record.value[:_KEY_BYTES]
        if record.subkey != MSGPackSerializer.dumps(str(peer_id_from_public_key(public_key))):
            return False
        plain = dataclasses.replace(record, value=self.strip_value(record))
        if not _parses(plain.value):
            return False
        signature = record.value[_KEY_BYTES:_HEAD_BYTES]
        return has_valid_signature(public_key, Tag.PRESENCE, _payload(plain), signature)

    def strip_value(self, record: DHTRecord) -> bytes:
        """The value alone."""
        value: bytes = record.value
        return value[_HEAD_BYTES:]


def _parses(value: bytes) -> bool:
    """True if a reader gets through it."""
    try:
        MSGPackSerializer.loads(value)
    except (AssertionError, LookupError, RecursionError, TypeError, ValueError):
        return False
    return True


def _payload(record: DHTRecord) -> bytes:
    data: bytes = MSGPackSerializer.dumps(list(dataclasses.astuple(record)))
    return data
