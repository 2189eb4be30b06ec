"""A real swarm on loopback whose members fail on command, and what must hold after every fault.

Used by test_round_faults.py, once per fault, and by ops/bench/soak, many times.
"""

import asyncio
import json
import os
import signal
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from peer.swarm.round_proposer import leader_of
from protos.contract.digest import Float32Vector
from protos.contract.telemetry import AttemptOutcome, RoundPhase
from protos.muster.v1 import common_pb2, rounds_pb2
from tests.peer.swarm.single_process import Expected
from tests.peer.swarm.swarm_hub import NUM_VALUES, SEQ_LEN, WINDOWS, Daemon, Hub

_MOST_TRIES = 5
_NUM_RECENT_ROUNDS = 3

Parts = dict[str, tuple[Float32Vector, int]]


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """What a fault cost."""

    phase: str
    signal_name: str
    outer_step: int
    attempt_struck: int
    attempts_lost: int
    """The most that any survivor gave up for this step."""
    innocent_attempts_lost: int
    """Those of them for which another survivor was blamed, as on a busy machine."""
    has_struck_leader: bool
    """The victim led the attempt that was struck."""
    seconds: float
    """From the signal to the last survivor's outcome."""
    round_seconds: float
    """Of an undisturbed round: median of those so far."""
    slow_round_seconds: float
    """The longest of the newest undisturbed rounds: how busy the machine is now."""
    between_seconds: float
    """From one certified step to the next: median so far. Members may be late by a third of
    it (peer/swarm/pace.py).
    """
    victim_credited: bool
    survivors_left_out: int
    """Whose work was not in the step: members that were too late for its group, as on a busy
    machine.
    """

    @property
    def noticed_seconds(self) -> float:
        return self.seconds - self.round_seconds


