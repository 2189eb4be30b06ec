"""Where a run's parameters start: from its seed, or from an imported model that its spec names by
digest.
"""

from pathlib import Path

import numpy as np

from peer.checkpoint.safetensors_io import load_tensors, save_tensors
from peer.model.init import initial_vector
from protos.contract.digest import Float32Vector
from protos.contract.errors import CorruptDataError
from protos.contract.initial_file import (
    VECTOR,
    InitialHeader,
    file_digest,
    read_initial_header,
)
from protos.contract.model_shape import ModelShape
from protos.contract.run_spec import RunSpec

_CHECKED_VALUES = 2**24


def save_initial(path: Path, header: InitialHeader, params: Float32Vector) -> str:
    """Write an imported model; returns the file's hex SHA-256. Raises MachineError,
    CorruptDataError for values that are not finite.
    """
    _require_values(path, header, params)
    save_tensors(path, {VECTOR: params}, header.to_metadata())
    return file_digest(path)


def load_initial(path: Path) -> tuple[InitialHeader, Float32Vector]:
    """Header and read-only parameters of an imported model. Raises CorruptDataError."""
    header = read_initial_header(path)
    tensors, _ = load_tensors(path)
    params = tensors.get(VECTOR)
    if params is None or params.ndim != 1:
        raise CorruptDataError(
            f"{path} holds {sorted(tensors)}",
            allowed=f"one flat vector {VECTOR}",
            remedy="import the model again",
        )
    _require_values(path, header, params)
    return header, params


def imported_model_path(home: Path, spec: RunSpec) -> Path | None:
    """Where a peer's daemon puts the imported model that a run starts from; None if it has none."""
    return home / "cache" / spec.initial_digest if spec.initial_digest else None


def initial_params(spec: RunSpec, imported: Path | None) -> Float32Vector:
    """Parameters before the first outer step: a function of the spec alone, because the file that
    it may name is checked by digest. Raises CorruptDataError, UsageError, MachineError.
    """
    if not spec.initial_digest:
        return initial_vector(spec)
    if imported is None:
        raise CorruptDataError(
            f"no file for a run that starts from {spec.initial_digest[:16]}...",
            allowed="the imported model that the run's spec names",
            remedy="fetch it from the run's coordinator",
        )
    found = file_digest(imported)
    if found != spec.initial_digest:
        raise CorruptDataError(
            f"{imported} has the digest {found[:16]}...",
            allowed=f"{spec.initial_digest[:16]}..., which the run's spec names",
            remedy="fetch it again",
        )
    header, params = load_initial(imported)
    header.require_model(spec.model)
    return params


def _require_values(path: Path, header: InitialHeader, params: Float32Vector) -> None:
    wanted = ModelShape.from_spec(header.model).num_parameters
    if params.size != wanted:
        raise CorruptDataError(
            f"{path} holds {params.size} parameters",
            allowed=f"the {wanted} of its model",
            remedy="import the model again",
        )
    for begin in range(0, params.size, _CHECKED_VALUES):
        if not np.isfinite(params[begin : begin + _CHECKED_VALUES]).all():
            raise CorruptDataError(
                f"{path} holds values that are not finite",
                allowed="finite fp32 values only enter a model",
                remedy="use an undamaged model",
            )
