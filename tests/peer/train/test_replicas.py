"""Strategies at work: several real replicas in one process against the papers' definitions, written
down a second time with plain torch.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from peer.data.feed import TrainedRange
from peer.eval.evaluate import token_byte_lengths
from peer.model.decoder import Decoder, FlatParameters
from peer.model.init import initial_vector
from peer.model.loss import examples_on, summed_loss
from peer.model.objectives import ExampleBuilder, Examples
from peer.model.schedule import lr_ratio
from peer.parallel.inner_steps import FlatInnerSteps
from peer.shared_vectors import SharedVectors, StatePosition
from peer.swarm.codecs import EncodedVector
from peer.swarm.diloco import DilocoStrategy
from peer.swarm.error_feedback import ErrorFeedback
from peer.swarm.fragments import Fragment, FragmentPlan
from peer.swarm.strategy import OfferedContribution
from peer.train.reference import ReferenceRun, iterate_windows
from peer.train.replicas import ReplicaRun
from peer.train.step import Precision
from protos.contract.chunk_format import Manifest
from protos.contract.codecs_wire import codec_named
from protos.contract.digest import Float32Vector, vector_piece_digests
from protos.contract.run_spec import RunSpec, StrategySpec
from tests.peer.train.toy_dataset import build_toy_dataset

SEQ_LEN = 12


@pytest.fixture
def dataset(tmp_path: Path) -> tuple[RunSpec, Path]:
    return build_toy_dataset(tmp_path), tmp_path


def diloco(spec: RunSpec, **settings: object) -> RunSpec:
    table = {"inner_steps": 4, "inner_batch_tokens": 2 * SEQ_LEN, "outer_lr": 0.6} | settings
    return replace(spec, strategy=StrategySpec(name="diloco", **table))  # type: ignore[arg-type]


class Definition:
    """Streaming DiLoCo with torch's own optimizers; plain DiLoCo is one fragment without overlap.

    One peer at a time, as ReplicaRun deals the windows: all peers train their budgets, then what
    overlaps.
    """

    def __init__(self, spec: RunSpec, folder: Path, round_tokens: list[int]) -> None:
        self.spec, self.round_tokens = spec, round_tokens
        manifest = Manifest.from_bytes((folder / "manifest.json").read_bytes())
        lengths = token_byte_lengths(folder / "tokenizer.json")
        builder = ExampleBuilder.for_run(spec, lengths)
        self.windows = iterate_windows(spec, folder, manifest, builder)
        self.anchors = torch.from_numpy(initial_vector(spec))
        self.outer_step = self.schedule_tokens = 0
        self.plan = FragmentPlan(spec)
        self.indices = [
            torch.cat([torch.arange(begin, end) for begin, end in fragment.runs])
            for fragment in self.plan.fragments
        ]
        self.outer = [torch.nn.Parameter(self.anchors[i].clone()) for i in self.indices]
        strategy = spec.strategy
        self.sgd = [
            torch.optim.SGD(
                [p], lr=strategy.outer_lr, momentum=strategy.outer_momentum, nesterov=True
            )
            for p in self.outer
        ]
        self.peers = []
        for _ in round_tokens:
            model = Decoder(spec.model)
            flat = FlatParameters(model)
            flat.values.copy_(self.anchors)
            groups = [
                {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": 0.1},
                {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
            ]
            adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), foreach=False, fused=False)
            self.peers.append((model, flat, adamw))

    def _inner(self, peer: int, batch_tokens: int, done_tokens: int, *, ahead_tokens: int) -> None:
        model, flat, adamw = self.peers[peer]
        parts = [next(self.windows) for _ in range(batch_tokens // SEQ_LEN)]
        examples = Examples.concatenate(parts)
        inputs, labels, weights, mask = examples_on(examples, flat.values.device)
        flat.grads.zero_()
        (summed_loss(model(inputs, mask=mask), labels, weights) / batch_tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), self.spec.optimizer.clip_norm)
        middle = (done_tokens + batch_tokens / 2) / self.round_tokens[peer]
        position = self.schedule_tokens + ahead_tokens + middle * sum(self.round_tokens)
        for group in adamw.param_groups:
            group["lr"] = self.spec.optimizer.peak_lr * lr_ratio(
                position_tokens=position,
                lr_warmup_tokens=self.spec.schedule.lr_warmup_tokens,
                cooldown_start_tokens=round(self.spec.budget_tokens * 0.8),
                budget_tokens=self.spec.budget_tokens,
            )
        adamw.step()

    def advance(self, done_tokens: list[int]) -> list[int]:
        """One outer step; takes and returns what each peer has trained of the next round."""
        strategy, batch_tokens = self.spec.strategy, self.spec.strategy.inner_batch_tokens
        index = self.outer_step % len(self.indices)
        chosen, deltas = self.indices[index], []
        for peer, budget in enumerate(self.round_tokens):
            for done in range(done_tokens[peer], budget, batch_tokens):
                self._inner(peer, min(batch_tokens, budget - done), done, ahead_tokens=0)
            deltas.append((self.anchors - self.peers[peer][1].values)[chosen])
        overlap_tokens = []
        for peer, budget in enumerate(self.round_tokens):
            tokens = min(strategy.overlap_inner_steps * batch_tokens, budget)
            for done in range(0, tokens, batch_tokens):
                self._inner(peer, batch_tokens, done, ahead_tokens=sum(self.round_tokens))
            overlap_tokens.append(tokens)
        total = sum(self.round_tokens)
        pairs = zip(deltas, self.round_tokens, strict=True)
        self.outer[index].grad = sum(delta * (tokens / total) for delta, tokens in pairs)
        self.sgd[index].step()
        moved = self.outer[index].detach() - self.anchors[chosen]
        self.anchors[chosen] = self.outer[index].detach()
        for (_, flat, _), delta in zip(self.peers, deltas, strict=True):
            flat.values[chosen] += (1 - strategy.mix_ratio) * (moved + delta)
        self.outer_step += 1
        self.schedule_tokens += total
        return overlap_tokens


@pytest.mark.parametrize(
    ("settings", "round_tokens"),
    [
        ({}, [8, 8]),
        ({}, [4, 11, 6]),
        ({"num_fragments": 2, "fragment_order": "sequential"}, [4, 8]),
        ({"num_fragments": 2, "overlap_inner_steps": 1, "mix_ratio": 0.5}, [4, 6]),
        ({"overlap_inner_steps": 2, "mix_ratio": 0.25}, [8, 8]),
        ({"overlap_inner_steps": 3}, [8, 4]),
    ],
)
def test_replicas_follow_the_definition(
    dataset: tuple[RunSpec, Path], settings: dict[str, object], round_tokens: list[int]
) -> None:
    spec, folder = dataset
    spec = diloco(replace(spec, budget_tokens=SEQ_LEN * 1000), **settings)
    tokens = [SEQ_LEN * windows for windows in round_tokens]
    run = ReplicaRun(spec, folder, round_tokens=tokens, max_sequences=1)
    definition, done_tokens = Definition(spec, folder, tokens), [0 for _ in tokens]
    start = definition.anchors.clone()
    for _ in range(5):
        run.advance()
        done_tokens = definition.advance(done_tokens)
        digests = {
            tuple(
                digest
                for vector in r.vectors.state_vectors()
                for digest in vector_piece_digests(vector)
            )
            for r in run.replicas
        }
        assert len(digests) == 1
    assert run.position.outer_step == 5
    assert run.position.schedule_tokens == definition.schedule_tokens == 5 * sum(tokens)
    moved = float((definition.anchors - start).norm())
    found = torch.from_numpy(run.replicas[0].vectors.params.copy())
    assert float((found - definition.anchors).norm()) < 2e-3 * moved
    for replica, (_, flat, _) in zip(run.replicas, definition.peers, strict=True):
        difference = replica.step.parameters.values - flat.values
        assert float(difference.norm()) < 2e-3 * moved


def test_sync_replicas_equal_one_process(dataset: tuple[RunSpec, Path]) -> None:
    spec, folder = dataset
    run = ReplicaRun(spec, folder, round_tokens=[48, 24, 24])
    reference = ReferenceRun(spec, folder)
    losses: list[tuple[float, float]] = []
    while not run.is_finished:
        losses.append((run.advance(), reference.advance()))
    assert reference.is_finished and len(losses) == math.ceil(spec.budget_tokens / 96)
    for found, expected in losses:
        assert found == pytest.approx(expected, abs=5e-5)
    assert run.evaluate().loss_nats == pytest.approx(reference.evaluate().loss_nats, abs=5e-5)


def test_a_whole_diloco_run_learns_and_spends_its_budget(dataset: tuple[RunSpec, Path]) -> None:
    spec, folder = dataset
    spec = diloco(spec, num_fragments=2, overlap_inner_steps=1, mix_ratio=0.5)
    run = ReplicaRun(spec, folder, round_tokens=[48, 96], precision=Precision.FP32)
    losses = []
    while not run.is_finished:
        losses.append(run.advance())
    assert run.position.schedule_tokens == spec.budget_tokens
    assert losses[-1] < losses[0] - 0.5


class Watched(ErrorFeedback):
    """Keeps what it was given and what it made of that."""

    trained: np.ndarray
    sent: np.ndarray

    def encode(self, fragment: Fragment, contribution: np.ndarray, **place: Any) -> EncodedVector:
        encoded = super().encode(fragment, contribution, **place)
        self.trained, self.sent = contribution.copy(), encoded.decoded()
        return encoded


@pytest.mark.parametrize("codec", ["sparse", "int4"])
def test_what_a_codec_leaves_out_stays_in_local_parameters(
    dataset: tuple[RunSpec, Path], codec: str
) -> None:
    """A round begins at the anchors less what is owed: what was trained so far and not sent."""
    spec = diloco(dataset[0], codec=codec)
    run = ReplicaRun(spec, dataset[1], round_tokens=[48, 96])
    replica = run.replicas[1]
    watched = Watched(codec_named(codec), replica.vectors.residual)
    replica.feedback = watched
    owed = np.zeros_like(replica.vectors.params)
    for _ in range(3):
        run.advance()
        assert np.abs(watched.trained).max() > 0
        owed += watched.trained - watched.sent
        np.testing.assert_allclose(replica.vectors.residual, owed, rtol=0, atol=1e-6)
        local = replica.step.parameters.values.numpy()
        assert np.array_equal(local, replica.vectors.params - replica.vectors.residual)
    assert np.linalg.norm(owed) > 0


class Port:
    """Keeps what was offered."""

    def __init__(self) -> None:
        self.offered: list[OfferedContribution] = []

    def offer(self, offered: OfferedContribution) -> None:
        self.offered.append(offered)


class Peer:
    """A strategy on a tiny model whose micro-batches have a gradient of ones."""

    def __init__(self, spec: RunSpec, *, outer_step: int = 0) -> None:
        model = Decoder(spec.model)
        self.flat = FlatParameters(model)
        size = self.flat.values.numel()
        self.vectors = SharedVectors.create(size, spec.strategy.state_vectors)
        self.put(outer_step, 1.0)
        self.inner = FlatInnerSteps(spec.optimizer, model, self.flat)
        self.strategy = DilocoStrategy(spec, self.inner, self.flat, self.vectors)
        self.port = Port()

    def put(self, outer_step: int, value: float) -> None:
        position = StatePosition(
            incarnation=0,
            outer_step=outer_step,
            schedule_tokens=240 * outer_step,
            directive_number=1,
            planned_round_tokens=240,
            cooldown_start_tokens=10**6,
            budget_tokens=2 * 10**6,
        )
        with self.vectors.writing_state(position):
            self.vectors.params[:] = value

    def train(self, windows: int) -> None:
        self.flat.grads.fill_(float(windows))
        self.strategy.after_micro_batch(num_tokens=windows * SEQ_LEN, total_nats=windows * 24.0)

    def offer(self, windows: int) -> None:
        part = TrainedRange(lease=b"", lease_number=1, begin_window=0, end_window=windows)
        self.strategy.run_round(self.port, (part,))

    @property
    def lr(self) -> float:
        return self.inner._optimizer.lr


def tokens_of(windows: float) -> int:
    return int(windows * SEQ_LEN)


def test_what_is_wanted_ends_with_inner_step_budget_and_overlap(
    dataset: tuple[RunSpec, Path],
) -> None:
    spec = diloco(dataset[0], overlap_inner_steps=1, mix_ratio=0.5)
    peer = Peer(spec)
    strategy = peer.strategy
    strategy.restart(round_tokens=tokens_of(3.5))
    assert strategy.wanted_tokens() == tokens_of(2)
    assert not strategy.due(is_feed_empty=True)
    before = peer.flat.values.clone()
    peer.train(1)
    assert torch.equal(peer.flat.values, before) and strategy.wanted_tokens() == tokens_of(1)
    peer.train(1)
    assert not torch.equal(peer.flat.values, before)
    assert strategy.wanted_tokens() == tokens_of(1) and not strategy.due(is_feed_empty=False)
    before = peer.flat.values.clone()
    peer.train(1)  # the budget ends in the middle of an inner step
    assert not torch.equal(peer.flat.values, before)
    assert strategy.wanted_tokens() == 0 and strategy.due(is_feed_empty=False)
    local = peer.flat.values.clone()
    peer.offer(3)
    offered = peer.port.offered[0]
    assert (offered.num_tokens, offered.loss_nats) == (36, 2.0)
    assert np.array_equal(peer.vectors.contribution, 1.0 - local.numpy())
    assert strategy.wanted_tokens() == tokens_of(2)  # one inner step while it travels
    peer.train(2)
    assert strategy.wanted_tokens() == 0 and not strategy.due(is_feed_empty=True)
    assert np.array_equal(peer.vectors.contribution, 1.0 - local.numpy())
    trained = peer.flat.values.clone()
    peer.put(1, 0.5)
    assert strategy.settle(round_tokens=tokens_of(4)).outer_step == 1
    assert torch.allclose(peer.flat.values, trained + 0.5 * (0.5 - local), rtol=0, atol=1e-6)
    assert strategy.wanted_tokens() == tokens_of(2)  # of 4, 2 are done
    assert strategy.state_dict()["num_tokens"] == tokens_of(2)


def test_other_states_and_drops_bring_back_the_anchors(dataset: tuple[RunSpec, Path]) -> None:
    peer = Peer(diloco(dataset[0], overlap_inner_steps=1, mix_ratio=0.5))
    strategy = peer.strategy
    strategy.restart(round_tokens=tokens_of(2))
    peer.train(2)
    peer.offer(2)
    sent = peer.flat.values.clone()
    peer.train(2)
    strategy.drop()  # a bad micro-batch while the contribution travels
    assert torch.allclose(peer.flat.values, sent, rtol=0, atol=1e-6)
    assert not strategy.due(is_feed_empty=True)
    peer.put(1, 0.5)
    assert strategy.settle(round_tokens=tokens_of(2)).outer_step == 1
    assert torch.allclose(peer.flat.values, 0.5 * (sent + 0.5), rtol=0, atol=1e-6)
    peer.train(2)
    peer.offer(2)
    peer.put(7, 3.0)  # the swarm went on by more than one step
    assert strategy.settle(round_tokens=tokens_of(2)).outer_step == 7
    assert set(peer.flat.values.tolist()) == {3.0}
    assert strategy.wanted_tokens() == tokens_of(2)


@pytest.mark.parametrize("num_parts", [0, 1, 2])
def test_a_state_that_is_replaced_while_it_is_mixed_in_is_left_for_the_newer_one(
    dataset: tuple[RunSpec, Path], monkeypatch: pytest.MonkeyPatch, num_parts: int
) -> None:
    """The swarm goes on without this peer after it has read so many parts of the state."""
    peer = Peer(diloco(dataset[0], overlap_inner_steps=1, mix_ratio=0.5, num_fragments=2))
    peer.strategy.restart(round_tokens=tokens_of(2))
    peer.train(2)
    peer.offer(2)
    peer.train(2)
    peer.put(1, 0.5)
    read_part, seen = SharedVectors.read_part, []

    def read(vectors: SharedVectors, place: slice, target: Float32Vector, **of: Any) -> bool:
        if len(seen) == num_parts:
            peer.put(2, 3.0)
        seen.append(read_part(vectors, place, target, **of))
        return seen[-1]

    monkeypatch.setattr(SharedVectors, "read_part", read)
    assert peer.strategy.settle(round_tokens=tokens_of(2)).outer_step == 2
    assert seen == [True] * num_parts + [False]
    assert set(peer.flat.values.tolist()) == {3.0}
    assert peer.strategy.wanted_tokens() == tokens_of(2)


@pytest.mark.parametrize(("num_fragments", "mix_ratio"), [(1, 0.0), (1, 0.5), (3, 0.0), (3, 0.5)])
def test_a_drop_costs_only_the_work_since_the_last_contribution(
    dataset: tuple[RunSpec, Path], num_fragments: int, mix_ratio: float
) -> None:
    """Work that other fragments have not sent yet is credited already, and stays."""
    spec = diloco(
        dataset[0],
        inner_steps=6,
        overlap_inner_steps=1,
        num_fragments=num_fragments,
        mix_ratio=mix_ratio,
    )
    peer, plan = Peer(spec), FragmentPlan(spec)
    strategy = peer.strategy
    strategy.restart(round_tokens=tokens_of(2))
    for outer_step in range(1, 5):
        peer.train(2)
        peer.offer(2)
        sent = peer.flat.values.clone()
        contribution = peer.vectors.contribution[: plan.of_outer_step(outer_step).num_values].copy()
        peer.train(2)
        assert strategy.wanted_tokens() == 0
        assert not torch.equal(peer.flat.values, sent)
        strategy.drop()  # while it travels
        assert torch.allclose(peer.flat.values, sent, rtol=0, atol=1e-6)
        assert strategy.wanted_tokens() == tokens_of(2)  # the overlap may be trained again
        assert np.array_equal(peer.vectors.contribution[: contribution.size], contribution)
        peer.put(outer_step, 1.0 - 0.25 * outer_step)
        assert strategy.settle(round_tokens=tokens_of(4)).outer_step == outer_step
        settled = peer.flat.values.clone()
        peer.train(2)
        peer.train(1)
        strategy.drop()  # before the next one goes out
        assert torch.allclose(peer.flat.values, settled, rtol=0, atol=1e-6)
        assert not strategy.due(is_feed_empty=True)
        strategy.drop()  # and again
        assert torch.allclose(peer.flat.values, settled, rtol=0, atol=1e-6)
        strategy.set_budget(tokens_of(2))
    strategy.restart(round_tokens=tokens_of(2))
    peer.train(2)
    strategy.drop()
    assert set(peer.flat.values.tolist()) == {0.0}


@pytest.mark.parametrize(("outer_step", "first_ratio"), [(0, 1.0), (4, 0.1)])
def test_a_joiner_warms_up_over_ten_inner_steps(
    dataset: tuple[RunSpec, Path], outer_step: int, first_ratio: float
) -> None:
    spec = diloco(replace(dataset[0], schedule=replace(dataset[0].schedule, lr_warmup_tokens=0)))
    peer = Peer(spec, outer_step=outer_step)
    peer.strategy.restart(round_tokens=tokens_of(40))
    rates = []
    for _ in range(12):
        peer.train(2)
        rates.append(peer.lr / spec.optimizer.peak_lr)
    assert rates[0] == pytest.approx(first_ratio)
    assert rates[9:] == pytest.approx([1.0] * 3)
    peer.strategy.restart(round_tokens=tokens_of(40))  # a resync keeps moments and rate
    peer.train(2)
    assert peer.lr == spec.optimizer.peak_lr


def test_inner_rate_follows_the_planned_round(dataset: tuple[RunSpec, Path]) -> None:
    """Own budget 120 of 240 planned: each own token stands for two of the schedule."""
    spec = diloco(replace(dataset[0], schedule=replace(dataset[0].schedule, lr_warmup_tokens=240)))
    peer = Peer(spec)
    peer.strategy.restart(round_tokens=tokens_of(10))
    peer.train(2)
    assert peer.lr == pytest.approx(spec.optimizer.peak_lr * 24 / 240)
    peer.train(2)
    assert peer.lr == pytest.approx(spec.optimizer.peak_lr * 72 / 240)
