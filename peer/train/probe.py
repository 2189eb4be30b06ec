"""How this trainer runs its micro-batches: measured once, chosen, and kept with its reason.

Everything that the machine can run is timed on single sequences: torch's own operations and the
native kernels, in fp32 and then in bf16; on a machine where a sequence would take too long, on its
first tokens alone. Some CPUs emulate bf16 tens of times slower: a way whose
first tokens show that is given up. The fastest is taken, bf16 and kernels only if they are clearly
faster. What cannot be tried is listed with the reason, as are ways given up and kernels whose
gradients are not those of torch. Then as many sequences as take about half a
second and a bounded amount of memory, so that a stop is obeyed at once. torch.compile is never
tried here, because that takes from half a minute to minutes: only if its owner asks for it
(`execution = compiled`), before the trainer says that it is ready.

A choice depends on model, torch, device and kernels; it is kept in a cache directory under their
hash, so a restart measures nothing. Peers of one machine may share that directory: the first builds
and measures while the others wait, because peers that measure at the same time measure each other.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peer.config import problem_of_cache
from peer.model.kernels import MAX_POSITIONS, BuiltKernels, find_kernels
from peer.model.objectives import Examples
from peer.parallel.devices import available_memory_bytes, describe_device
from peer.train.step import Execution, MicroStep, Precision
from protos.contract.errors import MachineError
from protos.contract.run_spec import ModelSpec, plain_fields
from protos.contract.text import counted

AUTO = "auto"
_MIN_SPEEDUP_RATIO = 1.15
_TARGET_SECONDS = 0.5
_MAX_SEQUENCES_BY_DEVICE = {"cpu": 8, "cuda": 64}
_MAX_MEMORY_RATIO = 0.25
_SLOW_SECONDS = 2.0
_GLIMPSE_RATIO = 1 / 16
"""Of a sequence: run first, to see whether this way is worth a whole one."""
_GLIMPSE_GROWTH = 4
_PATIENT_GLIMPSE_SECONDS = 1.0
"""A glimpse this short is no reason to leave a way out: it includes what is done only once."""
_MAX_SEQUENCE_SECONDS = 20.0
"""Where a sequence would take longer, every way is judged by its glimpse."""
_HOPELESS_RATIO = 3.0
_MEASURE_SECONDS = 60.0
"""After so much measuring no further way is begun."""
_MIN_SECONDS = 1e-6
_NOISE = 0.05
_NUM_NOISE_VALUES = 1_000_003
"""Repeated; a prime, so that no two rows of a matrix are the same."""
PRODUCT_SIZES = {"cpu": (2048, 768, 2048), "cuda": (8192, 8192, 8192)}
"""Rows, inner, columns of a product that shows what a device can do."""
_GEMM_RUNS = 8
_MAX_ERROR_RATIO = {Precision.FP32: 1e-3, Precision.BF16: 0.1}
"""Of native gradients against eager fp32 ones; rounding gives 1e-6 and 0.01."""
_MAX_COMPARED_VALUES = 2**22
_PATIENCE_SECONDS = 90.0
"""Longest wait for another peer that builds and measures."""
_LOOK_SECONDS = 0.1
_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One way to run a sequence, and what it took."""

    execution: Execution
    precision: Precision
    sequence_seconds: float | None
    """Of one thread's CPU time on CPU; None if it was not tried."""
    reason: str = ""
    """Why it was not tried."""

    def __str__(self) -> str:
        name = f"{self.execution.value} {self.precision.value}"
        if self.sequence_seconds is None:
            return f"{name} not tried: {self.reason}"
        return f"{name} {1000 * self.sequence_seconds:.0f} ms"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """How this trainer runs its micro-batches, and why."""

    execution: Execution
    precision: Precision
    sequence_seconds: float
    """What one sequence took alone, of one thread's CPU time on CPU."""
    reason: str
    trials: tuple[Trial, ...]
    micro_batch_sequences: int = 1
    """As time and memory allow now; not kept."""
    size_reason: str = ""
    """Of the micro-batch; not kept."""

    def __str__(self) -> str:
        return f"{self.reason}, {self.size_reason}"

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> "StepPlan":
        """Read `asdict` of a plan."""
        trials = tuple(Trial(**_with_enums(trial)) for trial in plain["trials"])
        return cls(**(_with_enums(plain) | {"trials": trials}))


