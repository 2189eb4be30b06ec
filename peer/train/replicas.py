"""Several peers of a run in one process, without a network: what a strategy does to the loss.

Strategy, inner optimizer, fragments, codec, error feedback, averaging order and exact update are
the ones that peers use; there are no leases, no rounds that fail and no clocks. Each peer trains
its round budget on windows dealt in the run's order, all contributions are encoded, averaged,
weighed by tokens, in the order of the peers, the average is encoded once, and every peer makes the
exact update on its own copy of the state. With overlap a
contribution arrives as late as the spec allows: after `overlap_inner_steps` inner steps of every
peer.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from peer.data.feed import TrainedRange
from peer.eval.evaluate import EvalResult, token_byte_lengths
from peer.model.decoder import Decoder, FlatParameters
from peer.model.init import initial_vector
from peer.model.objectives import ExampleBuilder, Examples
from peer.model.schedule import planned_cooldown_start_tokens
from peer.shared_vectors import SharedVectors, StatePosition
from peer.swarm.codecs import EncodedVector
from peer.swarm.error_feedback import ErrorFeedback
from peer.swarm.fragments import Fragment, FragmentPlan
from peer.swarm.outer_update import exact_update_for
from peer.swarm.strategy import OfferedContribution, load_params
from peer.train.reference import evaluate_model, iterate_windows
from peer.train.step import MicroStep, Precision
from peer.train.strategies import flat_strategy
from protos.contract.chunk_format import MANIFEST_FILE, TOKENIZER_FILE, Manifest
from protos.contract.codecs_wire import codec_named
from protos.contract.digest import Float32Vector
from protos.contract.errors import RunFailedError
from protos.contract.run_spec import RunSpec

NextWindows = Callable[[int], list[Examples]]
"""Most windows wanted -> examples of one window each."""


class Replica:
    """One simulated peer: its copy of the replicated state, local model and strategy."""

    def __init__(
        self, spec: RunSpec, *, round_tokens: int, precision: Precision, max_sequences: int
    ) -> None:
        """Hold the initial state and work towards the first outer step."""
        model = Decoder(spec.model)
        parameters = FlatParameters(model)
        initial = initial_vector(spec)
        self.vectors = SharedVectors.create(initial.size, spec.strategy.state_vectors)
        self.step = MicroStep(model, parameters, precision=precision)
        self.strategy = flat_strategy(spec, model, parameters, self.vectors)
        self.round_tokens = round_tokens
        self.offered: OfferedContribution | None = None
        self._update = exact_update_for(spec, num_threads=torch.get_num_threads())
        self.feedback = ErrorFeedback(codec_named(spec.strategy.codec), self.vectors.residual)
        self._seq_len = spec.model.seq_len
        self._max_sequences = max_sequences
        self._num_windows = 0
        self.vectors.params[:] = initial

    def train(self, next_windows: NextWindows) -> None:
        """Train what the strategy wants now. Raises RunFailedError for values not finite."""
        while (wanted := self.strategy.wanted_tokens() // self._seq_len) > 0:
            parts = next_windows(min(wanted, self._max_sequences))
            if not parts:
                return
            result = self.step.run(Examples.concatenate(parts))
            if not result.is_finite:
                raise RunFailedError(
                    f"loss or gradient not finite after {self.vectors.position()}",
                    allowed="finite values",
                    remedy="lower optimizer.peak_lr",
                )
            self._num_windows += len(parts)
            self.strategy.after_micro_batch(
                num_tokens=result.num_tokens, total_nats=result.total_nats
            )

    def run_round(self, fragment: Fragment) -> EncodedVector | None:
        """Offer what was trained, if anything; returns the contribution as it travels."""
        self.offered = None
        if not self.strategy.due(is_feed_empty=True):
            return None
        part = TrainedRange(lease=b"", lease_number=1, begin_window=0, end_window=self._num_windows)
        self._num_windows = 0
        self.strategy.run_round(self, (part,))
        place = (0, self.vectors.position().outer_step)
        contribution = self.vectors.contribution[: fragment.num_values]
        return self.feedback.encode(fragment, contribution, place=place)

    def offer(self, offered: OfferedContribution) -> None:
        """RoundPort: the contribution lies in the vectors until the round is applied."""
        self.offered = offered

    def apply(self, averaged: Float32Vector, after: StatePosition) -> None:
        """What the swarm process does with a certified step, and the trainer afterwards."""
        before = self.vectors.position()
        with self.vectors.writing_state(after):
            self._update.apply(
                *self.vectors.state_vectors(),
                averaged,
                update_number=after.outer_step,
                schedule_tokens=before.schedule_tokens,
                cooldown_start_tokens=after.cooldown_start_tokens,
                budget_tokens=after.budget_tokens,
            )
        self.feedback.end_round(is_committed=True, place=(0, after.outer_step))
        self.strategy.settle(round_tokens=self.round_tokens)


class ReplicaRun:
    """All peers of a run; `advance` makes one outer step."""

    def __init__(
        self,
        spec: RunSpec,
        dataset_dir: Path,
        *,
        round_tokens: Sequence[int],
        precision: Precision = Precision.FP32,
        max_sequences: int = 8,
    ) -> None:
        """`round_tokens` is each peer's budget, as a directive would give it."""
        self.spec, self.dataset_dir = spec, dataset_dir
        self.manifest = Manifest.from_bytes((dataset_dir / MANIFEST_FILE).read_bytes())
        self._byte_lengths = token_byte_lengths(dataset_dir / TOKENIZER_FILE)
        self._builder = ExampleBuilder.for_run(spec, self._byte_lengths)
        self._windows = iterate_windows(spec, dataset_dir, self.manifest, self._builder)
        self._left_windows = spec.budget_tokens // spec.model.seq_len
        self._plan = FragmentPlan(spec)
        self._planned_round_tokens = sum(round_tokens)
        self.wire_bytes = 0
        """Of one contribution and one average of each outer step; with k peers in a butterfly each
        sends, and receives, (k - 1) / k of it.
        """
        self.replicas = [
            Replica(spec, round_tokens=tokens, precision=precision, max_sequences=max_sequences)
            for tokens in round_tokens
        ]
        for replica in self.replicas:
            with replica.vectors.writing_state(self._position(0, 0)):
                pass
            replica.strategy.restart(round_tokens=replica.round_tokens)

    def _position(self, outer_step: int, schedule_tokens: int) -> StatePosition:
        budget_tokens = self.spec.budget_tokens
        return StatePosition(
            incarnation=0,
            outer_step=outer_step,
            schedule_tokens=schedule_tokens,
            directive_number=1,
            planned_round_tokens=self._planned_round_tokens,
            cooldown_start_tokens=planned_cooldown_start_tokens(
                self.spec, budget_tokens=budget_tokens
            ),
            budget_tokens=budget_tokens,
        )

    @property
    def position(self) -> StatePosition:
        """Of the state that all replicas hold."""
        return self.replicas[0].vectors.position()

    @property
    def is_finished(self) -> bool:
        """True once the budget's windows are dealt and contributed."""
        is_under_way = any(r.strategy.due(is_feed_empty=True) for r in self.replicas)
        return self._left_windows == 0 and not is_under_way

    def _next_windows(self, num_windows: int) -> list[Examples]:
        """Up to so many windows; fewer or none at the budget's end."""
        size = min(num_windows, self._left_windows)
        self._left_windows -= size
        return [next(self._windows) for _ in range(size)]

    def advance(self) -> float:
        """Train a round, average, update; returns the mean loss of its contributions in nats."""
        before = self.position
        fragment = self._plan.of_outer_step(before.outer_step + 1)
        contributions: list[EncodedVector] = []
        for replica in self.replicas:
            replica.train(self._next_windows)
            encoded = replica.run_round(fragment)
            if encoded is not None:
                contributions.append(encoded)
        for replica in self.replicas:
            replica.train(self._next_windows)  # while the contributions travel
        offers = [r.offered for r in self.replicas if r.offered is not None]
        tokens = [offered.num_tokens for offered in offers]
        averaged = averaged_of(contributions, tokens)
        self.wire_bytes += len(contributions[0].data) + len(averaged.data)
        after = self._position(before.outer_step + 1, before.schedule_tokens + sum(tokens))
        for replica in self.replicas:
            replica.apply(averaged.decoded(), after)
        return sum(offered.loss_nats * offered.num_tokens for offered in offers) / sum(tokens)

    def evaluate(self, *, eval_tokens: int = 0) -> EvalResult:
        """Held-out loss of the anchors."""
        model = Decoder(self.spec.model)
        parameters = FlatParameters(model, has_grads=False)
        load_params(self.replicas[0].vectors, parameters)
        step = MicroStep(model, parameters, precision=self.replicas[0].step.precision)
        return evaluate_model(
            step,
            self.dataset_dir,
            self.manifest,
            eval_tokens=eval_tokens,
            byte_lengths=self._byte_lengths,
            builder=self._builder,
        )


def averaged_of(contributions: Sequence[EncodedVector], tokens: Sequence[int]) -> EncodedVector:
    """As reducers do: the sum of float32(w / W) * x in order, each operation rounded on its own,
    encoded once.
    """
    total_tokens, codec = sum(tokens), contributions[0].codec
    total = np.zeros(contributions[0].num_values, dtype=np.float32)
    for encoded, num_tokens in zip(contributions, tokens, strict=True):
        total += encoded.decoded() * np.float32(num_tokens / total_tokens)
    return EncodedVector.encode(codec.for_result(len(contributions)), total)
