"""Micro-batches whose loss or gradient was not finite, kept for inspection.

Each is skipped by the loop; here it is written to a file of its own, with what was computed and
how, so that a person can run it again (`safetensors.numpy.load_file` reads it). Only the newest few
are kept: a batch is small, a machine with broken memory makes many.
"""

from pathlib import Path

import numpy as np
from safetensors.numpy import save

from peer.home import write_atomically
from peer.model.objectives import Examples
from peer.shared_vectors import StatePosition
from protos.contract.errors import MachineError

MAX_KEPT = 8


class BadBatches:
    """Files of one directory, numbered upwards."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def keep(self, examples: Examples, *, total_nats: float, base: StatePosition, how: str) -> str:
        """Write a micro-batch; returns the file's path, or why there is none: a full disk must not
        end the training. `base` is the state that it was trained on, `how` names precision and
        execution.
        """
        values = {name: getattr(examples, name) for name in Examples.__slots__}
        data = save(
            {k: np.ascontiguousarray(v) for k, v in values.items() if v is not None},
            metadata={
                "incarnation": str(base.incarnation),
                "outer_step": str(base.outer_step),
                "schedule_tokens": str(base.schedule_tokens),
                "total_nats": repr(total_nats),
                "execution": how,
            },
        )
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            kept = sorted(self._directory.glob("batch-*.safetensors"))
            number = 1 + max((int(path.stem.split("-")[1]) for path in kept), default=0)
            path = self._directory / f"batch-{number:06d}.safetensors"
            write_atomically(path, data, is_durable=False)
            for old in kept[: max(0, len(kept) + 1 - MAX_KEPT)]:
                old.unlink(missing_ok=True)
        except (OSError, ValueError, MachineError) as error:
            return f"nowhere: {error}"
        return str(path)
