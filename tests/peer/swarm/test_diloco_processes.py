"""DiLoCo and its streaming form with every codec through real swarm processes: anchors and momentum
are bit-equal on every member after every outer step, and equal to what one process computes; a
newcomer included, and error feedback around a lossy codec.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from peer.data.feed import TrainedRange
from peer.model.decoder import Decoder, FlatParameters
from peer.model.init import initial_vector
from peer.model.objectives import Examples
from peer.parallel.inner_steps import FlatInnerSteps
from peer.shared_vectors import SharedVectors
from peer.swarm.codecs import EncodedVector
from peer.swarm.diloco import DilocoStrategy
from peer.swarm.error_feedback import ErrorFeedback
from peer.swarm.fragments import Fragment, FragmentPlan
from peer.swarm.outer_update import OuterUpdate
from peer.swarm.strategy import OfferedContribution
from peer.train.replicas import averaged_of
from peer.train.step import MicroStep
from protos.contract.codecs_wire import CODEC_NAMES, codec_named
from protos.contract.run_spec import RunSpec, StrategySpec
from tests.peer.swarm.forked_members import Forker, Forkers
from tests.peer.swarm.swarm_hub import NUM_VALUES, SEQ_LEN, SPEC, Daemon, Hub

BATCH_WINDOWS = 4
INNER_STEPS_PER_ROUND = 3
MORE_INNER_STEPS = (0, 2, 1)
STREAMING = {
    "num_fragments": 2,
    "inner_steps": 2 * INNER_STEPS_PER_ROUND,
    "overlap_inner_steps": 2,
    "mix_ratio": 0.5,
}
WITH_NEWCOMER = (("diloco", "fp32"), ("streaming", "sparse"))


def diloco_spec(**settings: object) -> RunSpec:
    table = {"name": "diloco", "inner_steps": INNER_STEPS_PER_ROUND, "outer_lr": 0.5} | settings
    table["inner_batch_tokens"] = BATCH_WINDOWS * SEQ_LEN
    return replace(SPEC, strategy=StrategySpec(**table))  # type: ignore[arg-type]


class Trainer:
    """A member's trainer: the real strategy on random windows, attached to the shared vectors."""

    def __init__(self, hub: Hub, daemon: Daemon, *, inner_steps: int) -> None:
        self._hub, self.daemon = hub, daemon
        self._round_tokens = inner_steps * BATCH_WINDOWS * SEQ_LEN
        vectors = SharedVectors(daemon.vectors.fd, NUM_VALUES)
        model = Decoder(hub.spec.model)
        parameters = FlatParameters(model)
        self._step = MicroStep(model, parameters)
        self.strategy = DilocoStrategy(
            hub.spec, FlatInnerSteps(hub.spec.optimizer, model, parameters), parameters, vectors
        )
        self._rng = np.random.default_rng(inner_steps)
        self._windows = 0
        self.offered_tokens = 0
        codec = codec_named(hub.spec.strategy.codec)
        self._feedback = ErrorFeedback(
            codec, np.zeros(NUM_VALUES, dtype=np.float32)
        )  # mirrors the swarm process
        self.encoded = EncodedVector.encode(codec, np.zeros(0, dtype=np.float32))
        base = self.strategy.restart(round_tokens=self._round_tokens)
        self._outer_step = base.outer_step

    def train(self) -> None:
        while (windows := self.strategy.wanted_tokens() // SEQ_LEN) > 0:
            shape = (windows, SEQ_LEN)
            inputs_BT = self._rng.integers(0, 50, shape)
            examples = Examples(inputs_BT=inputs_BT, labels_BT=(inputs_BT + 1) % 50)
            result = self._step.run(examples)
            self._windows += windows
            self.strategy.after_micro_batch(
                num_tokens=result.num_tokens, total_nats=result.total_nats
            )

    def run_round(self, fragment: Fragment) -> None:
        """Train to the budget, offer, and train what may overlap."""
        self.train()
        assert self.strategy.due(is_feed_empty=False)
        part = TrainedRange(lease=b"", lease_number=1, begin_window=0, end_window=self._windows)
        self.strategy.run_round(self, (part,))
        contribution = self.daemon.vectors.contribution[: fragment.num_values]
        self.encoded = self._feedback.encode(fragment, contribution, place=(1, self._outer_step))
        self.train()

    def offer(self, offered: OfferedContribution) -> None:
        self.offered_tokens = offered.num_tokens
        self._hub.announce(self.daemon, offered.num_tokens // SEQ_LEN)
        self._windows = 0

    def settle(self) -> None:
        self._outer_step += 1
        self._feedback.end_round(is_committed=True, place=(1, self._outer_step))
        self.strategy.settle(round_tokens=self._round_tokens)


class Expected:
    """The state that one process computes from the same contributions."""

    def __init__(self, spec: RunSpec) -> None:
        self.anchors = initial_vector(spec)
        self.momentum = np.zeros_like(self.anchors)
        self._update = OuterUpdate(spec)

    def apply(self, step: int, trainers: list[Trainer]) -> None:
        in_order = sorted(trainers, key=lambda t: t.daemon.peer_id)
        averaged = averaged_of([t.encoded for t in in_order], [t.offered_tokens for t in in_order])
        self._update.apply(self.anchors, self.momentum, averaged.decoded(), update_number=step)

    def check(self, daemons: list[Daemon]) -> None:
        for daemon in daemons:
            anchors, momentum = daemon.vectors.state_vectors()
            assert np.array_equal(anchors, self.anchors)
            assert np.array_equal(momentum, self.momentum)


async def _round(hub: Hub, trainers: list[Trainer], step: int, expected: Expected) -> None:
    fragment = FragmentPlan(hub.spec).of_outer_step(step)
    for trainer in trainers:
        trainer.run_round(fragment)
    members = [trainer.daemon for trainer in trainers]
    await hub.wait_state(members, (hub.incarnation, step))
    for daemon in members:
        outcome = await hub.wait(
            lambda d=daemon: (o := d.newest("round_outcome")) and o["outer_step"] == step and o,
            "outcome",
        )
        assert outcome["outcome"] == "COMMITTED", outcome
    expected.apply(step, trainers)
    expected.check(members)
    for trainer in trainers:
        trainer.settle()


def _trainers(hub: Hub, members: list[Daemon]) -> list[Trainer]:
    """A trainer for each; some train more in a round, as faster machines do."""
    return [
        Trainer(hub, daemon, inner_steps=INNER_STEPS_PER_ROUND + MORE_INNER_STEPS[index % 3])
        for index, daemon in enumerate(members)
    ]


async def _story(folder: Path, spec: RunSpec, forkers: Sequence[Forker]) -> None:
    """Every fragment once, and the first one again: what it is owed comes back."""
    hub, expected = Hub(folder, spec), Expected(spec)
    members = [hub.add_daemon(forker) for forker in forkers]
    await hub.found(members)
    trainers = _trainers(hub, members)
    for step in range(1, spec.strategy.num_fragments + 2):
        await _round(hub, trainers, step, expected)
    for daemon in members:
        assert await hub.stop(daemon) == 0


async def _story_of_a_newcomer(folder: Path, spec: RunSpec, forkers: Forkers) -> None:
    hub, expected = Hub(folder, spec), Expected(spec)
    members = [hub.add_daemon(forker) for forker in forkers[1:]]
    await hub.found(members)
    trainers = _trainers(hub, members)
    for step in (1, 2, 3):
        await _round(hub, trainers, step, expected)

    newcomer = hub.add_daemon(forkers[0])
    hub.issue_directive([*members, newcomer])
    hub.tell_all("directive", directive=hub.directive.SerializeToString())
    await _round(hub, trainers, 4, expected)
    await hub.launch(newcomer)
    await hub.wait_state([newcomer], (1, 4))
    expected.check([newcomer])
    trainers += _trainers(hub, [newcomer])
    for step in (5, 6):
        await _round(hub, trainers, step, expected)
    for daemon in (*members, newcomer):
        assert await hub.stop(daemon) == 0


@pytest.mark.slow
@pytest.mark.parametrize("codec", CODEC_NAMES)
@pytest.mark.parametrize("name", ["diloco", "streaming"])
def test_state_is_equal_on_all_members(
    tmp_path: Path, name: str, codec: str, forkers: Forkers
) -> None:
    """Members of unequal speeds and weights, one of them on an old CPU."""
    settings = STREAMING if name == "streaming" else {}
    spec = diloco_spec(codec=codec, **settings)
    story = _story_of_a_newcomer if (name, codec) in WITH_NEWCOMER else _story
    asyncio.run(story(tmp_path, spec, forkers))


@pytest.mark.slow
def test_state_is_equal_on_eight_members_with_sequential_fragments(
    tmp_path: Path, forkers: Forkers
) -> None:
    spec = diloco_spec(codec="int4", fragment_order="sequential", **STREAMING)
    asyncio.run(_story(tmp_path, spec, [*forkers, *forkers, *forkers[1:]]))
