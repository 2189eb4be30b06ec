"""The newest incarnation record, on disk before it is acted on; and how a home keeps runs apart."""

import hashlib
from pathlib import Path

from google.protobuf.message import DecodeError

from peer.swarm.durable_file import replace_durably
from protos.contract.errors import ErrorCode, MachineError
from protos.muster.v1 import common_pb2

_NAME = "incarnation.bin"


def run_folder_name(run_id: str, coordinator_public_key: bytes) -> str:
    """Name of a run's folders in a home; runs of one name at two coordinators are two runs."""
    return f"{run_id}-{hashlib.sha256(coordinator_public_key).hexdigest()[:16]}"


def load_record(folder: Path) -> common_pb2.Signed | None:
    """Record stored by an earlier life, or None; the caller checks its signature."""
    try:
        signed: common_pb2.Signed = common_pb2.Signed.FromString((folder / _NAME).read_bytes())
    except (FileNotFoundError, DecodeError):
        return None
    return signed


def save_record(folder: Path, record: common_pb2.Signed) -> None:
    """Store a record durably. Raises MachineError."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        replace_durably(folder / _NAME, record.SerializeToString())
    except OSError as error:
        raise MachineError(
            f"cannot write {folder / _NAME}: {error}",
            allowed="an incarnation is entered only when its record is on disk",
            remedy="free some space or choose another --home",
            code=ErrorCode.DISK_FULL,
        ) from error