def _with_enums(plain: dict[str, Any]) -> dict[str, Any]:
    return plain | {
        "execution": Execution(plain["execution"]),
        "precision": Precision(plain["precision"]),
    }


def choose(trials: Sequence[Trial], *, wanted: str = AUTO) -> Trial:
    """The trial to run as: the fastest, where bf16 and anything but eager must be faster by a
    margin. Raises MachineError if what is wanted could not be tried.
    """
    measured = [trial for trial in trials if trial.sequence_seconds is not None]
    allowed = [trial for trial in measured if wanted in (AUTO, trial.execution)]
    if not allowed:
        found = "; ".join(str(trial) for trial in trials if trial.execution == wanted)
        raise MachineError(
            f"execution {wanted}: {found or 'not to be had on this device'}",
            allowed="what this machine can run: "
            + ", ".join(sorted({trial.execution.value for trial in measured})),
            remedy="install what is missing, or leave out --execution",
        )

    def weighed_seconds(trial: Trial) -> float:
        assert trial.sequence_seconds is not None
        extras = (trial.precision is Precision.BF16) + (trial.execution is not Execution.EAGER)
        return trial.sequence_seconds * _MIN_SPEEDUP_RATIO**extras

    return min(allowed, key=weighed_seconds)


def sequence_bytes(spec: ModelSpec, *, is_cpu: bool) -> int:
    """Rough peak memory of one sequence's forward and backward (fp32 bytes; bf16 needs less)."""
    d_attention = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    per_token = 4 * (8 * spec.d_model + 2 * d_attention + 4 * spec.d_ff)
    scores = 3 * 4 * spec.num_heads * spec.seq_len if is_cpu else 0
    return spec.seq_len * (spec.num_layers * (per_token + scores) + 14 * spec.vocab_size)


def set_up_step(
    step: MicroStep, *, wanted: str = AUTO, cache_dir: Path | None = None, bound: int = 0
) -> StepPlan:
    """Choose, or read what was chosen before, and leave the step set to it.

    `cache_dir` keeps kernels and choices, unless others could write there, as the plan then says;
    `bound` is the most sequences of a micro-batch, 0 = none.
    Compiles if that is wanted. Raises MachineError for what cannot be had.
    """
    problem = "" if cache_dir is None else _cache_problem(cache_dir)
    if problem:
        cache_dir = None
    with _turn(cache_dir):
        kernels = _usable_kernels(step, cache_dir)
        path = None if cache_dir is None else cache_dir / f"plan-{_key(step, wanted, kernels)}.json"
        plan = None if path is None else load_plan(path)
        if plan is None:
            plan = probe_plan(step, kernels=kernels, wanted=wanted)
            if problem:
                plan = replace(plan, reason=f"{plan.reason}; nothing is kept: {problem}")
            if path is not None:
                _keep_plan(plan, path)
    plan = _with_size(plan, step)
    step.precision = plan.precision
    if plan.execution is Execution.NATIVE:
        step.use_native(kernels)
    elif plan.execution is Execution.COMPILED:
        sequences = min(plan.micro_batch_sequences, bound or plan.micro_batch_sequences)
        step.use_compiled(num_sequences=sequences)
    return plan


def _cache_problem(cache_dir: Path) -> str:
    """Why it is not used; makes it if it is not there."""
    try:
        cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except FileExistsError:  # a file
        pass
    except OSError as error:
        return str(error)
    return problem_of_cache(cache_dir)


