"""One micro-batch: forward and backward into the flat gradient, in the precision and size that pay
on this device.

Gradients are sums over tokens in fp32. Precision and micro-batch size are chosen once, at the
start, by running single sequences: bf16 autocast where it is clearly faster (some CPUs emulate it
10x slower), else fp32; as many sequences as take about half a second and a bounded amount of
memory, so that a stop is obeyed at once. Parameters, gradients, norms and the loss are fp32 in
either case.

Letters: B sequences, T positions.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import torch

from peer.model.decoder import Decoder, FlatParameters
from peer.model.loss import examples_on, summed_loss
from peer.model.objectives import Examples
from peer.parallel.devices import available_memory_bytes
from protos.contract.run_spec import ModelSpec

_MIN_SPEEDUP_RATIO = 1.15
_TARGET_SECONDS = 0.5
_MAX_SEQUENCES_BY_DEVICE = {"cpu": 8, "cuda": 64}
_MAX_MEMORY_RATIO = 0.25
_SLOW_SECONDS = 2.0
_MIN_SECONDS = 1e-6


class Precision(StrEnum):
    """How matrix products are computed."""

    FP32 = "fp32"
    BF16 = "bf16"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """How this trainer runs its micro-batches, and why."""

    precision: Precision
    micro_batch_sequences: int
    sequence_seconds: float
    """What one sequence took alone, of one thread's CPU time on CPU."""
    reason: str


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

    @property
    def spec(self) -> ModelSpec:
        """Of the model."""
        return self.model.spec

    def autocast(self) -> torch.autocast:
        """Context for forward passes in the chosen precision."""
        is_bf16 = self.precision is Precision.BF16
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=is_bf16)

    def run(self, examples: Examples) -> StepResult:
        """Forward and backward; replaces the gradients of the micro-batch before."""
        inputs_BT, labels_BT, weights_B, mask = examples_on(examples, self.device)
        self.parameters.grads.zero_()
        with self.autocast():
            loss = summed_loss(self.model(inputs_BT, mask=mask), labels_BT, weights_B)
        total_nats = float(loss.detach())
        is_finite = bool(torch.isfinite(loss.detach()))
        if is_finite:
            loss.backward()
            is_finite = bool(torch.isfinite(self.parameters.grads.sum()))
        return StepResult(
            total_nats=total_nats, num_tokens=examples.num_tokens, is_finite=is_finite
        )


def sequence_bytes(spec: ModelSpec, *, is_cpu: bool) -> int:
    """Rough peak memory of one sequence's forward and backward (fp32 bytes; bf16 needs less)."""
    d_attention = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    per_token = 4 * (8 * spec.d_model + 2 * d_attention + 4 * spec.d_ff)
    scores = 3 * 4 * spec.num_heads * spec.seq_len if is_cpu else 0
    return spec.seq_len * (spec.num_layers * (per_token + scores) + 14 * spec.vocab_size)


def probe_plan(step: MicroStep) -> StepPlan:
    """Measure both precisions on single sequences and choose; leaves the step set to the choice.

    On CPU one thread's own CPU time is measured, which does not depend on what else is running.
    """
    spec = step.model.spec
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(spec.vocab_size, (1, spec.seq_len), generator=generator).numpy()
    examples = Examples(inputs_BT=tokens_BT, labels_BT=tokens_BT)
    num_threads = torch.get_num_threads()
    is_cpu = step.device.type == "cpu"
    if is_cpu:
        torch.set_num_threads(1)
    seconds_by_precision: dict[Precision, float] = {}
    for precision in (Precision.BF16, Precision.FP32):
        step.precision = precision
        clock = time.thread_time if is_cpu else time.perf_counter
        seconds_by_precision[precision] = _measure_seconds(step, examples, clock=clock)
    torch.set_num_threads(num_threads)
    bf16_seconds = seconds_by_precision[Precision.BF16]
    fp32_seconds = seconds_by_precision[Precision.FP32]
    is_bf16 = fp32_seconds > _MIN_SPEEDUP_RATIO * bf16_seconds
    step.precision = Precision.BF16 if is_bf16 else Precision.FP32
    seconds = max(seconds_by_precision[step.precision], _MIN_SECONDS)
    by_time = max(1, int(_TARGET_SECONDS * (num_threads if is_cpu else 1) / seconds))
    budget_bytes = _MAX_MEMORY_RATIO * available_memory_bytes(step.device)
    by_memory = max(1, int(budget_bytes / sequence_bytes(spec, is_cpu=is_cpu)))
    sequences = min(by_time, by_memory, _MAX_SEQUENCES_BY_DEVICE.get(step.device.type, 8))
    reason = (
        f"one sequence of {spec.seq_len} tokens takes {1000 * fp32_seconds:.0f} ms in fp32 and "
        f"{1000 * bf16_seconds:.0f} ms in bf16: {step.precision.value}, {sequences} sequences "
        f"(time allows {by_time}, memory {by_memory})"
    )
    step.parameters.grads.zero_()
    return StepPlan(
        precision=step.precision,
        micro_batch_sequences=sequences,
        sequence_seconds=seconds,
        reason=reason,
    )


def _measure_seconds(step: MicroStep, examples: Examples, *, clock: Callable[[], float]) -> float:
    """Best of two runs after one to warm up; only the first if that is slow already."""
    best_seconds = float("inf")
    for index in range(3):
        begin = clock()
        step.run(examples)
        seconds = clock() - begin
        if index > 0 or seconds > _SLOW_SECONDS:
            best_seconds = min(best_seconds, seconds)
        if seconds > _SLOW_SECONDS:
            break
    return best_seconds
