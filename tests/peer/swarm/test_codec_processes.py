"""Three real swarm processes per lossy codec: one state everywhere, the one that a single process
computes; a member that was killed catches up by the encoded averaged bytes.
"""

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from peer.model.init import initial_vector
from peer.swarm.codecs import EncodedVector, encode_with_residual
from peer.swarm.exact_update import SyncUpdate
from protos.contract.codecs_wire import CODEC_NAMES, Codec, codec_named
from protos.contract.digest import Float32Vector
from tests.peer.swarm.forked_members import Forkers
from tests.peer.swarm.swarm_hub import NUM_VALUES, SEQ_LEN, SPEC, WINDOWS, Daemon, Hub

LOSSY_NAMES = tuple(name for name in CODEC_NAMES if name != "fp32")
"""fp32 has a longer story of its own in test_swarm_processes.py."""


class Expected:
    """The state that one process computes from the same contributions."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self.params = initial_vector(SPEC)
        self._moments = np.zeros((2, NUM_VALUES), dtype=np.float32)
        self._schedule_tokens = 0
        self._residuals: dict[str, Float32Vector] = {}

    def forget(self, peer_id: str) -> None:
        """A member that is brought to a newer state owes nothing."""
        self._residuals.pop(peer_id)

    def apply(self, step: int, parts: dict[str, tuple[Float32Vector, int]]) -> None:
        """Encode every part with what its member owes, sum what is decoded, encode and decode the
        sum, update.
        """
        num_tokens = sum(tokens for _, tokens in parts.values())
        total = np.zeros(NUM_VALUES, dtype=np.float32)
        for peer_id in sorted(parts):
            values, tokens = parts[peer_id]
            residual = self._residuals.pop(peer_id, np.zeros(NUM_VALUES, dtype=np.float32))
            data, left = encode_with_residual(self._codec, values, residual)
            self._residuals[peer_id] = left
            encoded = EncodedVector(codec=self._codec, num_values=NUM_VALUES, data=memoryview(data))
            decoded = encoded.decoded()
            total = total + np.float32(tokens / num_tokens) * decoded
        averaged = EncodedVector.encode(self._codec.for_result(len(parts)), total)
        SyncUpdate(SPEC).apply(
            self.params,
            *self._moments,
            averaged.decoded(),
            update_number=step,
            schedule_tokens=self._schedule_tokens,
            cooldown_start_tokens=SPEC.budget_tokens,
            budget_tokens=SPEC.budget_tokens,
        )
        self._schedule_tokens += num_tokens


async def _round(hub: Hub, members: list[Daemon], step: int, expected: Expected) -> None:
    parts = {}
    for index, daemon in enumerate(members):
        rng = np.random.default_rng((step, index))
        values = (1e-6 * rng.standard_t(3, NUM_VALUES)).astype(np.float32)
        parts[daemon.peer_id] = (values, (WINDOWS + index) * SEQ_LEN)
        hub.contribute(daemon, values, WINDOWS + index)
    await hub.wait_state(members, (1, step))
    expected.apply(step, parts)
    for daemon in members:
        outcome = await hub.wait(
            lambda d=daemon: (o := d.newest("round_outcome")) and o["outer_step"] == step and o,
            "outcome",
        )
        assert outcome["outcome"] == "COMMITTED", outcome
        assert np.array_equal(daemon.vectors.params, expected.params)


async def _story(folder: Path, codec_name: str, forkers: Forkers) -> None:
    spec = replace(SPEC, strategy=replace(SPEC.strategy, codec=codec_name))
    expected = Expected(codec_named(codec_name))
    hub = Hub(folder, spec)
    first, second, third = members = [hub.add_daemon(forker) for forker in forkers]
    await hub.found(members)
    await _round(hub, members, 1, expected)
    await hub.kill(third)
    expected.forget(third.peer_id)
    await _round(hub, [first, second], 2, expected)
    await _round(hub, [first, second], 3, expected)
    await hub.launch(third)
    await hub.wait_state(members, (1, 3))
    assert np.array_equal(third.vectors.params, expected.params)
    await _round(hub, members, 4, expected)
    for daemon in members:
        assert await hub.stop(daemon) == 0


@pytest.mark.slow
@pytest.mark.parametrize("codec_name", LOSSY_NAMES)
def test_swarm_with_codec(tmp_path: Path, codec_name: str, forkers: Forkers) -> None:
    asyncio.run(_story(tmp_path, codec_name, forkers))
