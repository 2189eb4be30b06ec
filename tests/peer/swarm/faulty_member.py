"""`python -m tests.peer.swarm.faulty_member --fault-plan FILE ...`: the real swarm process, with
faults that a test names.

FILE is read again whenever it matters, so one process serves many tests:

- {"phase": "REDUCE", "signal": 9, "with": [PID, ...]}: when that phase of a round begins, those
  processes, this one and its p2pd get the signal; FILE is replaced by {"done_seconds": ...}
  (monotonic clock) just before;
- {"send": KIND}: what is brought into a round breaks a rule (KINDS);
- a file `lanes` beside FILE: every pair gets lanes, however near;
- {"cut": [peer_id, ...]}: nothing passes between this member and those, as in a cut network;
- {"donor": "lies" or "dies", "after": N}: what it does once it has served N pieces of a state.

A state that this member has downloaded is written to FILE with the suffix .download: what came from
which donor, what became of those, and the most memory that it took.
"""

import asyncio
import json
import logging
import os
import signal
import sys
import time
import tracemalloc
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import numpy as np

import peer.swarm.catch_up as catch_up_module
import peer.swarm.node as node_module
import peer.swarm.round_shell as shell_module
import peer.swarm.transport as transport_module
from peer.swarm.__main__ import main
from peer.swarm.allreduce import AveragedVector, Reduction
from peer.swarm.codecs import EncodedVector
from peer.swarm.offers import Offers
from peer.swarm.replica import Replica
from peer.swarm.round_shell import RoundShell
from peer.swarm.state_download import FetchedState, StateDownload
from peer.swarm.state_image import StateImage
from peer.swarm.state_server import StateServer
from peer.swarm.transport import PeerCallError, Stream, Transport
from protos.contract.telemetry import RoundPhase

KINDS = ("join shape", "part shape", "nan", "uncommitted", "nothing")


class FaultPlan:
    """The file that a test writes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads(self.path.read_text())
        except FileNotFoundError:
            return {}
        return found

    def write(self, plan: dict[str, Any]) -> None:
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(plan))
        temporary.replace(self.path)

    @property
    def sends(self) -> str:
        return str(self.read().get("send", ""))

    def is_cut(self, peer_id: str) -> bool:
        return peer_id in self.read().get("cut", ())


PLAN = FaultPlan(Path())


def strike(phase: RoundPhase, attempt: int) -> None:
    """Signal others, the own p2pd and this process, if the plan names this phase."""
    plan = PLAN.read()
    if plan.get("phase") != phase.value:
        return
    PLAN.write({"done_seconds": time.monotonic(), "attempt": attempt})
    for pid in [*plan["with"], *_own_processes()]:
        os.kill(pid, plan["signal"])


def _own_processes() -> list[int]:
    """Ids of the own p2pd and of this process, which comes last."""
    own = os.getpid()
    children = Path(f"/proc/{own}/task/{own}/children").read_text().split()
    return [*map(int, children), own]


class FaultyShell(RoundShell):
    """Tells every phase to `strike`."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.on_phase = strike


class FaultyReplica(Replica):
    """Encodes values that are not finite, and commits to them."""

    def encode_contribution(self) -> EncodedVector:
        encoded = super().encode_contribution()
        return with_nan(encoded) if PLAN.sends == "nan" else encoded


def with_nan(encoded: EncodedVector) -> EncodedVector:
    """The same with its first value of every thousand not a number."""
    values = np.frombuffer(encoded.data, dtype="<f4").copy()
    values[::1000] = np.nan
    data = memoryview(values).cast("B")
    return EncodedVector(codec=encoded.codec, num_values=encoded.num_values, data=data)


class FaultyOffers(Offers):
    """Commits to one piece too few."""

    def _encode(self) -> tuple[EncodedVector, tuple[bytes, ...]]:
        encoded, digests = super()._encode()
        return encoded, digests[:-1] if PLAN.sends == "join shape" else digests


