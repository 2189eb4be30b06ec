"""What lies beside a run's checkpoints, so that any web server or folder can hand them out: which
file is the newest proved one, signed by the coordinator.

A mirror is a copy of that folder. It is trusted with nothing: the index is signed, and a file
counts only if the digest of its state is the one that the index names.
"""

import json
from dataclasses import asdict, dataclass

from protos.contract.certificate import Tag
from protos.contract.digest import canonical_json
from protos.contract.errors import CorruptDataError, ErrorCode
from protos.contract.signing import SigningKey, has_valid_signature

INDEX_NAME = "newest.json"
MAX_INDEX_BYTES = 16_384


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointIndex:
    """The newest proved checkpoint of a run."""

    run_id: str
    incarnation: int
    outer_step: int
    state_digest: str
    """Hex."""
    file_name: str
    """In the folder of the index."""
    total_bytes: int

    def signed(self, key: SigningKey) -> bytes:
        """The index as it is stored."""
        payload = canonical_json(asdict(self))
        plain = {"index": payload.decode(), "signature": key.sign(Tag.CHECKPOINT, payload).hex()}
        return canonical_json(plain)

    @classmethod
    def opened(cls, data: bytes, *, public_key: bytes, run_id: str) -> "CheckpointIndex":
        """Read a stored index. Raises CorruptDataError unless the coordinator signed it for this
        run.
        """
        try:
            plain = json.loads(data)
            payload, signature = plain["index"].encode(), bytes.fromhex(plain["signature"])
            is_signed = has_valid_signature(public_key, Tag.CHECKPOINT, payload, signature)
            index = cls(**json.loads(payload)) if is_signed else None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _bad(f"an index that does not parse ({type(error).__name__})") from error
        if index is None:
            raise _bad("an index that the coordinator did not sign")
        if index.run_id != run_id or "/" in index.file_name:
            raise _bad(f"an index of run {index.run_id!r} for {index.file_name!r}")
        return index


def _bad(found: str) -> CorruptDataError:
    return CorruptDataError(
        found,
        allowed="an index signed by this run's coordinator",
        remedy="copy the folder from the coordinator's data directory again",
        code=ErrorCode.SIGNATURE_INVALID,
    )
