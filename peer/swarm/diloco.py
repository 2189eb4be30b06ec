"""`diloco`: many inner AdamW steps on own data, then one exact outer step from what they changed.

Names of the papers: H inner steps between two syncs of a fragment, pseudo-gradient delta = anchor -
local (DiLoCo, Douillard et al. 2023, arXiv 2311.08105, algorithm 1); P fragments that take turns,
one per outer step, tau inner steps trained while a fragment travels, and alpha, the share of the
difference from the other peers that stays when it arrives (Streaming DiLoCo, Douillard et al. 2025,
arXiv 2501.18512, algorithm 2; there what was trained meanwhile is replaced, here it stays:
ops/decisions/0013-overlap-keeps-what-was-trained.md).

Order of things in one outer step. Inner steps of `inner_batch_tokens` each (gradient accumulated
over micro-batches, divided by its tokens, clipped, AdamW or Muon) until the own token budget of the
directive is done; a faster peer has a larger budget. Then the fragment whose turn it is goes out as
a packed pseudo-gradient, weighed by the tokens trained since the last one, and training goes on for
up to tau inner steps, which count towards the next round. When the round is committed, what the
swarm has made of the contribution takes its place in the local parameters. The outer step itself is
made by the swarm process on every member (outer_update.py).

With a lossy codec local parameters begin at the anchors less what this peer still owes the others
(error_feedback.py): what the codec left out stays where it was trained, so that gradients are those
of a model that has learned it (ops/decisions/0014-residuals-stay-in-local-parameters.md). Below,
`origin` is where they begin; with fp32 it is the anchors.

A micro-batch that is not finite costs the work since the last contribution and nothing older: what
local parameters were then is kept in the vector that the contribution travels in, which has room
for all of them. The fragment's own are the origin less the contribution, the others' lie behind it.

Private, never in a digest: local parameters, inner moments, work under way. Local parameters become
the origin at every restart; inner moments stay over a resync of a living trainer, as they do over a
committed round. A joiner's are zero, and its first inner steps are warmed up.
"""

from collections.abc import Iterator
from functools import partial

import numpy as np

from peer.data.feed import TrainedRange
from peer.model.schedule import lr_ratio
from peer.parallel.inner_steps import InnerSteps
from peer.shared_vectors import SharedVectors, StatePosition
from peer.swarm.fragments import Fragment, FragmentPlan
from peer.swarm.strategy import (
    OfferedContribution,
    PlainState,
    RoundPort,
    TrainedParameters,
)
from protos.contract.digest import Float32Vector
from protos.contract.run_spec import RunSpec

JOINER_WARMUP_STEPS = 10
"""Inner steps over which a joiner's learning rate rises from a tenth to the schedule's."""
_BLOCK_VALUES = 2**16