class FaultyReduction(Reduction):
    """Sends other bytes than committed to, a part of another shape, or nothing."""

    def __init__(self, streams: Any, *, own: EncodedVector | None, **arguments: Any) -> None:
        self._kind = PLAN.sends
        if self._kind == "uncommitted" and own is not None:
            changed = np.frombuffer(own.data, dtype="<f4") + np.float32(1.0)
            data = memoryview(changed).cast("B")
            own = EncodedVector(codec=own.codec, num_values=own.num_values, data=data)
        super().__init__(streams, own=own, **arguments)

    async def run(self) -> AveragedVector:
        if self._kind == "nothing":
            await self._failed.wait()
        return await super().run()

    async def serve(self, sender: str, header: Any, stream: Stream) -> None:
        if self._kind == "nothing":
            await self._failed.wait()
        await super().serve(sender, header, stream)

    def _part_header(self, reducer: str) -> Any:
        header = super()._part_header(reducer)
        if self._kind == "part shape":
            header.end_piece -= 1
        return header


class FaultyServer(StateServer):
    """Lies or dies in the middle of a state."""

    _num_served = 0

    async def _serve_run(self, image: StateImage, stream: Stream) -> bool:
        plan, server = PLAN.read(), self

        class Faulty(StateImage):
            def read_piece(self, piece: int) -> bytes:
                data = super().read_piece(piece)
                server._num_served += 1
                if "donor" not in plan or server._num_served <= plan["after"]:
                    return data
                if plan["donor"] == "dies":
                    for pid in _own_processes():
                        os.kill(pid, signal.SIGKILL)
                return bytes([data[0] ^ 1]) + data[1:]

        own = Faulty(snapshot=image.snapshot, layout=image.layout, fd=image.fd)
        return await super()._serve_run(own, stream)


class RecordedDownload(StateDownload):
    """Writes down what came from whom."""

    async def run(self) -> FetchedState | None:
        tracemalloc.start()
        before_bytes, _ = tracemalloc.get_traced_memory()
        fetched = await super().run()
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        donors = self.plan.donors.values()
        record = {
            "num_pieces": self.plan.num_pieces,
            "peak_bytes": peak_bytes - before_bytes,
            "received": {donor.peer_id: donor.num_received for donor in donors},
            "reasons": {donor.peer_id: donor.reason for donor in donors},
        }
        FaultPlan(PLAN.path.with_suffix(".download")).write(record)
        return fetched


class CutTransport(Transport):
    """Loses everything to and from members that the plan cuts off."""

    @classmethod
    async def create(cls, **arguments: Any) -> Self:
        if PLAN.path.with_name("lanes").exists():
            arguments["lanes_from_seconds"] = 0.0
            logging.getLogger("peer.swarm.lanes").setLevel(logging.INFO)
        return await super().create(**arguments)

    async def call(self, peer_id: str, *arguments: Any, **named: Any) -> Any:
        if PLAN.is_cut(peer_id):
            await self._lose(named.get("timeout_seconds", 5.0))
        return await super().call(peer_id, *arguments, **named)

    async def open_stream(self, peer_id: str, name: str, *, timeout_seconds: float = 5.0) -> Stream:
        if PLAN.is_cut(peer_id):
            await self._lose(timeout_seconds)
        return await super().open_stream(peer_id, name, timeout_seconds=timeout_seconds)

    async def _lose(self, timeout_seconds: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(asyncio.Event().wait(), timeout_seconds)
        raise PeerCallError(f"no answer within {timeout_seconds:g} s", is_down=True)


if __name__ == "__main__":
    PLAN.path = Path(sys.argv.pop(sys.argv.index("--fault-plan") + 1))
    sys.argv.remove("--fault-plan")
    transport_module.Transport = CutTransport  # type: ignore[misc]
    node_module.RoundShell = FaultyShell  # type: ignore[misc]
    node_module.Replica = FaultyReplica  # type: ignore[misc]
    node_module.Offers = FaultyOffers  # type: ignore[misc]
    node_module.StateServer = FaultyServer  # type: ignore[misc]
    catch_up_module.StateDownload = RecordedDownload  # type: ignore[misc]
    shell_module.Reduction = FaultyReduction  # type: ignore[misc]
    sys.exit(main())