@contextlib.contextmanager
def _turn(cache_dir: Path | None) -> Iterator[None]:
    """Held by one process of those that share the directory. Where that cannot be had (a directory
    that cannot be written, a holder that does not end) the work is done beside the others'.
    """
    with contextlib.ExitStack() as stack:
        if cache_dir is not None:
            try:
                file = stack.enter_context((cache_dir / "lock").open("a"))
                _wait_for_lock(file.fileno())
            except OSError as error:
                _LOGGER.warning("not measured in turn with others in %s: %s", cache_dir, error)
        yield


def _wait_for_lock(fd: int) -> None:
    deadline_seconds = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline_seconds:
                raise
            time.sleep(_LOOK_SECONDS)


def _keep_plan(plan: StepPlan, path: Path) -> None:
    """Write it whole or not at all; training does not depend on it."""
    try:
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8"
        ) as file:
            json.dump(asdict(replace(plan, micro_batch_sequences=1, size_reason="")), file)
        os.replace(file.name, path)
    except OSError as error:
        _LOGGER.warning("the step plan is measured again next time: %s", error)


def load_plan(path: Path) -> StepPlan | None:
    """A plan that was kept; None if there is none that can be read."""
    try:
        return StepPlan.from_plain(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _key(step: MicroStep, wanted: str, kernels: BuiltKernels) -> str:
    """Everything that a choice depends on: not the threads, because one is measured."""
    info = replace(describe_device(step.device, num_threads=1), total_memory_bytes=0)
    model = [plain_fields(step.model.spec), step.model.has_checkpointing]
    parts = [*model, asdict(info), torch.__version__, wanted, kernels.key]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _usable_kernels(step: MicroStep, cache_dir: Path | None) -> BuiltKernels:
    if step.device.type != "cpu":
        return BuiltKernels(by_dtype={}, reason="the kernels are for CPUs")
    if step.model.has_checkpointing:
        return BuiltKernels(by_dtype={}, reason="activations are recomputed to save memory")
    if step.model.spec.seq_len > MAX_POSITIONS:
        return BuiltKernels(by_dtype={}, reason=f"sequences are longer than {MAX_POSITIONS}")
    return find_kernels(cache_dir)


def probe_plan(
    step: MicroStep, *, kernels: BuiltKernels | None = None, wanted: str = AUTO
) -> StepPlan:
    """Measure what the machine can run on single sequences and choose; leaves the step set to the
    choice, but does not compile.

    On CPU one thread's own CPU time is measured, which does not depend on what else is running.
    Bounded, because the daemon ends a trainer that is silent for minutes. The first way, eager
    fp32, runs 1, 4, 16 ... tokens until that takes a second or is a sixteenth of a sequence; if a
    sequence at that speed takes more than 20 s, nothing longer is run in any way. Else a way takes
    at most two sequences, and one that is k times slower than the best k times its glimpse. No
    way but the first is begun after a minute.
    """
    kernels = _usable_kernels(step, None) if kernels is None else kernels
    num_threads = torch.get_num_threads()
    is_cpu = step.device.type == "cpu"
    if is_cpu:
        torch.set_num_threads(1)
    try:
        trials, note = _measure_all(
            step, kernels, clock=time.thread_time if is_cpu else _device_clock
        )
    finally:
        torch.set_num_threads(num_threads)
    is_compiled = wanted == Execution.COMPILED
    chosen = choose(trials, wanted=Execution.EAGER if is_compiled else wanted)
    step.precision = chosen.precision
    if chosen.execution is Execution.NATIVE:
        step.use_native(kernels)
    else:
        step.use_eager()
    execution = Execution.COMPILED if is_compiled else chosen.execution
    plan = StepPlan(
        execution=execution,
        precision=chosen.precision,
        sequence_seconds=max(chosen.sequence_seconds or 0.0, _MIN_SECONDS),
        reason=f"one sequence of {step.model.spec.seq_len} tokens{note} takes "
        f"{', '.join(map(str, trials))}: {execution.value}"
        f"{', as asked for' if wanted != AUTO else ''}, {chosen.precision.value}",
        trials=trials,
    )
    return _with_size(plan, step)


def _with_size(plan: StepPlan, step: MicroStep) -> StepPlan:
    """The plan with a micro-batch for the threads and the memory that there are now."""
    num_threads = torch.get_num_threads() if step.device.type == "cpu" else 1
    by_time = max(1, int(_TARGET_SECONDS * num_threads / plan.sequence_seconds))
    by_memory = _sequences_that_fit(step)
    sequences = min(by_time, by_memory, _MAX_SEQUENCES_BY_DEVICE.get(step.device.type, 8))
    return replace(
        plan,
        micro_batch_sequences=sequences,
        size_reason=f"{counted(sequences, 'sequence')} (time allows {by_time}, memory {by_memory})",
    )


def _sequences_that_fit(step: MicroStep) -> int:
    budget_bytes = _MAX_MEMORY_RATIO * available_memory_bytes(step.device)
    needed_bytes = sequence_bytes(step.model.spec, is_cpu=step.device.type == "cpu")
    return max(1, int(budget_bytes / needed_bytes))


def _device_clock() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def _measure_all(
    step: MicroStep, kernels: BuiltKernels, *, clock: Callable[[], float]
) -> tuple[tuple[Trial, ...], str]:
    """Every way on the same sequence, fp32 first, and a note about all of them; parameters that are
    still blank are filled meanwhile, and gradients are left zero.
    """
    parameters = step.parameters
    generator = torch.Generator().manual_seed(0)
    is_blank = not bool(parameters.values.any())
    if is_blank:
        _fill(parameters.values, generator)
    measure = _Measure(step, clock, generator)
    trials: list[Trial] = []
    expected: Tensor | None = None
    for precision in (Precision.FP32, Precision.BF16):
        for execution in (Execution.EAGER, Execution.NATIVE):
            step.precision = precision
            seconds, reason = None, ""
            if execution is Execution.NATIVE and not kernels:
                reason = kernels.reason
            else:
                if execution is Execution.NATIVE:
                    step.use_native(kernels)
                else:
                    step.use_eager()
                seconds, reason = measure.sequence_seconds()
            if seconds is not None and expected is None:  # the first way is eager fp32
                expected = _sample(parameters.grads)
            elif seconds is not None and execution is Execution.NATIVE:
                assert expected is not None
                reason = _difference(_sample(parameters.grads), expected, precision)
                seconds = None if reason else seconds
            trials.append(
                Trial(
                    execution=execution,
                    precision=precision,
                    sequence_seconds=seconds,
                    reason=reason,
                )
            )
    if is_blank:
        parameters.values.zero_()
    parameters.grads.zero_()
    return tuple(trials), measure.note


class _Measure:
    """Times the step as it is set, one way after another, and gives up those that are hopeless."""

    def __init__(
        self, step: MicroStep, clock: Callable[[], float], generator: torch.Generator
    ) -> None:
        spec = step.model.spec
        tokens_BT = torch.randint(spec.vocab_size, (1, spec.seq_len), generator=generator).numpy()
        self._whole = Examples(inputs_BT=tokens_BT, labels_BT=tokens_BT)
        self._step, self._clock, self._begin_seconds = step, clock, clock()
        self._num_glimpsed = 0
        self._best_glimpse_seconds = float("inf")
        self._is_glimpse_all = False

    def sequence_seconds(self) -> tuple[float | None, str]:
        """(what a sequence takes, "") or (None, why that was not found out)."""
        spent_seconds = self._clock() - self._begin_seconds
        if self._num_glimpsed and spent_seconds > _MEASURE_SECONDS:
            return None, f"measuring the others took {spent_seconds:.0f} s"
        if self._num_glimpsed:
            seconds = self._glimpse_seconds(self._num_glimpsed)
        else:
            seconds = self._first_glimpse_seconds()
        best_seconds = self._best_glimpse_seconds
        if seconds > max(_PATIENT_GLIMPSE_SECONDS, _HOPELESS_RATIO * best_seconds):
            return None, (
                f"{self._num_glimpsed} tokens took {seconds:.2g} s, "
                f"{seconds / best_seconds:.0f} times as long as the best"
            )
        self._best_glimpse_seconds = min(best_seconds, seconds)
        if self._is_glimpse_all:
            return seconds * self._num_glimpses, ""
        return self._whole_seconds(), ""

    @property
    def note(self) -> str:
        """What a reader of the figures must know; "" if sequences were measured."""
        if not self._is_glimpse_all:
            return ""
        return f" (by the first {self._num_glimpsed}, because more would take too long)"

    @property
    def _num_glimpses(self) -> float:
        """In a sequence."""
        return float(self._whole.inputs_BT.shape[1] / self._num_glimpsed)

    def _first_glimpse_seconds(self) -> float:
        """Finds how many tokens a glimpse has, and whether anything longer can be run."""
        most = max(1, int(_GLIMPSE_RATIO * self._whole.inputs_BT.shape[1]))
        self._num_glimpsed = 1
        seconds = self._glimpse_seconds(1)
        while self._num_glimpsed < most and seconds <= _PATIENT_GLIMPSE_SECONDS:
            self._num_glimpsed = min(most, _GLIMPSE_GROWTH * self._num_glimpsed)
            seconds = self._glimpse_seconds(self._num_glimpsed)
        self._is_glimpse_all = seconds * self._num_glimpses > _MAX_SEQUENCE_SECONDS
        return seconds

    def _glimpse_seconds(self, num_tokens: int) -> float:
        few_BT = self._whole.inputs_BT[:, :num_tokens]
        return self._run_seconds(Examples(inputs_BT=few_BT, labels_BT=few_BT))

    def _whole_seconds(self) -> float:
        """Best of two runs after one to warm up; only the first if that is slow already."""
        best_seconds = float("inf")
        for index in range(3):
            seconds = self._run_seconds(self._whole)
            if index > 0 or seconds > _SLOW_SECONDS:
                best_seconds = min(best_seconds, seconds)
            if seconds > _SLOW_SECONDS:
                break
        return best_seconds

    def _run_seconds(self, examples: Examples) -> float:
        begin_seconds = self._clock()
        self._step.run(examples)
        return self._clock() - begin_seconds


def _fill(values: Tensor, generator: torch.Generator) -> None:
    noise = (_NOISE * torch.randn(_NUM_NOISE_VALUES, generator=generator)).to(values.device)
    for part in values.split(_NUM_NOISE_VALUES):
        part.copy_(noise[: part.numel()])


def _sample(grads: Tensor) -> Tensor:
    """Evenly spaced values, few enough to be kept beside everything else."""
    return grads[:: 1 + grads.numel() // _MAX_COMPARED_VALUES].clone()


def _difference(found: Tensor, expected: Tensor, precision: Precision) -> str:
    """Why these gradients cannot be trusted; "" if they can be. `expected` is of eager fp32."""
    ratio = float((found - expected).norm() / expected.norm())
    allowed = _MAX_ERROR_RATIO[precision]
    if ratio <= allowed:
        return ""
    return f"its gradients differ from torch's by {ratio:.2g}, {allowed:g} is allowed"


def measure_product_flop_per_second(device: torch.device, precision: Precision) -> float:
    """What one matrix product reaches here, on as many threads as torch uses: the ceiling that
    model FLOP utilisation is given against. Best of a few, of CPU time times threads on CPU.
    """
    rows, inner, columns = PRODUCT_SIZES[device.type]
    dtype = torch.bfloat16 if precision is Precision.BF16 else torch.float32
    left = torch.randn(rows, inner, device=device).to(dtype)
    right = torch.randn(columns, inner, device=device).to(dtype)
    clock = time.perf_counter if device.type == "cpu" else _device_clock
    best_seconds = float("inf")
    for _ in range(_GEMM_RUNS):
        begin = clock()
        torch.mm(left, right.t())
        best_seconds = min(best_seconds, clock() - begin)
    return 2.0 * rows * inner * columns / best_seconds
