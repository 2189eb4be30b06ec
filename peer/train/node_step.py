"""The training step, parameters and inner steps of a model that lies on several local ranks.

They stand where MicroStep, FlatParameters and FlatInnerSteps stand on one device. The ranks keep
the sum of the gradients themselves, so `add_grads` does nothing, and what a contribution needs is
collected once.
"""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch

from peer.model.objectives import Examples
from peer.parallel.devices import measure_flop_per_second
from peer.shared_vectors import StatePosition
from peer.train.step import Precision, StepResult
from protos.contract.digest import Float32Vector
from protos.contract.run_spec import ModelSpec
from protos.contract.text import counted

if TYPE_CHECKING:
    from peer.parallel.ranks import LocalRanks

_MIN_SPEEDUP_RATIO = 1.15
_EMULATED_RATIO = 0.5
"""A small bf16 product this much slower than in fp32: the CPU emulates it, tens of times slower."""
_SMALL_ROWS = 128


class NodeStep:
    """Runs turns of windows on all local ranks."""

    def __init__(self, spec: ModelSpec, ranks: "LocalRanks") -> None:
        self.spec, self.ranks = spec, ranks
        self.precision = Precision.FP32
        self.device = torch.device("cpu")
        """Where held-out text is evaluated: the ranks hold parts only."""

    def autocast(self) -> torch.autocast:
        """Context for evaluations, which are made on this process's CPU."""
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=False)

    def run(self, examples: Examples, *, is_watched: bool = False) -> StepResult:
        """Forward and backward; gradients are added to those before. Raises LocalRankError."""
        is_bf16 = self.precision is Precision.BF16
        total_nats, is_finite = self.ranks.run(examples, is_bf16=is_bf16, is_watched=is_watched)
        return StepResult(
            total_nats=total_nats, num_tokens=examples.num_tokens, is_finite=is_finite
        )

    @property
    def how(self) -> str:
        """Precision and execution, for people."""
        return f"{self.precision.value} eager"

    def probe_precision(self, *, num_windows: int) -> tuple[float, str]:
        """Choose bf16 where it is clearly quicker; returns (seconds of a turn, reason). It is not
        tried where the CPU emulates it: ranks that wait for each other must be done in time.
        """
        generator = np.random.default_rng(0)
        shape = (num_windows, self.spec.seq_len)
        tokens_BT = generator.integers(0, self.spec.vocab_size, shape)
        examples = Examples(inputs_BT=tokens_BT, labels_BT=tokens_BT)
        seconds: dict[Precision, float] = {}
        tried = (Precision.FP32,) if self._is_bf16_emulated() else (Precision.FP32, Precision.BF16)
        for precision in tried:
            self.precision = precision
            self.run(examples)
            begin = time.perf_counter()
            self.run(examples)
            seconds[precision] = time.perf_counter() - begin
        self.ranks.call("zero")
        fp32_seconds = seconds[Precision.FP32]
        bf16_seconds = seconds.get(Precision.BF16, float("inf"))
        is_bf16 = fp32_seconds > _MIN_SPEEDUP_RATIO * bf16_seconds
        self.precision = Precision.BF16 if is_bf16 else Precision.FP32
        reason = (
            f"a turn of {counted(num_windows, 'window')} takes {1000 * fp32_seconds:.0f} ms in "
            "fp32 and "
            + (
                f"{1000 * bf16_seconds:.0f} ms in bf16"
                if Precision.BF16 in seconds
                else "bf16 was not tried, because this CPU emulates it"
            )
        )
        chosen_seconds = seconds[self.precision]
        speed = num_windows * self.spec.seq_len / max(chosen_seconds, 1e-9)
        return chosen_seconds, f"{reason}: {self.precision.value}, measured {speed:,.0f} tokens/s"

    def _is_bf16_emulated(self) -> bool:
        engine = self.ranks.local.engine
        assert engine is not None
        if engine.device.type != "cpu":
            return False
        bf16, fp32 = (
            measure_flop_per_second(engine.device, num_rows=_SMALL_ROWS, dtype=dtype)
            for dtype in (torch.bfloat16, torch.float32)
        )
        return bf16 < _EMULATED_RATIO * fp32


class NodeParameters:
    """TrainedParameters on local ranks."""

    def __init__(self, ranks: "LocalRanks") -> None:
        self._ranks = ranks

    def load(self, fill: Callable[[Float32Vector], StatePosition | None]) -> StatePosition | None:
        """Through the node's canonical vector."""
        position = fill(self._ranks.vector)
        self._ranks.call("load")
        return position

    def host_values(self) -> Float32Vector:
        """The canonical vector, of which every rank has written its parts."""
        self._ranks.call("store")
        return self._ranks.vector

    def add_grads_to(self, total: Float32Vector) -> None:
        """The ranks have added it up."""

    def collect_grads(self, total: Float32Vector) -> None:
        """The sum of all micro-batches since `forget_grads`."""
        self._ranks.call("store_grads")
        np.copyto(total, self._ranks.vector)

    def forget_grads(self) -> None:
        """On every rank."""
        self._ranks.call("zero")


class NodeInnerSteps:
    """InnerSteps on local ranks."""

    def __init__(self, ranks: "LocalRanks") -> None:
        self._ranks = ranks

    def add_grads(self, *, is_first: bool, is_whole: bool) -> None:
        """The ranks have added it up."""

    def step(self, *, num_tokens: int, learning_rate: float) -> None:
        """Each rank steps on its part; the norm is the whole model's."""
        self._ranks.call("inner_step", num_tokens=num_tokens, learning_rate=learning_rate)
