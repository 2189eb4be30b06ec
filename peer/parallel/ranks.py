"""A node's local ranks as their leader sees them: started by exec, told what to do, watched.

The leader is local rank 0 and computes like the others. Every call is answered by every rank within
the time-out of the groups; what does not answer, ends or fails is named in LocalRankError, after
which nothing here is used again: whoever supervises the leader plans anew for what is left.
"""

import logging
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from peer.ipc import Channel, ChannelClosed, Message
from peer.model.objectives import Examples
from peer.model.probe import Sums, merged
from peer.parallel.devices import is_device_lost, is_out_of_memory
from peer.parallel.engine import deal
from peer.parallel.faults import GROUP_TIMEOUT_SECONDS, LocalRankError
from peer.parallel.layout import Layout
from peer.parallel.mesh import Place
from peer.parallel.rank import LocalRank
from peer.parallel.rank_messages import plain_examples, plain_layout, plain_specs
from protos.contract.digest import Float32Vector
from protos.contract.run_spec import ModelSpec, OptimizerSpec

_START_SECONDS = 120.0
_BLAME_SECONDS = 2.0
"""How long ranks may take to say what went wrong with them."""
_START = "start"
_LOADER_EXIT_CODE = 127
_LOGGER = logging.getLogger(__name__)


class LocalRanks:
    """All ranks of a node; the caller's process is rank 0."""

    def __init__(
        self, num_ranks: int, *, num_values: int, positions: Sequence[int] | None = None
    ) -> None:
        """Start the other ranks. `num_values` of the model's canonical vector; `positions` of the
        ranks' devices among those that the owner lends.
        """
        self.num_ranks = num_ranks
        self._positions = tuple(positions or range(num_ranks))
        self.is_broken = False
        """True after a LocalRankError: of no use any more."""
        self.has_grads = False
        """True from a turn until they are zeroed."""
        self.layer_sums: tuple[dict[str, Sums], dict[str, Sums]] = {}, {}
        """(activations, gradients) of the whole model in the last turn that was watched."""
        self._vector_fd = os.memfd_create("muster-node", os.MFD_CLOEXEC)
        os.ftruncate(self._vector_fd, 4 * num_values)
        self.vector: Float32Vector = np.memmap(
            f"/proc/self/fd/{self._vector_fd}", dtype="<f4", mode="r+", shape=(num_values,)
        )
        self._store_fd = os.memfd_create("muster-store", os.MFD_CLOEXEC)
        self._generation = 0
        self.timeout_seconds = GROUP_TIMEOUT_SECONDS
        self.local = LocalRank(0)
        self._channels: dict[int, Channel] = {}
        self._is_started: dict[int, bool] = {}
        self._sockets: dict[int, socket.socket] = {}
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        for rank in range(1, num_ranks):
            self._start(rank)

    def _start(self, rank: int) -> None:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "peer.parallel.rank", "--rank", str(rank)]
        command += ["--channel-fd", str(theirs.fileno())]
        self.processes[rank] = subprocess.Popen(
            command,
            pass_fds=(theirs.fileno(), self._vector_fd, self._store_fd),
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        self._sockets[rank], self._channels[rank] = ours, Channel(ours)

    # Calls. ---------------------------------------------------------------------------------------

    def configure(
        self,
        model: ModelSpec,
        optimizer: OptimizerSpec,
        layout: Layout,
        *,
        devices: Sequence[str] = (),
        num_threads: int = 1,
        timeout_seconds: float = GROUP_TIMEOUT_SECONDS,
    ) -> None:
        """Build a layout on the first ranks, anew if there was one. Raises LocalRankError."""
        self.layout, self.has_grads = layout, False
        self._wait_for_start()
        self._generation += 1
        self.timeout_seconds = timeout_seconds
        message = plain_specs(model, optimizer) | {
            "layout": plain_layout(layout),
            "devices": list(devices) or ["cpu"] * layout.num_ranks,
            "num_threads": num_threads,
            "generation": self._generation,
            "timeout_seconds": timeout_seconds,
            "store_fd": self._store_fd,
            "vector_fd": self._vector_fd,
        }
        self._everywhere(
            "configure",
            [message] * layout.num_ranks,
            lambda: self.local.configure(message),
        )

    def _wait_for_start(self) -> None:
        """Importing torch takes seconds, more than groups may wait."""
        deadline_seconds = time.monotonic() + _START_SECONDS
        for rank in range(1, self.layout.num_ranks):
            if not self._is_started.get(rank):
                if self._answer(rank, deadline_seconds) is None:
                    self.is_broken = True
                    raise self._blame(_START, f"rank {rank} did not start")
                self._is_started[rank] = True

    def run(
        self, examples: Examples, *, is_bf16: bool = False, is_watched: bool = False
    ) -> tuple[float, bool]:
        """Forward and backward of one turn: (summed loss in nats, True if all is finite). A turn
        that is watched gives `layer_sums`; gradients before it must be zero.
        """
        assert not (is_watched and self.has_grads)
        how = {"is_bf16": is_bf16, "is_watched": is_watched}
        shares = deal(examples, self.layout)
        fields = []
        for rank in range(self.layout.num_ranks):
            share = shares[Place.of(rank, self.layout).dp_rank]
            fields.append({"examples": plain_examples(share)} | how)
        answers = self._everywhere("run", fields, lambda: self.local.run(shares[0], **how))
        self.has_grads = True
        if is_watched:
            activations, gradients = zip(*(a["layer_sums"] for a in answers), strict=True)
            self.layer_sums = merged(activations), merged(gradients)
        return sum(a["total_nats"] for a in answers), all(a["is_finite"] for a in answers)

    def call(self, kind: str, **fields: Any) -> list[Message]:
        """Have every rank do one of: load, store, store_grads, norm, zero, inner_step."""
        message = {"kind": kind, **fields}
        self.has_grads &= kind not in ("zero", "inner_step")
        return self._everywhere(
            kind, [fields] * self.layout.num_ranks, lambda: self.local.do(message)
        )

    def _everywhere(
        self,
        kind: str,
        fields: Sequence[dict[str, Any]],
        own: Callable[[], dict[str, Any]],
    ) -> list[Message]:
        """Send to all, do the own share, wait for the answers."""
        others = range(1, len(fields))
        self.is_broken = True  # until all have answered
        try:
            for rank in others:
                self._channels[rank].send(kind, **fields[rank])
            answers: list[Message] = [own()]
        except ChannelClosed as error:
            raise self._blame(kind, str(error)) from error
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise LocalRankError(
                    f"rank 0 is out of memory in {kind}: {error}", has_no_memory=True
                ) from error
            if is_device_lost(error):
                raise LocalRankError(
                    f"rank 0 has lost its device in {kind}: {error}",
                    lost_devices=self._positions[:1],
                ) from error
            raise self._blame(kind, f"{type(error).__name__}: {error}") from error
        deadline_seconds = time.monotonic() + self.timeout_seconds
        for rank in others:
            answer = self._answer(rank, deadline_seconds)
            if answer is None or answer["kind"] != "done":
                raise self._blame(kind, f"rank {rank} gave no result", {rank: answer})
            answers.append(answer)
        self.is_broken = False
        return answers

    def _answer(self, rank: int, deadline_seconds: float) -> Message | None:
        """Next message of a rank; None if there is none in time or it has ended."""
        left_seconds = max(0.0, deadline_seconds - time.monotonic())
        if not select.select([self._sockets[rank]], [], [], left_seconds)[0]:
            return None
        try:
            return self._channels[rank].receive()
        except ChannelClosed:
            return None

    # What went wrong. -----------------------------------------------------------------------------

    def _blame(
        self, kind: str, symptom: str, heard: dict[int, Message | None] | None = None
    ) -> LocalRankError:
        """Find the rank that is at fault: one that ended, one out of memory, one that is silent."""
        deadline_seconds = time.monotonic() + _BLAME_SECONDS
        found: dict[int, Message | int | None] = {}
        for rank in range(1, self.layout.num_ranks):
            found[rank] = (heard or {}).get(rank) or self._answer(rank, deadline_seconds)
            if found[rank] is None:
                try:
                    found[rank] = self.processes[rank].wait(0.2)
                except subprocess.TimeoutExpired:
                    pass
        reasons, lost_ranks, has_no_memory = judge(found, during=kind)
        reason = f"{'; '.join(reasons) or symptom} (in {kind}, {self.layout.text})"
        _LOGGER.warning("local ranks: %s; symptom: %s", reason, symptom)
        lost = [self._positions[rank] for rank in lost_ranks]
        return LocalRankError(reason, lost_devices=lost, has_no_memory=has_no_memory)

    def close(self) -> None:
        """End all ranks."""
        for rank, process in self.processes.items():
            self._channels[rank].close()
            process.kill()
            process.wait()
        self.local.close()
        os.close(self._vector_fd)
        os.close(self._store_fd)


def judge(
    found: Mapping[int, Message | int | None], *, during: str
) -> tuple[list[str], list[int], bool]:
    """(reasons, ranks whose devices are lost, True if memory was not enough) from what each rank
    has said, its exit code, or None for one that is silent. Pure. The silent are at fault only if
    nobody else is: with NCCL, who waits for a rank that is gone says nothing.
    """
    reasons, silent = [], []
    lost: list[int] = []
    has_no_memory = False
    for rank, end in found.items():
        name = f"local rank {rank}"
        if end is None:
            silent.append(rank)
        elif isinstance(end, int):
            has_no_memory |= is_loader_out_of_memory(end, during=during)
            reasons.append(f"{name} {end_of_rank(end, during=during)}")
            lost.append(rank)
        elif end.get("is_out_of_memory"):
            has_no_memory = True
            reasons.append(f"{name} is out of memory: {end['reason']}")
        elif end.get("is_device_lost"):
            reasons.append(f"{name} has lost its device: {end['reason']}")
            lost.append(rank)
    if not reasons:
        reasons, lost = [f"local rank {rank} does not answer" for rank in silent], silent
    return reasons, [] if has_no_memory else lost, has_no_memory


def is_loader_out_of_memory(exit_code: int, *, during: str) -> bool:
    """True for the only way in which glibc's loader ends a process that was already running: no
    memory for a thread's own variables, where no exception can be raised (elf/dl-tls.c,
    `oom`). A process that does not start ends with the same code for other reasons.
    """
    return exit_code == _LOADER_EXIT_CODE and during != _START


def end_of_rank(exit_code: int, *, during: str) -> str:
    """How a rank ended, in words that follow its number."""
    if is_loader_out_of_memory(exit_code, during=during):
        return f"is out of memory: the loader ended it with exit code {exit_code}"
    if exit_code < 0:
        return f"was ended by signal {-exit_code}"
    return f"ended with exit code {exit_code}"
