"""Members of a real swarm killed and stopped at every phase of a round, in an order that a seed
decides; used by `soak --parts phases`.
"""

import asyncio
import random
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

from shared import Figure, say

SIGNALS = (signal.SIGKILL, signal.SIGSTOP)
MOST_GROWN_FILES = 36
"""In one member over all faults: twelve more averaged vectors and an image while a state is served,
and up to twenty sockets of ended reductions that wait for the garbage collector (9 to 26 open ones
were seen to come and go).
"""


def run_phases(seed: int, *, num_members: int) -> dict[str, Any]:
    """Every phase with every signal once, on one swarm; what went wrong is a result."""
    from protos.contract.telemetry import ATTEMPT_PHASES

    rng = random.Random(seed)
    faults = [(phase, sent, rng.random() < 0.5) for phase in ATTEMPT_PHASES for sent in SIGNALS]
    rng.shuffle(faults)
    began_seconds = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="muster-soak-") as directory:
        recoveries, problem = asyncio.run(_strike_all(Path(directory), faults, num_members))
        left = leftovers(directory)
    if left and not problem:
        problem = f"left over: {left}"
    return {
        "part": "phases",
        "seed": seed,
        "problem": problem,
        "faults": [
            f"{phase} {sent.name}{' leader' * is_leader}"
            for phase, sent, is_leader in faults[: len(recoveries)]
        ],
        "recoveries": recoveries,
        "seconds": round(time.monotonic() - began_seconds, 1),
    }


async def _strike_all(
    folder: Path, faults: list[Any], num_members: int
) -> tuple[list[dict[str, Any]], str]:
    """Recoveries so far, and what ended them early."""
    from tests.peer.swarm.faulted_swarm import FaultedSwarm

    swarm = FaultedSwarm(folder)
    recoveries: list[dict[str, Any]] = []
    phase, sent = "START", signal.SIGKILL
    try:
        await swarm.start(num_members)
        num_fds, memory_bytes = swarm.num_open_files(), swarm.memory_bytes()
        for phase, sent, is_leader in faults:
            recovery = await swarm.strike(phase, sent, is_leader=is_leader)
            recoveries.append(vars(recovery) | {"noticed_seconds": recovery.noticed_seconds})
            await swarm.round_with_all()
            say(
                f"  {recovery.phase} {recovery.signal_name}{' leader' * is_leader}: "
                f"{recovery.attempts_lost} attempts lost, "
                f"{recovery.survivors_left_out} survivors left out, "
                f"{recovery.noticed_seconds:.2f} s over a round of {recovery.round_seconds:.2f} s"
            )
        grown = swarm.num_open_files() - num_fds
        grown_mib = (swarm.memory_bytes() - memory_bytes) / 2**20
        say(f"resident memory of the largest member: {grown_mib:+.0f} MiB over all faults")
        await swarm.stop()
        if grown > MOST_GROWN_FILES:
            return recoveries, f"{grown} more open files in one member after {len(faults)} faults"
    except (AssertionError, OSError, KeyError, ValueError, TimeoutError) as error:
        told = {d.name: d.newest("phase") for d in swarm.members}
        await swarm.kill_all()
        return recoveries, f"{phase} {sent.name}: {type(error).__name__}: {error}; {told}"
    return recoveries, ""


def leftovers(directory: str) -> list[str]:
    """Commands of living processes that name a directory, after a moment to end in."""
    deadline_seconds = time.monotonic() + 10.0
    while time.monotonic() < deadline_seconds:
        found = []
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                command = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if directory in command:
                found.append(f"{entry.parent.name} {command[:120]}")
        if not found:
            return []
        time.sleep(0.2)
    return found


def figures_of_phases(outcomes: list[dict[str, Any]]) -> list[Figure]:
    """What the faults cost, by signal and over all."""
    recoveries = [r for outcome in outcomes for r in outcome["recoveries"]]
    if not recoveries:
        return []
    figures = [
        Figure(
            name="attempts_lost_at_most",
            value=max(r["attempts_lost"] for r in recoveries),
            unit="attempts",
            at_most=1,
        ),
        Figure(
            name="survivors_left_out",
            value=sum(r["survivors_left_out"] for r in recoveries),
            unit="members",
            at_most=0,
            note="their work was not in the step: late for its group, as on a busy machine",
        ),
    ]
    for sent in SIGNALS:
        noticed = sorted(r["noticed_seconds"] for r in recoveries if r["signal_name"] == sent.name)
        if not noticed:
            continue
        name = sent.name.lower()
        say(f"{name}: {[round(seconds, 2) for seconds in noticed]}")
        figures.append(
            Figure(
                name=f"{name}_to_next_round_longest",
                value=round(noticed[-1], 2),
                unit="s over a round",
                at_most=2.2,
                note="torchft: 2.2 s",
            )
        )
        median = noticed[len(noticed) // 2]
        figures.append(
            Figure(
                name=f"{name}_to_next_round_median", value=round(median, 2), unit="s over a round"
            )
        )
    return figures
