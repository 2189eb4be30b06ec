"""Real swarm processes on loopback, with a hub that plays their daemons and the coordinator with
real signatures.
"""

import asyncio
import os
import socket
import sys
import time
import warnings
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from peer.ipc import AsyncChannel, ChannelClosed, Message
from peer.shared_vectors import SharedVectors
from peer.swarm.replica import Replica
from protos.contract.certificate import (
    Tag,
    certificate_from_votes,
    half_votes_by_voter,
    is_quorum,
)
from protos.contract.ids import COORDINATOR_VOTER
from protos.contract.model_shape import ModelShape
from protos.contract.run_spec import DataSpec, ModelSpec, RunSpec, StrategySpec
from protos.contract.signing import SigningKey
from protos.muster.v1 import common_pb2, rounds_pb2
from tests.peer.swarm.forked_members import ForkedProcess, Forker
from tests.peer.swarm.p2p_keys import write_p2p_key

RUN_ID = "swarm-test"
SEQ_LEN = 16
SPEC = RunSpec(
    seed=5,
    budget_tokens=2**20,
    model=ModelSpec(
        vocab_size=4096,
        d_model=48,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        d_ff=32,
        seq_len=SEQ_LEN,
    ),
    strategy=StrategySpec(global_batch_tokens=640),
    data=DataSpec(dataset_id="0" * 64),
)
_LAUNCH_SECONDS = 90.0
"""Imports of torch and hivemind take seconds, on a busy machine a minute."""
_NUM_LAUNCHES = 2
"""A daemon starts a swarm process again that fails or is not ready in time (child_watch.py)."""
NUM_VALUES = ModelShape.from_spec(SPEC.model).num_parameters
WINDOWS = 20
"""Windows that a member is asked to train per round."""


@dataclass
class Daemon:
    """The hub's side of one swarm process."""

    name: str
    home: Path
    key: SigningKey
    p2p_peer_id: str
    vectors: SharedVectors
    host: str = "127.0.0.1"
    upload_limit_mbit: float | None = None
    announce: tuple[str, ...] = ()
    """Addresses that it announces instead of its true ones."""
    can_accept_connections: bool = True
    """What the coordinator found out about it."""
    prefix: tuple[str, ...] = ()
    """Before the command of its process, such as `ip netns exec NAME`."""
    forker: Forker | None = None
    """Its process is forked from this one instead of started by exec."""
    process: asyncio.subprocess.Process | ForkedProcess | None = None
    channel: AsyncChannel | None = None
    reader: asyncio.Task[None] | None = None
    addresses: list[str] = field(default_factory=list)
    num_offers: int = 0
    """Contributions announced to its process."""
    messages: list[Message] = field(default_factory=list)
    lease_number: int = 0
    fault_plan: Path | None = None
    """Its process is tests/peer/swarm/faulty_member.py and reads this file."""
    is_cut_off: bool = False
    """Its daemon cannot reach the coordinator."""

    @property
    def peer_id(self) -> str:
        return self.key.peer_id

    @property
    def stderr_path(self) -> Path:
        """What its processes say on standard error; a forked one's goes to its Forker."""
        return self.home / "stderr.log"

    def newest(self, kind: str) -> Message | None:
        found = [m for m in self.messages if m["kind"] == kind]
        return found[-1] if found else None


