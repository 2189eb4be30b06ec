"""A real swarm on loopback whose members fail on command, and what must hold after every fault.

Used by test_round_faults.py, once per fault, and by ops/bench/soak, many times.
"""

import asyncio
import json
import os
import signal
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from protos.contract.digest import Float32Vector
from protos.contract.telemetry import AttemptOutcome, RoundPhase
from protos.muster.v1 import rounds_pb2
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
    seconds: float
    """From the signal to the last survivor's outcome."""
    round_seconds: float
    """Of an undisturbed round: median of those so far."""
    slow_round_seconds: float
    """The longest of the newest undisturbed rounds: how busy the machine is now."""
    victim_credited: bool

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
        self._expected = Expected()
        self._parts: Parts = {}

    # Life -------------------------------------------------------------------------------------

    async def start(self, num_members: int) -> None:
        """Launch, found the run, and make rounds until deadlines are learnt."""
        self.hub.begin()
        self.members = [self._add() for _ in range(num_members)]
        await asyncio.gather(*(self.hub.launch(daemon) for daemon in self.members))
        base = await self.hub.wait_state(self.members, (0, 0))
        self.hub.start_incarnation(self.members, to_outer_step=0, base=base)
        self.hub.tell_all("incarnation", record=self.hub.record.SerializeToString())
        await self.hub.wait_state(self.members, (1, 0))
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
        """Stop all; nothing may be left."""
        for daemon in self.members:
            self.heal(daemon)
            assert await self.hub.stop(daemon) == 0
            assert not list((daemon.home / "run").glob("*.sock"))

    async def kill_all(self) -> None:
        """End everything at once, after a failure."""
        for daemon in self.members:
            if daemon.process is not None and daemon.process.returncode is None:
                daemon.process.kill()
                await daemon.process.wait()

    def num_open_files(self) -> int:
        """The most that any member that is never struck has open."""
        pids = [d.process.pid for d in self.members[:-1] if d.process is not None]
        return max(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids)

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
        self, daemons: list[Daemon], step: int, *, blamed: str = "", because: str = ""
    ) -> int:
        """The most attempts of a step that any of these gave up after averaging had begun: with
        `because`, those whose reason says so; with `blamed`, those for which another of them was
        blamed, and not that peer.
        """

        def is_lost(daemon: Daemon, message: dict[str, Any]) -> bool:
            if message["kind"] != "attempt_timeline" or message["outer_step"] != step:
                return False
            phases = {span["phase"] for span in message["spans"]}
            if message["outcome"] != AttemptOutcome.DISCARDED or not phases - {RoundPhase.FORM}:
                return False
            if because not in message["reason"]:
                return False
            others = [d.peer_id for d in daemons if d is not daemon]
            named = any(peer_id in message["reason"] for peer_id in others)
            return not blamed or (named and blamed not in message["reason"])

        return max(sum(is_lost(d, message) for message in d.messages) for d in daemons)

    async def strike(self, phase: RoundPhase, sent: signal.Signals) -> Recovery:
        """The last member gets a signal when a phase begins; the others must go on, and it must
        come back to the same state.
        """
        for _ in range(_MOST_TRIES - 1):
            if (recovery := await self._try_to_strike(phase, sent)) is not None:
                return recovery
        recovery = await self._try_to_strike(phase, sent)
        assert recovery is not None, f"the victim skipped {phase} {_MOST_TRIES} times"
        return recovery

    async def _try_to_strike(self, phase: RoundPhase, sent: signal.Signals) -> Recovery | None:
        """None if the others certified the step before the victim came to that phase."""
        victim, survivors = self.members[-1], self.members[:-1]
        self.plan(victim, phase=phase.value, signal=int(sent))
        self.offer(self.members)
        brought = await self.committed(survivors)
        told = [await self.outcome(daemon, self.step) for daemon in survivors]
        done = await self.hub.wait(
            lambda: _done(victim) or self._has_state(victim), f"{sent.name} at {phase}"
        )
        if done is True:
            self.heal(victim)
            return None
        recovery = Recovery(
            phase=phase.value,
            signal_name=sent.name,
            outer_step=self.step,
            attempt_struck=done["attempt"],
            attempts_lost=self.lost_attempts(survivors, self.step),
            innocent_attempts_lost=self.lost_attempts(survivors, self.step, blamed=victim.peer_id),
            seconds=max(float(str(t["received_seconds"])) for t in told) - done["done_seconds"],
            round_seconds=statistics.median(self.round_seconds),
            slow_round_seconds=max(self.round_seconds[-_NUM_RECENT_ROUNDS:]),
            victim_credited=victim.peer_id in brought,
        )
        assert all(t["outcome"] == "COMMITTED" for t in told), told
        await self._bring_back(victim, sent)
        return recovery

    def _has_state(self, daemon: Daemon) -> bool:
        state = daemon.newest("state")
        return state is not None and bool(state["outer_step"] >= self.step)

    async def _bring_back(self, victim: Daemon, sent: signal.Signals) -> None:
        self.heal(victim)
        assert victim.process is not None
        if sent == signal.SIGSTOP:
            pid = victim.process.pid
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            for stopped in (pid, *map(int, children)):
                os.kill(stopped, signal.SIGCONT)
        else:
            assert await victim.process.wait() == -sent
            await self.hub.launch(victim)
        await self.hub.wait_state(self.members, (1, self.step))
        self.check_state(victim)


def _done(victim: Daemon) -> dict[str, Any] | None:
    """When and where the planned signal was sent, once it was; others may have been quicker."""
    assert victim.fault_plan is not None
    plan: dict[str, Any] = json.loads(victim.fault_plan.read_text())
    return plan if "done_seconds" in plan else None
