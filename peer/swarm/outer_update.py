"""The exact update of `diloco`: averaged pseudo-gradient -> Nesterov momentum -> anchors, the same
bits on every CPU and thread count.

For each value of the fragment whose turn it is (Douillard et al. 2023, arXiv 2311.08105, algorithm
1, OuterOpt; Nesterov as Sutskever et al. 2013 in the form of torch's SGD):

    momentum = outer_momentum * momentum + delta
    anchor   = anchor - outer_lr * (delta + outer_momentum * momentum)

with delta the averaged anchor - local. Every operation is element-wise and rounded to fp32 on its
own (IEEE 754 fixes the result), so blocks are for the cache and for threads only and change no bit.
The outer rate is constant: what the schedule cools down are the inner steps. Anchors and momentum
of other fragments stay as they are.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np

from peer.swarm.exact_update import SyncUpdate
from peer.swarm.fragments import FragmentPlan
from protos.contract.digest import PIECE_VALUES, Float32Vector
from protos.contract.errors import CorruptDataError
from protos.contract.run_spec import RunSpec


class ExactUpdate(Protocol):
    """From averaged bytes to the next state, in place and bit-equal everywhere."""

    def apply(
        self,
        *vectors: Float32Vector,
        update_number: int,
        schedule_tokens: int,
        cooldown_start_tokens: int,
        budget_tokens: int,
    ) -> Any:
        """`vectors` are the state's, in the order of its layout, and the averaged one.

        Raises CorruptDataError, with the state untouched, for values that are not finite.
        """
        ...


def exact_update_for(spec: RunSpec, *, num_threads: int = 1) -> ExactUpdate:
    """The update of the spec's strategy."""
    if spec.strategy.name == "diloco":
        return OuterUpdate(spec, num_threads=num_threads)  # type: ignore[return-value]
    return SyncUpdate(spec, num_threads=num_threads)  # type: ignore[return-value]


class OuterUpdate:
    """Applies one averaged pseudo-gradient of one fragment."""

    def __init__(self, spec: RunSpec, *, num_threads: int = 1) -> None:
        """Up to `num_threads` threads share the blocks."""
        self._plan = FragmentPlan(spec)
        self._lr = np.float32(spec.strategy.outer_lr)
        self._momentum = np.float32(spec.strategy.outer_momentum)
        self._num_threads = max(1, num_threads)

    def apply(
        self,
        anchors: Float32Vector,
        momentum: Float32Vector,
        averaged: Float32Vector,
        *,
        update_number: int,
        schedule_tokens: int = 0,
        cooldown_start_tokens: int = 0,
        budget_tokens: int = 0,
    ) -> None:
        """Make outer step `update_number` (from 1) with its fragment's packed pseudo-gradient.

        The schedule's numbers are those of every exact update; this one needs none of them.
        """
        fragment = self._plan.of_outer_step(update_number)
        assert averaged.size == fragment.num_values and averaged.dtype == np.float32
        assert anchors.dtype == momentum.dtype == np.float32 and anchors.size == momentum.size
        if not np.isfinite(averaged).all():
            raise CorruptDataError(
                "the averaged pseudo-gradient holds values that are not finite",
                allowed="finite fp32 values only enter the model",
                remedy="discard this attempt; the reducers' checks should have caught it",
            )
        blocks: list[tuple[int, int, int]] = []
        packed_begin = 0
        for begin, end in fragment.runs:
            for low in range(begin, end, PIECE_VALUES):
                blocks.append((low, min(low + PIECE_VALUES, end), packed_begin + low - begin))
            packed_begin += end - begin

        def update(block: tuple[int, int, int]) -> None:
            low, high, packed = block
            self._update_block(
                anchors[low:high], momentum[low:high], averaged[packed : packed + high - low]
            )

        if self._num_threads == 1 or len(blocks) == 1:
            for block in blocks:
                update(block)
        else:
            with ThreadPoolExecutor(self._num_threads) as pool:
                list(pool.map(update, blocks))

    def _update_block(
        self, anchors: Float32Vector, momentum: Float32Vector, delta: Float32Vector
    ) -> None:
        np.multiply(momentum, self._momentum, out=momentum)
        np.add(momentum, delta, out=momentum)
        step = np.multiply(momentum, self._momentum)
        np.add(step, delta, out=step)
        np.multiply(step, self._lr, out=step)
        np.subtract(anchors, step, out=anchors)
