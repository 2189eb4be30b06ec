"""The exact update of `sync`: averaged gradient -> clip -> AdamW, the same bits on every CPU and
thread count.

Order of things. The gradient's norm is taken in fp64: squares of fp32 values are exact there, a
block is summed by repeated halving (element-wise additions only), and the sums of the blocks by
math.fsum, which is correctly rounded. Then every element goes through a fixed sequence of
separately rounded fp32 operations (add, multiply, divide, square root: IEEE 754 fixes each result;
nothing is fused, no reduction is left to a library). Scalars are fp64 Python arithmetic without
libm's pow, rounded to fp32 once. Blocks are the pieces of digest.py, small enough for the cache;
threads take whole blocks, so how many there are changes nothing. torch's own AdamW gives other bits
on other CPUs (measured).

Weight decay is decoupled and touches matrices only; norm gains are free. A tied embedding occurs
once in the vector and so counts once in the norm.
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from peer.model.schedule import learning_rate
from protos.contract.digest import PIECE_VALUES, Float32Vector
from protos.contract.errors import CorruptDataError
from protos.contract.model_shape import ModelShape
from protos.contract.run_spec import RunSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateStats:
    """What the update did; for logs and metrics."""

    grad_norm: float
    """Of the averaged gradient before clipping."""
    clip_coefficient: float
    """Factor that the gradient was multiplied by, at most 1."""
    lr: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scalars:
    """One update's constants, each rounded to fp32 once."""

    clip: np.float32
    beta1: np.float32
    one_minus_beta1: np.float32
    beta2: np.float32
    one_minus_beta2: np.float32
    sqrt_correction2: np.float32
    epsilon: np.float32
    step_size: np.float32
    decay: np.float32


def power(base: float, exponent: int) -> float:
    """base ** exponent by squaring: multiplications only, so the same bits everywhere."""
    result = 1.0
    while exponent:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


def _block_bounds(num_values: int) -> list[tuple[int, int]]:
    return [
        (begin, min(begin + PIECE_VALUES, num_values))
        for begin in range(0, num_values, PIECE_VALUES)
    ]


def _block_square_sum(block: Float32Vector) -> float:
    """Sum of squares of at most PIECE_VALUES values in fp64, halving the block until one value is
    left.
    """
    squares: npt.NDArray[np.float64] = np.zeros(PIECE_VALUES, dtype=np.float64)
    squares[: block.size] = block
    np.multiply(squares, squares, out=squares)
    width = PIECE_VALUES
    while width > 1:
        width //= 2
        np.add(squares[:width], squares[width : 2 * width], out=squares[:width])
    return float(squares[0])


def vector_norm(vector: Float32Vector) -> float:
    """Euclidean norm, accumulated in fp64 over fixed blocks; the same bits on every machine."""
    bounds = _block_bounds(vector.size)
    return math.sqrt(math.fsum(_block_square_sum(vector[begin:end]) for begin, end in bounds))


