"""The file that an imported model travels in: safetensors with one flat fp32 vector.

`run create --init` takes it, the run's spec names its SHA-256, the coordinator serves it, and every
peer starts from it instead of from the seed. The header says which model and tokenizer it holds, so
that nothing about it has to be typed again. Same contents, same bytes, same digest.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from protos.contract.errors import CorruptDataError, MachineError, MusterError, UsageError
from protos.contract.run_spec import ModelSpec, parse_fields, plain_fields

FORMAT = "muster initial 1"
VECTOR = "params"
INITIAL_FILE = "initial.safetensors"
_LENGTH_BYTES = 8
MAX_HEADER_BYTES = 65_536


@dataclass(frozen=True, slots=True, kw_only=True)
class InitialHeader:
    """What the file says about itself."""

    model: ModelSpec
    """seq_len is the window that the importer chose; a run may choose another."""
    tokenizer_digest: str
    """Hex SHA-256 of the tokenizer.json that the model was trained with."""
    eos_token_id: int
    origin: str
    """Where it came from, for people."""

    def to_metadata(self) -> dict[str, str]:
        """Text metadata of the file."""
        return {
            "format": FORMAT,
            "model": json.dumps(plain_fields(self.model), sort_keys=True),
            "tokenizer_digest": self.tokenizer_digest,
            "eos_token_id": str(self.eos_token_id),
            "origin": self.origin,
        }

    def require_model(self, model: ModelSpec) -> None:
        """Raise UsageError unless a run's model has this file's parameters: all but the window's
        length must be equal.
        """
        ours, theirs = plain_fields(model), plain_fields(self.model)
        different = [name for name in theirs if name != "seq_len" and ours[name] != theirs[name]]
        if different:
            found = ", ".join(f"model.{name} = {ours[name]}" for name in different)
            wanted = ", ".join(f"{name} = {theirs[name]}" for name in different)
            raise UsageError(
                f"the run has {found}",
                allowed=f"the imported model's {wanted}",
                remedy="leave the model out; it comes with the file",
            )


def initial_path(digest: str) -> str:
    """Where a coordinator keeps it, below its data directory."""
    return f"initial/{digest}.safetensors"


def file_digest(path: Path) -> str:
    """Hex SHA-256 of a file. Raises MachineError."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(path, error) from error


def is_initial_file(path: Path) -> bool:
    """True if the file says that it is one."""
    try:
        return _metadata(path).get("format") == FORMAT
    except CorruptDataError:
        return False


def read_initial_header(path: Path) -> InitialHeader:
    """Header of a file. Raises MachineError, CorruptDataError."""
    metadata = _metadata(path)
    try:
        if metadata["format"] != FORMAT:
            raise ValueError(f"format {metadata['format']!r}")
        return InitialHeader(
            model=parse_fields(ModelSpec, json.loads(metadata["model"]), where="model"),
            tokenizer_digest=metadata["tokenizer_digest"],
            eos_token_id=int(metadata["eos_token_id"]),
            origin=metadata["origin"],
        )
    except (KeyError, ValueError, TypeError, MusterError) as error:
        raise _corrupt(path, f"its header does not parse ({error})") from error


def _metadata(path: Path) -> dict[str, str]:
    try:
        with path.open("rb") as file:
            size_bytes = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            header = json.loads(file.read(min(size_bytes, 100 * MAX_HEADER_BYTES)))
        found = header["__metadata__"]
        return {str(key): str(text) for key, text in found.items()}
    except OSError as error:
        raise _unreadable(path, error) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _corrupt(path, f"no safetensors header ({error!r})") from error


def _unreadable(path: Path, error: OSError) -> MachineError:
    return MachineError(
        f"cannot read {path}: {error.strerror or error}",
        allowed="a file that `muster-peer import` wrote",
        remedy="check the path",
    )


def _corrupt(path: Path, found: str) -> CorruptDataError:
    return CorruptDataError(
        f"{path}: {found}",
        allowed="a file that `muster-peer import` wrote",
        remedy="import the model again",
    )