class Hub:
    """Daemons, coordinator and trainers in one; the swarm processes and their transport are
    real.
    """

    def __init__(self, folder: Path, spec: RunSpec = SPEC) -> None:
        self.folder, self.spec = folder, spec
        self.num_values = ModelShape.from_spec(spec.model).num_parameters
        self.key = SigningKey.generate()
        self.daemons: list[Daemon] = []
        self.directive: common_pb2.Signed
        self.record: common_pb2.Signed
        self.outer_step = 0
        self.is_coordinator_up = True
        self._directive_number = 0
        self._incarnation = 0
        self._changed = asyncio.Event()
        self._promised: dict[int, int] = defaultdict(int)
        self.certificate_by_step: dict[int, rounds_pb2.Certificate] = {}
        self.reporter_by_step: dict[int, str] = {}
        """Name of whose report of a certificate came first."""
        self.credited_step_by_lease: dict[tuple[int, str, int], int] = {}
        """(incarnation, peer_id, lease number) -> outer step, from reported certificates."""

    @property
    def incarnation(self) -> int:
        return self._incarnation

    # Coordinator ------------------------------------------------------------------------------

    def add_daemon(self, forker: Forker | None = None) -> Daemon:
        name = f"peer{len(self.daemons)}"
        home = self.folder / name
        home.mkdir()
        key = SigningKey.generate()
        (home / "identity.key").write_bytes(key.private_bytes())
        p2p_peer_id = write_p2p_key(home / "p2p.key")
        vectors = SharedVectors.create(self.num_values, self.spec.strategy.state_vectors)
        daemon = Daemon(
            name=name,
            home=home,
            key=key,
            p2p_peer_id=p2p_peer_id,
            vectors=vectors,
            forker=forker,
        )
        self.daemons.append(daemon)
        return daemon

    def replica(self, daemon: Daemon) -> Replica:
        """A member's copy of the state, in this process; it has not entered anything yet."""
        return Replica(
            spec=self.spec,
            run_id=RUN_ID,
            key=daemon.key,
            coordinator_public_key=self.key.public_key,
            vectors=daemon.vectors,
            folder=daemon.home,
        )

    def issue_directive(self, voters: list[Daemon], others: list[Daemon] | None = None) -> None:
        """A new directive with this roster."""
        self._directive_number += 1
        members = sorted([*voters, *(others or [])], key=lambda d: d.peer_id)
        roster = [
            common_pb2.RosterEntry(
                peer_id=d.peer_id,
                p2p_peer_id=d.p2p_peer_id,
                public_key=d.key.public_key,
                has_vote=d in voters,
                round_tokens=WINDOWS * SEQ_LEN,
                max_round_tokens=4 * WINDOWS * SEQ_LEN,
                can_accept_connections=d.can_accept_connections,
                addresses=d.addresses,
            )
            for d in members
        ]
        directive = common_pb2.Directive(
            run_id=RUN_ID,
            incarnation=self._incarnation,
            directive_number=self._directive_number,
            roster=roster,
            budget_tokens=SPEC.budget_tokens,
            cooldown_start_tokens=SPEC.budget_tokens,
        )
        self.directive = self.key.signed(Tag.DIRECTIVE, directive.SerializeToString())

    def start_incarnation(self, voters: list[Daemon], *, to_outer_step: int, base: bytes) -> None:
        """A new incarnation that begins with these voters."""
        base_incarnation = self._incarnation
        self._incarnation += 1
        self._promised.clear()
        self.certificate_by_step.clear()
        self.reporter_by_step.clear()
        for daemon in self.daemons:
            daemon.lease_number = 0
        self.issue_directive(voters)
        self._sign_record(to_outer_step, base_incarnation, base)

    def begin(self) -> None:
        """Incarnation 0: nobody is in the roster."""
        self.issue_directive([])
        self._sign_record(0, 0, b"")

    def _sign_record(self, to_outer_step: int, base_incarnation: int, base: bytes) -> None:
        self.outer_step = to_outer_step
        record = common_pb2.IncarnationRecord(
            run_id=RUN_ID,
            incarnation=self._incarnation,
            to_outer_step=to_outer_step,
            base_incarnation=base_incarnation,
            base_state_digest=base,
            directive=self.directive,
        )
        self.record = self.key.signed(Tag.INCARNATION, record.SerializeToString())

    def lease(self, daemon: Daemon, num_windows: int = WINDOWS) -> common_pb2.Signed:
        daemon.lease_number += 1
        lease = common_pb2.Lease(
            run_id=RUN_ID,
            incarnation=self._incarnation,
            peer_id=daemon.peer_id,
            lease_number=daemon.lease_number,
            range=common_pb2.WindowRange(end_window=num_windows),
        )
        return self.key.signed(Tag.LEASE, lease.SerializeToString())

    def _answer(self, message: Message) -> bytes | None:
        if not self.is_coordinator_up:
            return None
        if message["method"] == "exchange":
            request = rounds_pb2.CoordinatorExchangeRequest.FromString(message["request"])
            response = rounds_pb2.CoordinatorExchangeResponse()
            stored = self.certificate_by_step.get(request.outer_step)
            if stored is not None:
                response.certificate.CopyFrom(stored)
            elif request.attempt >= self._promised[request.outer_step]:
                self._promised[request.outer_step] = request.attempt
                response.is_promised = True
                response.answer.newest_directive.CopyFrom(self.directive)
            return response.SerializeToString()
        votes = rounds_pb2.SubmitVotesRequest.FromString(message["request"])
        return self._sign_last(votes).SerializeToString()

    def _sign_last(self, request: rounds_pb2.SubmitVotesRequest) -> rounds_pb2.SubmitVotesResponse:
        first = request.votes[0]
        value = rounds_pb2.RoundValue.FromString(first.value)
        step = value.outer_step
        if step not in self.certificate_by_step and first.attempt >= self._promised[step]:
            own = self.key.vote(first.value, first.attempt, COORDINATOR_VOTER)
            votes = [*request.votes, own]
            directive = common_pb2.Directive.FromString(self.directive.payload)
            if is_quorum([v.voter for v in votes], half_votes_by_voter(directive.roster)):
                self.certificate_by_step[step] = certificate_from_votes(
                    votes, request.contributions
                )
        stored = self.certificate_by_step.get(step)
        if stored is None:
            return rounds_pb2.SubmitVotesResponse(reason="no quorum with the half vote")
        return rounds_pb2.SubmitVotesResponse(certificate=stored)

    # Daemons ----------------------------------------------------------------------------------

    async def found(self, members: list[Daemon]) -> None:
        """Launch these at once and begin incarnation 1 with them as its voters."""
        self.begin()
        await asyncio.gather(*(self.launch(daemon) for daemon in members))
        base = await self.wait_state(members, (0, 0))
        self.start_incarnation(members, to_outer_step=0, base=base)
        self.tell_all("incarnation", record=self.record.SerializeToString())
        await self.wait_state(members, (1, 0))

    async def launch(self, daemon: Daemon) -> None:
        """Start (again) the swarm process of a daemon and wait until it answers members."""
        for left in reversed(range(_NUM_LAUNCHES)):
            told = await self._start(daemon)
            if told["kind"] == "ready":
                daemon.addresses = told["addresses"]
                return
            assert left, f"{daemon.name}: {told}"
            warnings.warn(f"{daemon.name} is started again: {told}", stacklevel=2)
            assert daemon.process is not None
            daemon.process.kill()
            await daemon.process.wait()

    async def _start(self, daemon: Daemon) -> Message:
        """Start the process; returns what it says: `ready`, or why not."""
        ours, theirs = socket.socketpair()
        daemon.process = await self._spawn(daemon, (theirs.fileno(), daemon.vectors.fd))
        theirs.close()
        daemon.channel = await AsyncChannel.from_socket(ours)
        daemon.messages.clear()
        daemon.reader = asyncio.ensure_future(self._read(daemon))
        known = [a for d in self.daemons if d is not daemon for a in d.addresses]
        daemon.channel.send(
            "configure",
            run_spec=self.spec.to_wire(),
            run_id=RUN_ID,
            peer_id=daemon.peer_id,
            home=str(daemon.home),
            identity_key_path=str(daemon.home / "identity.key"),
            p2p_key_path=str(daemon.home / "p2p.key"),
            coordinator_public_key=self.key.public_key,
            dht_prefix="swarmtest",
            initial_peers=known[:2],
            listen_port=0,
            announce=list(daemon.announce),
            host=daemon.host,
            upload_limit_mbit=daemon.upload_limit_mbit,
            incarnation_record=self.record.SerializeToString(),
            directive=self.directive.SerializeToString(),
            outer_step=self.outer_step,
            checkpoint_interval_seconds=3600.0,
        )
        reader, answers = daemon.reader, ("ready", "failed")
        try:
            await self.wait(
                lambda: reader.done() or any(map(daemon.newest, answers)),
                f"{daemon.name} ready",
                _LAUNCH_SECONDS,
            )
        except AssertionError as error:
            return {"kind": "silent", "reason": str(error)}
        told = next(filter(None, map(daemon.newest, answers)), None)
        return told or {"kind": "ended", "reason": "without a word"}

    async def _spawn(
        self, daemon: Daemon, fds: tuple[int, int]
    ) -> asyncio.subprocess.Process | ForkedProcess:
        """Start the swarm process with these descriptors of its channel and vectors."""
        settings = ("--num-values", str(self.num_values))
        if daemon.forker is not None:
            names = ("--channel-fd", "{0}", "--vectors-fd", "{1}")
            return daemon.forker.start([*names, *settings], fds=fds)
        module = ["-m", "peer.swarm"]
        if daemon.fault_plan is not None:
            module = ["-m", "tests.peer.swarm.faulty_member"]
            module += ["--fault-plan", str(daemon.fault_plan)]
        with daemon.stderr_path.open("ab") as stderr:
            return await asyncio.create_subprocess_exec(
                *daemon.prefix,
                sys.executable,
                *module,
                "--channel-fd",
                str(fds[0]),
                "--vectors-fd",
                str(fds[1]),
                *settings,
                pass_fds=fds,
                stderr=stderr,
                env=dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)),
            )

    async def _read(self, daemon: Daemon) -> None:
        assert daemon.channel is not None
        try:
            while True:
                message = await daemon.channel.receive()
                message["received_seconds"] = time.monotonic()
                daemon.messages.append(message)
                if message["kind"] == "coordinator_request":
                    response = None if daemon.is_cut_off else self._answer(message)
                    request_id = message["request_id"]
                    daemon.channel.send(
                        "coordinator_answer", request_id=request_id, response=response
                    )
                if message["kind"] == "certificates":
                    self._take_certificates(daemon, message)
                self._changed.set()
        except ChannelClosed:
            self._changed.set()

    def _take_certificates(self, daemon: Daemon, message: Message) -> None:
        if not self.is_coordinator_up or daemon.is_cut_off:
            return
        for data in message["certificates"]:
            certificate = rounds_pb2.Certificate.FromString(data)
            value = rounds_pb2.RoundValue.FromString(certificate.value)
            stored = self.certificate_by_step.setdefault(value.outer_step, certificate)
            assert stored.value == certificate.value, "two values for one outer step"
            self.reporter_by_step.setdefault(value.outer_step, daemon.name)
            self._credit(certificate, value.outer_step)
            self.outer_step = max(self.outer_step, value.outer_step)
        assert daemon.channel is not None
        daemon.channel.send(
            "certificates_acknowledged", up_to=self.outer_step, incarnation=self._incarnation
        )

    def _credit(self, certificate: rounds_pb2.Certificate, outer_step: int) -> None:
        """Book every leased range of a certificate, once: a lease belongs to one step."""
        held = rounds_pb2.Contributions.FromString(certificate.contributions)
        for contribution in held.contributions:
            for part in contribution.ranges:
                number = common_pb2.Lease.FromString(part.lease.payload).lease_number
                lease = (self._incarnation, contribution.peer_id, number)
                credited = self.credited_step_by_lease.setdefault(lease, outer_step)
                assert credited == outer_step, f"{lease} is credited twice"

    async def wait(self, ready: Any, what: str, seconds: float = 40.0) -> Any:
        """Wait until `ready()` is true; names what was waited for if it never is."""
        deadline = asyncio.get_running_loop().time() + seconds
        while not (value := ready()):
            self._changed.clear()
            left = deadline - asyncio.get_running_loop().time()
            try:
                await asyncio.wait_for(self._changed.wait(), min(0.25, max(0.0, left)))
            except TimeoutError:
                if left > 0:
                    continue
                phases = {d.name: d.newest("phase") for d in self.daemons}
                raise AssertionError(f"no {what} within {seconds} s; {phases}") from None
        return value

    def tell_all(self, kind: str, **fields: Any) -> None:
        for daemon in self.daemons:
            is_running = daemon.process is not None and daemon.process.returncode is None
            if daemon.channel is not None and is_running:
                daemon.channel.send(kind, **fields)

    async def wait_state(
        self, daemons: list[Daemon], place: tuple[int, int], seconds: float = 40.0
    ) -> bytes:
        """Wait until all of these hold the state at a place; returns its one digest."""

        def digests() -> list[bytes] | None:
            states = [d.newest("state") for d in daemons]
            if any(s is None or (s["incarnation"], s["outer_step"]) != place for s in states):
                return None
            return [s["state_digest"] for s in states if s is not None]

        found = await self.wait(digests, f"state {place}", seconds)
        assert len(set(found)) == 1, "states differ"
        digest: bytes = found[0]
        return digest

    def contribute(self, daemon: Daemon, values: np.ndarray, num_windows: int = WINDOWS) -> None:
        """Play the trainer: write a contribution and announce it."""
        np.copyto(daemon.vectors.contribution, values)
        self.announce(daemon, num_windows)

    def announce(self, daemon: Daemon, num_windows: int) -> None:
        """Say that a contribution lies in shared memory."""
        state = daemon.newest("state")
        assert state is not None and daemon.channel is not None
        lease = self.lease(daemon, num_windows)
        daemon.num_offers += 1
        daemon.channel.send(
            "contribution",
            offer_number=daemon.num_offers,
            incarnation=state["incarnation"],
            outer_step=state["outer_step"],
            state_digest=state["state_digest"],
            ranges=[
                {"lease": lease.SerializeToString(), "begin_window": 0, "end_window": num_windows}
            ],
            num_tokens=num_windows * SEQ_LEN,
            loss_nats=1.0,
        )

    async def stop(self, daemon: Daemon) -> int:
        """Ask a process to stop; returns its exit code. No process of this daemon may have shown a
        traceback.
        """
        assert daemon.process is not None and daemon.channel is not None
        if daemon.process.returncode is None:
            daemon.channel.send("stop", reason="test is over")
        code = await asyncio.wait_for(daemon.process.wait(), 20.0)
        await daemon.channel.close()
        said = daemon.stderr_path.read_text() if daemon.stderr_path.exists() else ""
        assert "Traceback" not in said, said
        return code

    async def kill(self, daemon: Daemon) -> None:
        """SIGKILL a process; its p2pd must follow by itself within seconds."""
        assert daemon.process is not None
        pid = daemon.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        assert len(children) == 1, "one p2pd"
        daemon.process.kill()
        await daemon.process.wait()
        await self.wait(lambda: not Path(f"/proc/{children[0]}").exists(), "end of p2pd", 15.0)