class DilocoStrategy:
    """Strategy of this name; see peer/swarm/strategy.py for what each method promises."""

    def __init__(
        self,
        spec: RunSpec,
        inner: InnerSteps,
        parameters: TrainedParameters,
        vectors: SharedVectors,
    ) -> None:
        """`parameters` become the local ones, `inner` makes steps on them; `vectors` hold the
        anchors and the residual.
        """
        self._spec, self._parameters, self._vectors = spec, parameters, vectors
        self._plan = FragmentPlan(spec)
        self._has_residual = spec.strategy.codec != "fp32"
        self._origin: Float32Vector = np.zeros(vectors.num_values, dtype=np.float32)
        self._inner = inner
        self._base: StatePosition | None = None
        self._warmup_steps_left = 0
        self._round_tokens = 0
        self._contributed_step = 0
        self._is_travelling = False
        self._steps_while_travelling = 0
        self._batch_tokens = 0
        self.num_tokens = 0
        self._total_nats = 0.0

    # Life of a round ---------------------------------------------------------------------------

    def restart(self, *, round_tokens: int) -> StatePosition:
        """Local parameters become the origin; the first time of all moments are zero."""
        is_first = self._base is None
        self._base = self._read_origin()
        if is_first and self._base.outer_step > 0:
            self._warmup_steps_left = JOINER_WARMUP_STEPS
        self._round_tokens = round_tokens
        self._contributed_step = 0
        self._is_travelling = False
        self.drop()
        return self._base

    def settle(self, *, round_tokens: int) -> StatePosition:
        """Put what the swarm has made of the contribution in the place of what was contributed:

            local += (1 - mix_ratio) (origin after - origin before + contribution)

        With mix_ratio 0 local is then the new origin and what was trained while the contribution
        travelled, so no credited work is lost (Streaming DiLoCo replaces local parameters, and
        with them that work). With more a share of the difference from the other peers stays.
        """
        before = self._base
        assert before is not None
        if not self._is_travelling:
            return self.restart(round_tokens=round_tokens)
        after = self._vectors.read_position()
        local = self._parameters.host_values()
        if not after.follows(before) or not self._take_in(after, local):
            return self.restart(round_tokens=round_tokens)
        self._put_local(local)
        self._base = after
        self._round_tokens = round_tokens
        self._is_travelling = False
        return after

    def _take_in(self, after: StatePosition, local: Float32Vector) -> bool:
        """Mix a state into `local` and make it the origin, in one pass over memory; False if it has
        been replaced meanwhile, with all of this half done.
        """
        fragment = self._plan.of_outer_step(after.outer_step)
        origin, contribution = self._origin, self._vectors.contribution
        share = np.float32(1.0) - np.float32(self._spec.strategy.mix_ratio)
        is_all_sent = share == 1.0 and self._steps_while_travelling == 0
        for place, packed in _blocks(fragment):
            contribution[packed] -= origin[place]
            if not is_all_sent:
                local[place] += share * contribution[packed]
            if not self._read_origin_part(place, after):
                return False
            if is_all_sent:
                local[place] = origin[place]  # the same, not rounded
            else:
                local[place] += share * origin[place]
            contribution[packed] += origin[place]
            contribution[packed] *= np.float32(1.0) - share
        others = self._plan.others_at(after.outer_step)
        return all(self._read_origin_part(place, after) for place, _ in _blocks(others))

    def drop(self) -> None:
        """Back to what local parameters were without the work since the last contribution."""
        self._parameters.load(self._fill_contributed)
        self._steps_while_travelling = 0
        self._parameters.forget_grads()
        self._batch_tokens = 0
        self.num_tokens = 0
        self._total_nats = 0.0

    def set_budget(self, round_tokens: int) -> None:
        """Keep the work, change how much is wanted."""
        self._round_tokens = round_tokens

    def wanted_tokens(self) -> int:
        """Up to the end of the inner step, of the budget, and of what may overlap."""
        strategy = self._spec.strategy
        if self._is_travelling and self._steps_while_travelling >= strategy.overlap_inner_steps:
            return 0
        seq_len = self._spec.model.seq_len
        left = max(0, self._round_tokens - self.num_tokens) // seq_len * seq_len
        return min(left, strategy.inner_batch_tokens - self._batch_tokens)

    def due(self, *, is_feed_empty: bool) -> bool:
        """Also with less than the budget when there is no more data: others may be waiting."""
        if self.num_tokens == 0 or self._is_travelling:
            return False
        return is_feed_empty or self.wanted_tokens() == 0

    def run_round(self, port: RoundPort, ranges: tuple[TrainedRange, ...]) -> None:
        """Offer the pseudo-gradient of the fragment whose turn it is."""
        assert self._base is not None and self.num_tokens > 0 and not self._is_travelling
        windows = sum(part.end_window - part.begin_window for part in ranges)
        assert windows * self._spec.model.seq_len == self.num_tokens
        if self._batch_tokens:
            self._inner_step()
        fragment = self._plan.of_outer_step(self._base.outer_step + 1)
        local, contribution = self._parameters.host_values(), self._vectors.contribution
        for place, packed in _blocks(fragment):
            np.subtract(self._origin[place], local[place], out=contribution[packed])
        outer_step = self._base.outer_step + 1
        for place, kept in _blocks(self._plan.others_at(outer_step), begin=fragment.num_values):
            contribution[kept] = local[place]
        self._contributed_step = outer_step
        offered = OfferedContribution(
            base=self._base,
            ranges=ranges,
            num_tokens=self.num_tokens,
            loss_nats=self._total_nats / self.num_tokens,
        )
        self._is_travelling, self._steps_while_travelling = True, 0
        self.num_tokens, self._total_nats = 0, 0.0
        port.offer(offered)

    # Inner steps -------------------------------------------------------------------------------

    def after_micro_batch(self, *, num_tokens: int, total_nats: float) -> None:
        """Add to the inner step's gradient, and make the step when its batch is whole."""
        is_whole = self._batch_tokens + num_tokens >= self._spec.strategy.inner_batch_tokens
        self._inner.add_grads(is_first=self._batch_tokens == 0, is_whole=is_whole)
        self._batch_tokens += num_tokens
        self.num_tokens += num_tokens
        self._total_nats += total_nats
        if is_whole or self._round_tokens - self.num_tokens < self._spec.model.seq_len:
            self._inner_step()

    def _inner_step(self) -> None:
        self._inner.step(num_tokens=self._batch_tokens, learning_rate=self._learning_rate())
        self._batch_tokens = 0
        if self._is_travelling:
            self._steps_while_travelling += 1

    def _learning_rate(self) -> float:
        """Rate of the inner step whose batch was just trained, at the middle of that batch: the
        schedule's position is schedule_tokens + (i / H) x planned round tokens.
        """
        base = self._base
        assert base is not None
        planned_tokens = base.planned_round_tokens or self._round_tokens
        done_ratio = (self.num_tokens - self._batch_tokens / 2) / max(self._round_tokens, 1)
        position_tokens = base.schedule_tokens + done_ratio * planned_tokens
        if self._is_travelling:
            position_tokens += planned_tokens
        ratio = lr_ratio(
            position_tokens=position_tokens,
            lr_warmup_tokens=self._spec.schedule.lr_warmup_tokens,
            cooldown_start_tokens=base.cooldown_start_tokens,
            budget_tokens=base.budget_tokens,
        )
        if self._warmup_steps_left:
            ratio *= (JOINER_WARMUP_STEPS + 1 - self._warmup_steps_left) / JOINER_WARMUP_STEPS
            self._warmup_steps_left -= 1
        return self._spec.optimizer.peak_lr * ratio

    # Local parameters --------------------------------------------------------------------------

    def _read_origin(self) -> StatePosition:
        """Anchors less the residual, and which state they are. The residual changes at the end of
        a round only; any other origin would be right too, as contributions are counted from it.
        """
        position = self._vectors.read_params(self._origin)
        if self._has_residual:
            self._origin -= self._vectors.residual
        return position

    def _read_origin_part(self, place: slice, state: StatePosition) -> bool:
        """The same for a part, if the state is still there."""
        is_there = self._vectors.read_part(place, self._origin[place], of=state)
        if self._has_residual:
            self._origin[place] -= self._vectors.residual[place]
        return is_there

    def _put_local(self, local: Float32Vector) -> None:
        self._parameters.load(partial(_copy, local))

    def state_dict(self) -> PlainState:
        """Progress towards the round; local work is not kept over a restart, its data is leased
        again.
        """
        return {
            "num_tokens": self.num_tokens,
            "round_tokens": self._round_tokens,
            "is_travelling": self._is_travelling,
            "loss_nats": self._total_nats / self.num_tokens if self.num_tokens else 0.0,
        }

    def _fill_contributed(self, local: Float32Vector) -> None:
        """Local parameters at the last contribution and what the swarm has made of it since; after
        a restart the origin.
        """
        np.copyto(local, self._origin)
        if (outer_step := self._contributed_step) == 0:
            return
        fragment, kept_values = self._plan.of_outer_step(outer_step), self._vectors.contribution
        for place, packed in _blocks(fragment):
            local[place] -= kept_values[packed]
        for place, kept in _blocks(self._plan.others_at(outer_step), begin=fragment.num_values):
            local[place] = kept_values[kept]


def _copy(source: Float32Vector, target: Float32Vector) -> None:
    if source.ctypes.data != target.ctypes.data:
        np.copyto(target, source)


def _blocks(fragment: Fragment, *, begin: int = 0) -> Iterator[tuple[slice, slice]]:
    """Places of blocks of a fragment in the canonical vector and in a packed one that begins at
    `begin`: fresh memory of the size of a model costs more than the arithmetic.
    """
    packed_begin = begin
    for first, end in fragment.runs:
        for low in range(first, end, _BLOCK_VALUES):
            size = min(_BLOCK_VALUES, end - low)
            yield slice(low, low + size), slice(packed_begin, packed_begin + size)
            packed_begin += size
