"""`run create --init FILE`: the imported model that a run starts from, checked and kept."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from protos.contract.chunk_format import Manifest
from protos.contract.errors import CorruptDataError, ErrorCode, MachineError, UsageError
from protos.contract.initial_file import (
    INITIAL_FILE,
    InitialHeader,
    file_digest,
    initial_path,
    read_initial_header,
)

_HF_CONFIG = "config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportedModel:
    """A file that `muster-peer import` wrote."""

    header: InitialHeader
    digest: str
    """Hex SHA-256 of the file."""


def read_initial(path: Path, manifest: Manifest) -> ImportedModel:
    """The file, or the one in a folder. Raises UsageError unless the dataset is in its model's
    tokens.
    """
    if (path / _HF_CONFIG).is_file() and not (path / INITIAL_FILE).is_file():
        raise UsageError(
            f"{path} is a folder in transformers' form, as `export` and `finetune` write",
            allowed="a folder that `muster-peer import` wrote",
            remedy=f"run `muster-peer import {path} DIR`, then name DIR with --init",
        )
    path = _file_of(path)
    header = read_initial_header(path)
    if header.tokenizer_digest != manifest.tokenizer_digest:
        raise UsageError(
            f"the dataset has the tokenizer {manifest.tokenizer_digest[:16]}...",
            allowed=f"the imported model's, {header.tokenizer_digest[:16]}...",
            remedy="build the corpus with `corpus build --tokenizer FOLDER/tokenizer.json "
            f"--eos-token-id {header.eos_token_id}`, FOLDER being what `import` wrote",
        )
    return ImportedModel(header=header, digest=file_digest(path))


def keep_initial(path: Path, digest: str, data_dir: Path) -> None:
    """Copy the file into the data directory, whole and durable, unless it is there. Raises
    MachineError, CorruptDataError.
    """
    target = data_dir / initial_path(digest)
    if target.is_file() and file_digest(target) == digest:
        return
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(_file_of(path), temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        if file_digest(temporary) != digest:
            raise CorruptDataError(
                f"{path} changed while it was copied",
                allowed="a file that stays as it is",
                remedy="run the command again",
            )
        temporary.replace(target)
    except OSError as error:
        raise MachineError(
            f"cannot write {target}: {error.strerror or error}",
            allowed="a data directory with room for the model",
            remedy="free space",
            code=ErrorCode.DISK_FULL,
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _file_of(path: Path) -> Path:
    return path / INITIAL_FILE if path.is_dir() else path
