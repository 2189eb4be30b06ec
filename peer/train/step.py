"""One micro-batch: forward and backward into the flat gradient.

Gradients are sums over tokens in fp32. Parameters, gradients, norms and the loss are fp32 whatever
computes them; how products are computed, and by which code, is chosen once, at the start
(probe.py). The default, eager fp32, is what golden losses are of.

Letters: B sequences, T positions.
"""

import math
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

import numpy as np
import torch
from torch import Tensor

from peer.model.decoder import Decoder, FlatParameters
from peer.model.kernels import BuiltKernels, Kernels
from peer.model.loss import examples_on, head_loss
from peer.model.native import NativeDecoder
from peer.model.objectives import Examples
from protos.contract.run_spec import ModelSpec


class Precision(StrEnum):
    """How matrix products are computed."""

    FP32 = "fp32"
    BF16 = "bf16"


class Execution(StrEnum):
    """What runs a micro-batch."""

    EAGER = "eager"
    """torch's own operations and autograd: the reference that the others are compared with."""
    NATIVE = "native"
    """Forward and backward by hand over kernels.c; CPUs with a C compiler."""
    COMPILED = "compiled"
    """torch.compile of each layer; takes a C++ compiler, or Triton, and time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """Outcome of one micro-batch."""

    total_nats: float
    """Loss summed over the tokens."""
    num_tokens: int
    is_finite: bool
    """False if the loss or a gradient is not finite; the gradients must then not be used."""


class MicroStep:
    """Runs micro-batches of one model; afterwards `parameters.grads` holds this micro-batch's
    summed gradient.
    """

    def __init__(
        self, model: Decoder, parameters: FlatParameters, *, precision: Precision = Precision.FP32
    ) -> None:
        self.model = model
        self.parameters = parameters
        self.precision = precision
        self.device = parameters.values.device
        self.execution = Execution.EAGER
        self._kernels: BuiltKernels | None = None
        self._native_by_precision: dict[Precision, NativeDecoder] = {}
        self._compiled_sequences = 0

    @property
    def how(self) -> str:
        """Precision and execution, for people."""
        return f"{self.precision.value} {self.execution.value}"

    def use_native(self, kernels: BuiltKernels) -> None:
        """Run through kernels.c from now on."""
        assert kernels and self.device.type == "cpu"
        self.execution, self._kernels = Execution.NATIVE, kernels

    def use_eager(self) -> None:
        """Run through torch's operations from now on."""
        self.execution = Execution.EAGER

    def use_compiled(self, *, num_sequences: int) -> None:
        """Compile the layers for micro-batches of so many sequences, now; others run eager.

        All layers share one compiled function. Takes seconds, or minutes on a busy machine, unless
        torch's cache has it, so call it before others wait for this peer.
        """
        for layer in self.model.layers.values():
            layer.compile(dynamic=False)
        self.execution, self._compiled_sequences = Execution.COMPILED, num_sequences
        shape = (num_sequences, self.model.spec.seq_len)
        tokens_BT = np.zeros(shape, dtype=np.int64)
        self.run(Examples(inputs_BT=tokens_BT, labels_BT=tokens_BT))

    def run_like(self, other: "MicroStep") -> None:
        """Take over another step's precision and execution."""
        self.precision, self.execution = other.precision, other.execution
        self._kernels, self._compiled_sequences = other._kernels, other._compiled_sequences

    @property
    def spec(self) -> ModelSpec:
        """Of the model."""
        return self.model.spec

    def autocast(self) -> torch.autocast:
        """Context for forward passes in the chosen precision."""
        is_bf16 = self.precision is Precision.BF16
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=is_bf16)

    def run(self, examples: Examples, *, is_watched: bool = False) -> StepResult:
        """Forward and backward; replaces the gradients of the micro-batch before. With `is_watched`
        by torch's own operations, because hooks of the model's modules see no others.
        """
        batch = examples_on(examples, self.device)
        if self.execution is Execution.NATIVE and not is_watched:
            nats = torch.tensor(self._native().run(*batch), dtype=torch.float64)
        elif self.execution is Execution.COMPILED:
            is_warm = examples.inputs_BT.shape[0] == self._compiled_sequences and batch[3] is None
            is_warm = is_warm and not is_watched
            with torch.compiler.set_stance("default" if is_warm else "force_eager"):
                nats = self._run_autograd(*batch)
        else:
            nats = self._run_autograd(*batch)
        sums = torch.stack((nats.double(), self.parameters.grads.sum().double()))
        total_nats, sum_grads = sums.tolist()  # the only wait for the device
        is_finite = math.isfinite(total_nats) and math.isfinite(sum_grads)
        return StepResult(
            total_nats=total_nats, num_tokens=examples.num_tokens, is_finite=is_finite
        )

    def _native(self) -> NativeDecoder:
        if self.precision not in self._native_by_precision:
            assert self._kernels is not None
            dtype = torch.bfloat16 if self.precision is Precision.BF16 else torch.float32
            self._native_by_precision = {
                self.precision: NativeDecoder(
                    self.model, self.parameters, Kernels(self._kernels, dtype)
                )
            }
        return self._native_by_precision[self.precision]

    def _run_autograd(
        self, inputs_BT: Tensor, labels_BT: Tensor, weights_B: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        self.parameters.grads.zero_()
        with self.autocast():
            loss: Tensor = self.model(
                inputs_BT,
                mask=mask,
                head=partial(head_loss, labels_BT=labels_BT, weights_B=weights_B),
            )
        loss.backward()
        return loss.detach()
