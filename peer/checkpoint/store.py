"""Local checkpoints of the replicated state: {incarnation}-{outer_step}.safetensors, two kept,
digest-checked.

The file holds the flat vectors of the state and, as metadata, all that a restarted member needs to
go on without anybody: the state's meta and digest, the directive in force, the incarnation record,
and the certificates that the coordinator has not acknowledged yet. The coordinator's checkpoints
are the same files. A damaged newest file costs one step back, with the reason said, never a wrong
state: the digest is recomputed before a byte reaches the vectors.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from peer.checkpoint.safetensors_io import load_tensors, save_tensors
from protos.contract.digest import STATE_LAYOUTS, Float32Vector, StateMeta, state_digest
from protos.contract.errors import CorruptDataError

_FILE_PATTERN = re.compile(r"(\d+)-(\d+)\.safetensors")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointHeader:
    """Everything in a checkpoint but the vectors."""

    meta: StateMeta
    state_digest: bytes
    directive: bytes
    """Serialised Signed Directive in force for the next outer step."""
    incarnation_record: bytes
    """Serialised Signed IncarnationRecord."""
    unreported_certificates: tuple[bytes, ...] = ()
    """Serialised Certificates that the coordinator has not acknowledged, in order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedCheckpoint:
    """Result of `load_newest`."""

    header: CheckpointHeader | None
    """None if no usable checkpoint was found; the vectors are then as they were."""
    path: Path | None
    reason: str
    """Which checkpoint was taken, and what was wrong with newer ones."""


def save_checkpoint(path: Path, header: CheckpointHeader, vectors: Sequence[Float32Vector]) -> None:
    """Write the state's vectors with their header, atomically and durably. Raises MachineError."""
    metadata = {
        "format": "muster state 1",
        "state_meta": header.meta.to_json().decode(),
        "state_digest": header.state_digest.hex(),
        "directive": header.directive.hex(),
        "incarnation_record": header.incarnation_record.hex(),
        "unreported_certificates": json.dumps(
            [certificate.hex() for certificate in header.unreported_certificates]
        ),
    }
    layout = next(names for names in STATE_LAYOUTS.values() if len(names) == len(vectors))
    save_tensors(path, dict(zip(layout, vectors, strict=True)), metadata)


def open_checkpoint(path: Path) -> tuple[CheckpointHeader, tuple[Float32Vector, ...]]:
    """Header and read-only mapped vectors of a file whose digest has been recomputed.

    Raises CorruptDataError.
    """
    tensors, metadata = load_tensors(path)
    try:
        header = CheckpointHeader(
            meta=StateMeta.from_json(metadata["state_meta"].encode()),
            state_digest=bytes.fromhex(metadata["state_digest"]),
            directive=bytes.fromhex(metadata["directive"]),
            incarnation_record=bytes.fromhex(metadata["incarnation_record"]),
            unreported_certificates=tuple(
                bytes.fromhex(text) for text in json.loads(metadata["unreported_certificates"])
            ),
        )
        layout = next(names for names in STATE_LAYOUTS.values() if set(names) == set(tensors))
        vectors = tuple(tensors[name] for name in layout)
    except (KeyError, ValueError, TypeError, StopIteration) as error:
        raise _corrupt(path, f"metadata or vectors are missing or malformed ({error!r})") from error
    if any(vector.ndim != 1 or vector.size != vectors[0].size for vector in vectors):
        raise _corrupt(path, "vectors of different lengths")
    found = state_digest(header.meta, vectors)
    if found != header.state_digest:
        raise _corrupt(path, f"its contents have the digest {found.hex()[:16]}...")
    return header, vectors


def load_checkpoint(path: Path, targets: Sequence[Float32Vector]) -> CheckpointHeader:
    """Copy a checked checkpoint into the vectors.

    Raises CorruptDataError, with the vectors untouched.
    """
    header, vectors = open_checkpoint(path)
    if len(vectors) != len(targets):
        raise _corrupt(path, f"{len(vectors)} vectors where the run's strategy has {len(targets)}")
    if any(vector.size != target.size for vector, target in zip(vectors, targets, strict=True)):
        raise _corrupt(path, f"{vectors[0].size} parameters where the run has {targets[0].size}")
    for vector, target in zip(vectors, targets, strict=True):
        np.copyto(target, vector)
    return header


class CheckpointStore:
    """The folder of one peer's checkpoints of one run."""

    def __init__(self, folder: Path, *, num_kept: int = 2) -> None:
        """Create the folder and clear what an interrupted write has left."""
        self.folder = folder
        self._num_kept = num_kept
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for leftover in folder.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)

    def path_for(self, meta: StateMeta) -> Path:
        """Where the checkpoint of a state lies."""
        return self.folder / f"{meta.incarnation}-{meta.outer_step}.safetensors"

    def paths(self) -> list[Path]:
        """Checkpoints, newest first: by incarnation, then by outer step."""
        numbered = [
            (int(match[1]), int(match[2]), path)
            for path in self.folder.iterdir()
            if (match := _FILE_PATTERN.fullmatch(path.name))
        ]
        return [path for _, _, path in sorted(numbered, reverse=True)]

    def save(self, header: CheckpointHeader, vectors: Sequence[Float32Vector]) -> Path:
        """Write a checkpoint, then remove all but the newest. Raises MachineError."""
        path = self.path_for(header.meta)
        save_checkpoint(path, header, vectors)
        for old in self.paths()[self._num_kept :]:
            old.unlink(missing_ok=True)
        return path

    def load_newest(
        self,
        targets: Sequence[Float32Vector],
        *,
        run_digest: str,
        max_incarnation: int | None = None,
    ) -> LoadedCheckpoint:
        """Load the newest usable checkpoint of this run, trying older ones where one is damaged or
        of another run.
        """
        problems: list[str] = []
        for path in self.paths():
            match = _FILE_PATTERN.fullmatch(path.name)
            if max_incarnation is not None and match and int(match[1]) > max_incarnation:
                problems.append(f"{path.name} is of a later incarnation than {max_incarnation}")
                continue
            try:
                header, _ = open_checkpoint(path)
                if header.meta.run_digest != run_digest:
                    problems.append(f"{path.name} is of another run")
                    continue
                load_checkpoint(path, targets)
            except CorruptDataError as error:
                problems.append(str(error))
                continue
            reason = "; ".join([f"{path.name} loaded", *problems])
            return LoadedCheckpoint(header=header, path=path, reason=reason)
        reason = "; ".join(problems) or "there is none"
        return LoadedCheckpoint(header=None, path=None, reason=reason)


def _corrupt(path: Path, found: str) -> CorruptDataError:
    return CorruptDataError(
        f"checkpoint {path.name}: {found}",
        allowed="a state whose digest is the one in its metadata",
        remedy="fetch or write it again; a running peer takes an older one or a member's state",
    )
