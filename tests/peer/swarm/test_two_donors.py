"""A newcomer's state from two real members at once, one of which lies or dies in the middle."""

import asyncio
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.peer.swarm.swarm_hub import SPEC, Daemon, Hub

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

BIG_SPEC = replace(SPEC, model=replace(SPEC.model, vocab_size=8192))
PIECE_BYTES = 4 * 65_536
UPLOAD_LIMIT_MBIT = 32.0
"""A donor serves half of it, 8 pieces a second: nobody has the whole state out before the other."""
NUM_STEPS = 5
"""More than averaged bytes are kept of, so that only the whole state helps."""
SERVED_BEFORE = 3
"""Pieces that the bad donor serves well."""


class Newcomers:
    """Two donors in the same state, and a member that comes to it anew, as often as it is asked."""

    def __init__(self, folder: Path) -> None:
        self.hub = Hub(folder, BIG_SPEC)
        self.donors = [self._add(UPLOAD_LIMIT_MBIT) for _ in range(2)]
        self.newcomer = self._add(None)
        self.digest = b""

    def _add(self, upload_limit_mbit: float | None) -> Daemon:
        daemon = self.hub.add_daemon()
        daemon.fault_plan = daemon.home / "fault.json"
        daemon.upload_limit_mbit = upload_limit_mbit
        return daemon

    async def start(self) -> None:
        hub, donors = self.hub, self.donors
        await hub.found(donors)
        for step in range(1, NUM_STEPS + 1):
            if step == NUM_STEPS:
                hub.issue_directive(donors, [self.newcomer])
                hub.tell_all("directive", directive=hub.directive.SerializeToString())
            for donor in donors:
                noise = np.random.default_rng(step).standard_normal(hub.num_values)
                hub.contribute(donor, noise.astype(np.float32))
            self.digest = await hub.wait_state(donors, (1, step), 120.0)

    async def join(self) -> dict[str, Any]:
        """The newcomer begins with nothing; returns what its download says of itself."""
        newcomer = self.newcomer
        assert newcomer.fault_plan is not None
        for folder in ("state", "averaged", "votes"):
            shutil.rmtree(newcomer.home / folder, ignore_errors=True)
        await self.hub.launch(newcomer)
        assert await self.hub.wait_state([newcomer], (1, NUM_STEPS), 120.0) == self.digest
        recorded: dict[str, Any] = json.loads(
            newcomer.fault_plan.with_suffix(".download").read_text()
        )
        return recorded


@pytest.mark.parametrize(
    ("fault", "reason"), [("lies", "does not match the proven digest"), ("dies", "")]
)
def test_half_a_state_from_a_donor_that_fails_counts(
    tmp_path: Path, fault: str, reason: str
) -> None:
    async def story() -> None:
        swarm = Newcomers(tmp_path)
        await swarm.start()
        good, bad = swarm.donors
        assert bad.fault_plan is not None and bad.process is not None
        bad.fault_plan.write_text(json.dumps({"donor": fault, "after": SERVED_BEFORE}))
        found = await swarm.join()
        from_bad, from_good = (found["received"][donor.peer_id] for donor in (bad, good))
        assert 1 <= from_bad <= SERVED_BEFORE, "what is under way dies with the donor"
        assert from_bad + from_good >= found["num_pieces"]
        assert reason in found["reasons"][bad.peer_id] and found["reasons"][bad.peer_id]
        assert found["num_pieces"] * PIECE_BYTES > 2 * found["peak_bytes"], (
            "it is not held as a whole"
        )
        most_bytes = 2 * 2 * PIECE_BYTES + 2**19
        assert found["peak_bytes"] < most_bytes, "two pieces of each donor"
        alive = [swarm.newcomer, good] if fault == "dies" else [swarm.newcomer, good, bad]
        if fault == "dies":
            assert await bad.process.wait() == -9
        for daemon in alive:
            assert await swarm.hub.stop(daemon) == 0

    asyncio.run(story())
