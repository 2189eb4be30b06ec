"""Is an uploaded file the state that was proved? Reads safetensors with numpy, recomputes the
digest, looks for NaN.

The file is what peer/checkpoint writes: the flat fp32 vectors of one of STATE_LAYOUTS and, as
metadata, the StateMeta. Vectors are read one at a time; safetensors refuses bad headers, overlaps
and trailing bytes itself.
"""

from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from protos.contract.digest import (
    STATE_LAYOUTS,
    StateMeta,
    state_digest_of_pieces,
    vector_piece_digests,
)
from protos.contract.errors import CorruptDataError, ErrorCode

STATE_META_KEY = "state_meta"


def check_checkpoint(path: Path, *, incarnation: int, outer_step: int, state_digest: bytes) -> None:
    """Return if the file holds this state, else raise CorruptDataError saying what differs."""
    try:
        with safe_open(path, framework="np") as file:
            meta = StateMeta.from_json((file.metadata() or {}).get(STATE_META_KEY, "").encode())
            names = set(file.keys())
            layout = next((known for known in STATE_LAYOUTS.values() if set(known) == names), None)
            if layout is None:
                layouts = " or ".join(", ".join(known) for known in STATE_LAYOUTS.values())
                raise _refused(f"tensors {sorted(names)}", allowed=layouts)
            pieces = [_piece_digests(name, file.get_tensor(name)) for name in layout]
    except (SafetensorError, ValueError, TypeError, OSError) as error:
        raise _refused(
            f"a file that does not parse ({error})", allowed="safetensors of one state"
        ) from error
    if (meta.incarnation, meta.outer_step) != (incarnation, outer_step):
        raise _refused(
            f"state {meta.incarnation}.{meta.outer_step}",
            allowed=f"state {incarnation}.{outer_step} as attested",
        )
    found = state_digest_of_pieces(meta, pieces)
    if found != state_digest:
        raise CorruptDataError(
            f"the uploaded checkpoint has digest {found.hex()}",
            allowed=f"{state_digest.hex()}, the proved state",
            remedy="resynchronise and upload again",
            code=ErrorCode.DIGEST_MISMATCH,
        )


def _piece_digests(name: str, vector: np.ndarray) -> list[bytes]:
    if vector.dtype != np.float32 or vector.ndim != 1:
        raise _refused(
            f"{name} of type {vector.dtype} and shape {vector.shape}",
            allowed="flat float32 vectors",
        )
    if not np.isfinite(vector).all():
        raise _refused(f"{name} with values that are not finite", allowed="finite values")
    return vector_piece_digests(vector)


def _refused(found: str, *, allowed: str) -> CorruptDataError:
    return CorruptDataError(
        f"the uploaded checkpoint: {found}", allowed=allowed, remedy="upload the attested state"
    )
