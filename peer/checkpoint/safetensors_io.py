"""safetensors files of fp32 arrays: written as a stream and atomically, read strictly.

The format is a little-endian uint64 with the length of a JSON header, the header (name -> dtype,
shape, byte range; text metadata under "__metadata__"), then the data. Writing it here needs no copy
of the vectors, which the library's `save` makes; files are read by any safetensors library. Reading
maps the file and accepts nothing but contiguous F32 tensors.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from protos.contract.errors import CorruptDataError, ErrorCode, MachineError

Float32Array = npt.NDArray[np.float32]

_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000
_WRITE_BYTES = 2**24
_METADATA = "__metadata__"


def save_tensors(
    path: Path, tensors: Mapping[str, Float32Array], metadata: Mapping[str, str]
) -> None:
    """Write a file so that it is either whole and durable under `path` or not there. Raises
    MachineError.

    Arrays are fp32 and C-contiguous.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(_header(tensors, metadata))
            for array in tensors.values():
                assert array.dtype == np.float32 and array.flags.c_contiguous
                flat = array.reshape(-1).view(np.uint8).data
                for begin in range(0, flat.nbytes, _WRITE_BYTES):
                    file.write(flat[begin : begin + _WRITE_BYTES])
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
        _sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        code = ErrorCode.DISK_FULL if error.errno in (28, 122) else ErrorCode.PERMISSION_DENIED
        raise MachineError(
            f"cannot write {path}: {error.strerror or error}",
            allowed="a writable folder with room for the model",
            remedy="free space or choose another folder",
            code=code,
        ) from error


def load_tensors(path: Path) -> tuple[dict[str, Float32Array], dict[str, str]]:
    """Read-only arrays mapped from a file, and its metadata.

    Raises CorruptDataError for any other content.
    """
    try:
        mapped = np.memmap(path, dtype=np.uint8, mode="r")
    except (OSError, ValueError) as error:
        raise _corrupt(path, f"cannot be read ({error})") from error
    if mapped.size < _LENGTH_BYTES:
        raise _corrupt(path, f"{mapped.size} bytes")
    header_bytes = int.from_bytes(mapped[:_LENGTH_BYTES].tobytes(), "little")
    begin = _LENGTH_BYTES + header_bytes
    if header_bytes > _MAX_HEADER_BYTES or begin > mapped.size:
        raise _corrupt(path, f"a header of {header_bytes} bytes in a file of {mapped.size}")
    try:
        header = json.loads(mapped[_LENGTH_BYTES:begin].tobytes())
        metadata = {str(key): str(text) for key, text in header.pop(_METADATA, {}).items()}
        tensors = _map_tensors(header, mapped[begin:])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _corrupt(path, f"its header is not valid ({error})") from error
    return tensors, metadata


def read_metadata(path: Path) -> dict[str, str]:
    """Text metadata of any safetensors file. Raises CorruptDataError."""
    try:
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            header = json.loads(file.read(min(header_bytes, _MAX_HEADER_BYTES)))
        return {str(key): str(text) for key, text in (header.get(_METADATA) or {}).items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise _corrupt(path, f"its header is not valid ({error})") from error


def _header(tensors: Mapping[str, Float32Array], metadata: Mapping[str, str]) -> bytes:
    plain: dict[str, Any] = {_METADATA: dict(metadata)}
    offset = 0
    for name, array in tensors.items():
        end = offset + array.nbytes
        plain[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [offset, end]}
        offset = end
    body = json.dumps(plain, separators=(",", ":")).encode()
    body += b" " * (-len(body) % 8)
    return len(body).to_bytes(_LENGTH_BYTES, "little") + body


def _map_tensors(
    header: dict[str, dict[str, Any]], data: npt.NDArray[np.uint8]
) -> dict[str, Float32Array]:
    tensors: dict[str, Float32Array] = {}
    offset = 0
    for name, entry in header.items():
        shape = tuple(int(size) for size in entry["shape"])
        begin, end = (int(bound) for bound in entry["data_offsets"])
        if entry["dtype"] != "F32" or min(shape, default=0) < 0:
            raise ValueError(f"{name} is {entry['dtype']} {shape}")
        if begin != offset or end - begin != 4 * math.prod(shape) or end > data.size:
            raise ValueError(f"{name} lies at {begin} to {end} of {data.size} bytes")
        tensors[name] = data[begin:end].view("<f4").reshape(shape)
        offset = end
    if offset != data.size:
        raise ValueError(f"{data.size - offset} bytes too many")
    return tensors


def _corrupt(path: Path, found: str) -> CorruptDataError:
    return CorruptDataError(
        f"{path}: {found}",
        allowed="a safetensors file of contiguous F32 tensors",
        remedy="use an older checkpoint; this one is damaged",
    )


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