class FaultedSwarm:
    """Members of a real swarm, all in the same state after every method."""

    def __init__(self, folder: Path) -> None:
        self.hub = Hub(folder)
        self.members: list[Daemon] = []
        self.step = 0
        self.round_seconds: list[float] = []
        self._step_seconds = [time.monotonic()]
        self._expected = Expected()
        self._parts: Parts = {}

    # Life -------------------------------------------------------------------------------------

    async def start(self, num_members: int) -> None:
        """Launch, found the run, and make rounds until deadlines are learnt."""
        self.members = [self._add() for _ in range(num_members)]
        await self.hub.found(self.members)
        for _ in range(6):
            await self.round()
        self.round_seconds = self.round_seconds[-3:]

    def _add(self) -> Daemon:
        daemon = self.hub.add_daemon()
        daemon.fault_plan = daemon.home / "fault.json"
        return daemon

    async def grow(self) -> Daemon:
        """One more member, with a vote."""
        daemon = self._add()
        self.members.append(daemon)
        await self.hub.launch(daemon)
        self.hub.issue_directive(self.members)
        self.hub.tell_all("directive", directive=self.hub.directive.SerializeToString())
        await self.round(self.members[:-1])  # the directive comes into force
        await self.hub.wait_state(self.members, (1, self.step))
        return daemon

    async def stop(self) -> None:
        """Stop all at once; nothing may be left."""
        for daemon in self.members:
            self.heal(daemon)
        codes = await asyncio.gather(*(self.hub.stop(daemon) for daemon in self.members))
        assert codes == [0] * len(self.members)
        for daemon in self.members:
            assert not list((daemon.home / "run").glob("*.sock"))

    async def kill_all(self) -> None:
        """End everything at once, after a failure."""
        for daemon in self.members:
            if daemon.process is not None and daemon.process.returncode is None:
                daemon.process.kill()
                await daemon.process.wait()

    def num_open_files(self) -> int:
        """The most that any member has open."""
        return max(len(os.listdir(f"/proc/{pid}/fd")) for pid in self._process_ids())

    def memory_bytes(self) -> int:
        """Resident memory of the largest member."""
        found = (Path(f"/proc/{pid}/statm").read_text().split() for pid in self._process_ids())
        return max(int(fields[1]) for fields in found) * os.sysconf("SC_PAGE_SIZE")

    def _process_ids(self) -> list[int]:
        return [d.process.pid for d in self.members if d.process is not None]

    # Faults -----------------------------------------------------------------------------------

    def plan(self, daemon: Daemon, **fault: object) -> None:
        """What a member does wrong from now on."""
        assert daemon.fault_plan is not None
        temporary = daemon.fault_plan.with_suffix(".new")
        temporary.write_text(json.dumps(fault))
        temporary.replace(daemon.fault_plan)

    def heal(self, daemon: Daemon) -> None:
        """A member does everything right again."""
        assert daemon.fault_plan is not None
        daemon.fault_plan.unlink(missing_ok=True)

    def cut(self, one_side: list[Daemon], other_side: list[Daemon]) -> None:
        """Nothing passes between the sides any more."""
        for side, cut_off in ((one_side, other_side), (other_side, one_side)):
            for daemon in side:
                self.plan(daemon, cut=[other.peer_id for other in cut_off])

    # Rounds -----------------------------------------------------------------------------------

    def offer(self, daemons: list[Daemon]) -> None:
        """These bring something into the next step."""
        for index, daemon in enumerate(daemons):
            rng = np.random.default_rng((self.step, index))
            values = rng.standard_normal(NUM_VALUES).astype(np.float32)
            self._parts[daemon.peer_id] = (values, (WINDOWS + index) * SEQ_LEN)
            self.hub.contribute(daemon, values, WINDOWS + index)

    async def outcome(self, daemon: Daemon, step: int) -> dict[str, object]:
        """What the member's trainer is told of its work for a step, or made for one before it."""

        def told() -> dict[str, object] | None:
            found = daemon.newest("round_outcome")
            return found if found is not None and found["outer_step"] >= step else None

        return dict(await self.hub.wait(told, f"outcome of {daemon.name}"))

    async def committed(self, daemons: list[Daemon]) -> set[str]:
        """Wait until these hold the next state, and that it is the one that a single process
        computes; returns who contributed.
        """
        self.step += 1
        await self.hub.wait_state(daemons, (1, self.step))
        certificate = await self.hub.wait(
            lambda: self.hub.certificate_by_step.get(self.step), "a reported certificate"
        )
        self._step_seconds.append(time.monotonic())
        held = rounds_pb2.Contributions.FromString(certificate.contributions)
        brought = {c.peer_id for c in held.contributions if c.ranges}
        self._expected.apply(self.step, {peer: self._parts[peer] for peer in brought})
        for daemon in daemons:
            self.check_state(daemon)
        return brought

    def check_state(self, daemon: Daemon) -> None:
        """The member holds what a single process computes, bit for bit."""
        assert np.array_equal(daemon.vectors.params, self._expected.params), daemon.name
        moments = daemon.vectors.state_vectors()[1:]
        assert np.array_equal(moments[0], self._expected.exp_avg)
        assert np.array_equal(moments[1], self._expected.exp_avg_sq)

    async def round(self, daemons: list[Daemon] | None = None) -> None:
        """An undisturbed round of these (else all)."""
        daemons = daemons or self.members
        begin_seconds = time.monotonic()
        self.offer(daemons)
        assert await self.committed(daemons) == {daemon.peer_id for daemon in daemons}
        for daemon in daemons:
            outcome = await self.outcome(daemon, self.step)
            assert outcome["outcome"] == "COMMITTED", outcome
        self.round_seconds.append(time.monotonic() - begin_seconds)

    async def round_with_all(self, *, most_rounds: int = 4) -> None:
        """Rounds until everybody is asked again: who was late twice is left out for two steps."""
        for _ in range(most_rounds):
            begin_seconds = time.monotonic()
            self.offer(self.members)
            brought = await self.committed(self.members)
            if brought == {daemon.peer_id for daemon in self.members}:
                self.round_seconds.append(time.monotonic() - begin_seconds)
                return
        raise AssertionError(f"after {most_rounds} rounds only {brought} are asked")

    def lost_attempts(
        self,
        daemons: list[Daemon],
        step: int,
        *,
        victims: Sequence[Daemon] = (),
        because: str = "",
    ) -> int:
        """The most attempts of a step that any of these gave up after averaging had begun: with
        `because`, those whose reason says so; with `victims`, those for which another of these was
        blamed, and none of them.
        """

        def is_lost(daemon: Daemon, message: dict[str, Any]) -> bool:
            if message["kind"] != "attempt_timeline" or message["outer_step"] != step:
                return False
            phases = {span["phase"] for span in message["spans"]}
            if message["outcome"] != AttemptOutcome.DISCARDED or not phases - {RoundPhase.FORM}:
                return False
            reason = message["reason"]
            if because not in reason:
                return False
            named = any(d.peer_id in reason for d in daemons if d is not daemon)
            return not victims or (named and not any(d.peer_id in reason for d in victims))

        return max(sum(is_lost(d, message) for message in d.messages) for d in daemons)

    def leader(self) -> Daemon:
        """Who leads the first attempt of the next step."""
        directive = common_pb2.Directive.FromString(self.hub.directive.payload)
        peer_id = leader_of(
            directive.roster,
            incarnation=self.hub.incarnation,
            outer_step=self.step + 1,
            attempt=0,
        )
        return next(daemon for daemon in self.members if daemon.peer_id == peer_id)

    async def strike(
        self,
        phase: RoundPhase,
        sent: signal.Signals,
        *,
        is_leader: bool = False,
        num_victims: int = 1,
    ) -> Recovery:
        """Members get a signal when a phase begins for the first of them: the leader, or the last
        that does not lead, and others beside it. The rest must go on, and they must come back to
        the same state.
        """
        for _ in range(_MOST_TRIES):
            leader = self.leader()
            others = [daemon for daemon in reversed(self.members) if daemon is not leader]
            victims = [leader, *others] if is_leader else others
            if (recovery := await self._try(phase, sent, victims[:num_victims])) is not None:
                return recovery
        raise AssertionError(f"the victim skipped {phase} {_MOST_TRIES} times")

    async def _try(
        self, phase: RoundPhase, sent: signal.Signals, victims: list[Daemon]
    ) -> Recovery | None:
        """None if the others certified the step before the first victim came to that phase."""
        survivors = [daemon for daemon in self.members if daemon not in victims]
        first, leader = victims[0], self.leader()
        also = [pid for daemon in victims[1:] for pid in _pids(daemon)]
        self.plan(first, phase=phase.value, signal=int(sent), **{"with": also})
        self.offer(self.members)
        brought = await self.committed(survivors)
        told = [await self.outcome(daemon, self.step) for daemon in survivors]
        done = await self.hub.wait(
            lambda: _done(first) or self._has_state(first), f"{sent.name} at {phase}"
        )
        if done is True:
            self.heal(first)
            return None
        recovery = Recovery(
            phase=phase.value,
            signal_name=sent.name,
            outer_step=self.step,
            attempt_struck=done["attempt"],
            attempts_lost=self.lost_attempts(survivors, self.step),
            innocent_attempts_lost=self.lost_attempts(survivors, self.step, victims=victims),
            has_struck_leader=first is leader and done["attempt"] == 0,
            seconds=max(float(str(t["received_seconds"])) for t in told) - done["done_seconds"],
            round_seconds=statistics.median(self.round_seconds),
            slow_round_seconds=max(self.round_seconds[-_NUM_RECENT_ROUNDS:]),
            between_seconds=statistics.median(np.diff(self._step_seconds[:-1])),
            victim_credited=first.peer_id in brought,
            survivors_left_out=sum(t["outcome"] != "COMMITTED" for t in told),
        )
        assert self.hub.reporter_by_step[self.step] in [d.name for d in survivors]
        await asyncio.gather(*(self._bring_back(daemon, sent) for daemon in victims))
        return recovery

    def _has_state(self, daemon: Daemon) -> bool:
        state = daemon.newest("state")
        return state is not None and bool(state["outer_step"] >= self.step)

    async def _bring_back(self, victim: Daemon, sent: signal.Signals) -> None:
        self.heal(victim)
        assert victim.process is not None
        if sent == signal.SIGSTOP:
            for stopped in _pids(victim):
                os.kill(stopped, signal.SIGCONT)
        else:
            assert await victim.process.wait() == -sent
            await self.hub.launch(victim)
        await self.hub.wait_state(self.members, (1, self.step))
        self.check_state(victim)


def _pids(daemon: Daemon) -> list[int]:
    """Ids of a member's p2pd and of its process."""
    assert daemon.process is not None
    pid = daemon.process.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [*map(int, children), pid]


def _done(victim: Daemon) -> dict[str, Any] | None:
    """When and where the planned signal was sent, once it was; others may have been quicker."""
    assert victim.fault_plan is not None
    plan: dict[str, Any] = json.loads(victim.fault_plan.read_text())
    return plan if "done_seconds" in plan else None
