"""Beside the ticker: keeps `newest.json` next to each run's checkpoints, signed, so that the folder
can be copied to mirrors (any web server) as it is.
"""

import asyncio
from pathlib import Path

from coordinator.operations.admin import list_runs
from coordinator.operations.duties import find_checkpoint
from coordinator.operations.requests import CheckpointInfo, FindCheckpointRequest
from coordinator.operations.requests_admin import ListRunsRequest
from coordinator.operations.writer import Writer
from coordinator.repeating import Repeating
from protos.contract.checkpoint_index import INDEX_NAME, CheckpointIndex
from protos.contract.signing import SigningKey

LOOK_SECONDS = 5.0


class MirrorIndex(Repeating):
    """Looks for newer checkpoints."""

    def __init__(self, writer: Writer, *, data_dir: Path, key: SigningKey) -> None:
        super().__init__("index of checkpoints", pause_seconds=LOOK_SECONDS)
        self._writer, self._data_dir, self._key = writer, data_dir, key
        self._written: dict[str, CheckpointInfo] = {}

    async def turn(self) -> None:
        """In a thread, because it writes files."""
        await asyncio.to_thread(self.write_due)

    def write_due(self) -> None:
        """Write the index of every run whose newest proved checkpoint is another one now."""
        for run in self._writer.read(list_runs, ListRunsRequest()).runs:
            wanted = FindCheckpointRequest(run_id=run.run_id)
            found = self._writer.read(find_checkpoint, wanted).checkpoint
            if found is not None and self._written.get(run.run_id) != found:
                self._write(run.run_id, found)
                self._written[run.run_id] = found

    def _write(self, run_id: str, found: CheckpointInfo) -> None:
        path = self._data_dir / found.path
        index = CheckpointIndex(
            run_id=run_id,
            incarnation=found.incarnation,
            outer_step=found.outer_step,
            state_digest=found.state_digest.hex(),
            file_name=path.name,
            total_bytes=found.total_bytes,
        )
        half = path.with_name(f".{INDEX_NAME}.tmp")
        half.write_bytes(index.signed(self._key))
        half.replace(path.with_name(INDEX_NAME))