class SyncUpdate:
    """Applies one averaged gradient to the replicated state, in place."""

    def __init__(self, spec: RunSpec, *, num_threads: int = 1) -> None:
        """Prepare for the spec's parameters; up to `num_threads` threads share the blocks."""
        self._spec = spec
        table = ModelShape.from_spec(spec.model).parameter_table()
        self.num_values = sum(math.prod(shape) for _, shape in table)
        self._bounds = _block_bounds(self.num_values)
        self._decayed = self._decayed_runs(table)
        self._num_threads = max(1, num_threads)

    def _decayed_runs(
        self, table: tuple[tuple[str, tuple[int, ...]], ...]
    ) -> list[list[tuple[int, int]]]:
        """For each block the runs of values, relative to its begin, that belong to matrices."""
        runs: list[list[tuple[int, int]]] = [[] for _ in self._bounds]
        offset = 0
        for _, shape in table:
            end = offset + math.prod(shape)
            if len(shape) >= 2:
                for index in range(offset // PIECE_VALUES, -(-end // PIECE_VALUES)):
                    block_begin, block_end = self._bounds[index]
                    run = (max(offset, block_begin), min(end, block_end))
                    runs[index].append((run[0] - block_begin, run[1] - block_begin))
            offset = end
        return runs

    def apply(
        self,
        params: Float32Vector,
        exp_avg: Float32Vector,
        exp_avg_sq: Float32Vector,
        averaged: Float32Vector,
        *,
        update_number: int,
        schedule_tokens: int,
        cooldown_start_tokens: int,
        budget_tokens: int,
    ) -> UpdateStats:
        """Make update `update_number` (from 1; the outer step it completes) and leave `averaged`
        unchanged.

        `schedule_tokens` is the state's count *before* this round. Raises CorruptDataError, with
        the state untouched, if the averaged gradient is not finite.
        """
        for vector in (params, exp_avg, exp_avg_sq, averaged):
            assert vector.size == self.num_values and vector.dtype == np.float32
        assert update_number >= 1
        square_sums = self._map_blocks(
            lambda index: _block_square_sum(averaged[slice(*self._bounds[index])])
        )
        grad_norm = (
            math.sqrt(math.fsum(square_sums)) if np.isfinite(square_sums).all() else math.inf
        )
        if not math.isfinite(grad_norm):
            raise CorruptDataError(
                "the averaged gradient holds values that are not finite",
                allowed="finite fp32 values only enter the model",
                remedy="discard this attempt; the reducers' checks should have caught it",
            )
        lr = learning_rate(
            self._spec,
            schedule_tokens=schedule_tokens,
            cooldown_start_tokens=cooldown_start_tokens,
            budget_tokens=budget_tokens,
        )
        clip_coefficient = min(1.0, self._spec.optimizer.clip_norm / (grad_norm + 1e-6))
        scalars = self._scalars(update_number=update_number, lr=lr, clip=clip_coefficient)

        def update(index: int) -> float:
            block = slice(*self._bounds[index])
            _update_block(
                params[block],
                exp_avg[block],
                exp_avg_sq[block],
                averaged[block],
                scalars=scalars,
                decayed_runs=self._decayed[index],
            )
            return 0.0

        self._map_blocks(update)
        return UpdateStats(grad_norm=grad_norm, clip_coefficient=clip_coefficient, lr=lr)

    def _map_blocks(self, function: Callable[[int], float]) -> list[float]:
        indices = range(len(self._bounds))
        if self._num_threads == 1 or len(self._bounds) == 1:
            return [function(index) for index in indices]
        with ThreadPoolExecutor(self._num_threads) as pool:
            return list(pool.map(function, indices))

    def _scalars(self, *, update_number: int, lr: float, clip: float) -> _Scalars:
        optimizer = self._spec.optimizer
        correction1 = 1.0 - power(optimizer.beta1, update_number)
        correction2 = 1.0 - power(optimizer.beta2, update_number)
        return _Scalars(
            clip=np.float32(clip),
            beta1=np.float32(optimizer.beta1),
            one_minus_beta1=np.float32(1.0 - optimizer.beta1),
            beta2=np.float32(optimizer.beta2),
            one_minus_beta2=np.float32(1.0 - optimizer.beta2),
            sqrt_correction2=np.float32(math.sqrt(correction2)),
            epsilon=np.float32(optimizer.epsilon),
            step_size=np.float32(lr / correction1),
            decay=np.float32(1.0 - lr * optimizer.weight_decay),
        )


def _update_block(
    params: Float32Vector,
    exp_avg: Float32Vector,
    exp_avg_sq: Float32Vector,
    averaged: Float32Vector,
    *,
    scalars: _Scalars,
    decayed_runs: list[tuple[int, int]],
) -> None:
    """AdamW on one block (Loshchilov and Hutter 2019, algorithm 2), operation by operation."""
    grad = np.multiply(averaged, scalars.clip)
    work = np.multiply(grad, scalars.one_minus_beta1)
    np.multiply(exp_avg, scalars.beta1, out=exp_avg)
    np.add(exp_avg, work, out=exp_avg)
    np.multiply(grad, grad, out=work)
    np.multiply(work, scalars.one_minus_beta2, out=work)
    np.multiply(exp_avg_sq, scalars.beta2, out=exp_avg_sq)
    np.add(exp_avg_sq, work, out=exp_avg_sq)
    np.sqrt(exp_avg_sq, out=work)
    np.divide(work, scalars.sqrt_correction2, out=work)
    np.add(work, scalars.epsilon, out=work)
    np.divide(exp_avg, work, out=work)
    np.multiply(work, scalars.step_size, out=work)
    for begin, end in decayed_runs:
        np.multiply(params[begin:end], scalars.decay, out=params[begin:end])
    np.subtract(params, work, out=params)
