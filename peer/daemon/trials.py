"""Trials of a study on this machine: fetch the data, train in a process of its own, return what was
measured.

The process is one of the daemon's children and dies with it; one that comes round no more is ended
(child_watch.py), and the duty goes to somebody else with that reason. Its data is a directory of
links into the cache, laid out like a dataset, so that the code that trains a run trains the trial.
"""

import asyncio
import contextlib
import json
import shutil
import sys
import time
import uuid
from pathlib import Path
from typing import Any

from peer.background import finish
from peer.daemon.child_watch import SILENT_TURNS, ChildWatch
from peer.daemon.dataset import Dataset
from peer.ipc import ChannelClosed
from peer.supervisor import Child, Supervisor
from protos.contract.chunk_format import (
    MANIFEST_FILE,
    TOKENIZER_FILE,
    Manifest,
    heldout_chunk_path,
    num_windows,
    training_chunk_path,
)
from protos.contract.errors import RunFailedError, UsageError
from protos.contract.run_spec import RunSpec
from protos.contract.schedule_order import ScheduleOrder
from protos.muster.v1 import duties_pb2


def needed_chunks(spec: RunSpec, manifest: Manifest) -> list[int]:
    """Training chunks that a trial reads, each once, in the order in which it reads them."""
    order = ScheduleOrder(spec.seed, manifest, spec.model.seq_len)
    left_tokens, position, found = spec.budget_tokens, 0, dict[int, None]()
    while left_tokens > 0 and len(found) < len(manifest.training_chunks):
        _, chunk_index = order.chunk_at(position)
        chunk = manifest.training_chunks[chunk_index]
        found[chunk_index] = None
        left_tokens -= num_windows(chunk.num_tokens, spec.model.seq_len) * spec.model.seq_len
        position += 1
    return list(found)


_START_SECONDS = 300.0
"""From the start of the process to its first update: imports, initial values; twice as long each
time that the duty is handed out again (its fence), so that slow hosts come to an end as well.
"""
_MAX_START_DOUBLINGS = 6
_LEAST_TURN_SECONDS = 3.0
"""Ten of them are waited for in any case; a trial has minutes of work to lose."""
_TICK_SECONDS = 0.5


class Trials:
    """Runs one trial at a time."""

    def __init__(self, supervisor: Supervisor, dataset: Dataset, tmp: Path, threads: int) -> None:
        self._supervisor = supervisor
        self._dataset = dataset
        self._tmp = tmp
        self._threads = threads

    async def run(self, duty: duties_pb2.Duty) -> duties_pb2.TrialResult:
        """Train as the duty says. Raises MusterError with what went wrong."""
        spec = RunSpec.from_wire(duty.trial.run_spec)
        if spec.data.dataset_id != self._dataset.manifest.dataset_id:
            raise UsageError(
                f"a trial on dataset {spec.data.dataset_id[:12]}",
                allowed=f"the run's dataset {self._dataset.manifest.dataset_id[:12]}",
                remedy="the study was made wrongly; tell its operator",
            )
        for older in self._tmp.glob("trial-*"):
            shutil.rmtree(older, ignore_errors=True)
        folder = self._tmp / f"trial-{uuid.uuid4().hex}"
        held: list[bytes] = []
        try:
            await self._lay_out(folder, spec, held)
            return await self._train(folder, duty, spec)
        finally:
            for digest in held:
                self._dataset.release(digest)
            shutil.rmtree(folder, ignore_errors=True)

    async def _lay_out(self, folder: Path, spec: RunSpec, held: list[bytes]) -> None:
        manifest = self._dataset.manifest
        (folder / "chunks").mkdir(parents=True)
        (folder / MANIFEST_FILE).write_bytes(manifest.to_bytes())
        (folder / TOKENIZER_FILE).symlink_to(self._dataset.tokenizer_path)
        for index, path in enumerate(self._dataset.heldout_paths):
            (folder / heldout_chunk_path(index)).symlink_to(path)
        for index in needed_chunks(spec, manifest):
            digest = bytes.fromhex(manifest.training_chunks[index].digest)
            self._dataset.hold(digest)
            held.append(digest)
            path = await self._dataset.fetch_chunk(index, digest=digest)
            (folder / training_chunk_path(index)).symlink_to(path)

    async def _train(
        self, folder: Path, duty: duties_pb2.Duty, spec: RunSpec
    ) -> duties_pb2.TrialResult:
        spec_path, result_path = folder / "spec.json", folder / "result.json"
        spec_path.write_bytes(spec.to_wire())
        command = [
            sys.executable, "-m", "peer.train.trial",
            "--spec", str(spec_path), "--dataset", str(folder),
            "--marks", ",".join(str(mark) for mark in duty.trial.mark_tokens),
            "--result", str(result_path), "--threads", str(self._threads),
        ]  # fmt: skip
        child = await self._supervisor.spawn("trial", command, channel_flag="--channel-fd")
        try:
            async with asyncio.TaskGroup() as group:
                watching = group.create_task(watch(child, _start_seconds(duty.fence)))
                end = await self._supervisor.wait(child)
                watching.cancel()
            stalled = "" if watching.cancelled() else watching.result()
        finally:
            await finish(self._supervisor.stop(child, grace_seconds=0.0))
        if stalled:
            raise RunFailedError(
                f"the trial's process was ended: {stalled}",
                allowed="a process that comes round",
                remedy="see logs/trial.log; somebody else will try",
            )
        if not result_path.exists():
            raise RunFailedError(
                f"the trial's process {end}: {child.last_lines()[-300:]}",
                allowed="a trial that ends with a result",
                remedy="see logs/trial.log; somebody else will try",
            )
        return _result_from_plain(json.loads(result_path.read_text(encoding="ascii")))


def _start_seconds(fence: int) -> float:
    return _START_SECONDS * 2.0 ** min(max(fence - 1, 0), _MAX_START_DOUBLINGS)


async def watch(child: Child, start_seconds: float) -> str:
    """Kill a trial that comes round no more; returns why, once that is so, and "" if it has just
    ended by itself.
    """
    turns = ChildWatch()
    turns.turn(start_seconds / SILENT_TURNS)
    listening = asyncio.ensure_future(_listen(child, turns))
    try:
        while not (stalled := turns.tick(time.monotonic())):
            await asyncio.sleep(_TICK_SECONDS)
    finally:
        listening.cancel()
    try:
        child.process.kill()
    except ProcessLookupError:
        return ""
    return stalled


async def _listen(child: Child, turns: ChildWatch) -> None:
    with contextlib.suppress(ChannelClosed):
        while True:
            message = await child.channel.receive()
            turns.turn(max(message["longest_turn_seconds"], _LEAST_TURN_SECONDS))


def _result_from_plain(plain: dict[str, Any]) -> duties_pb2.TrialResult:
    fields = dict(plain)
    points = [duties_pb2.TrialPoint(**point) for point in fields.pop("points")]
    digest = bytes.fromhex(str(fields.pop("params_digest")))
    return duties_pb2.TrialResult(points=points, params_digest=digest, **fields)
