"""Which layout a node trains with, and why. Pure: shape, devices and wishes in, a plan out.

Among the layouts that fit, the one that a simple model of time takes to be quickest: arithmetic
over all devices at their measured speed, a third more with recomputation, the pipeline's bubble
(p - 1) / (m + p - 1), and what each axis moves over the links: tp eight times the residual stream
per layer, pp the stream at each border there and back, dp the gradient once a round, fsdp the
parameters three times a micro-batch. So tensor parallel wins where links are fast and pipelines
where they are slow, without a rule that says so.

Its tokens/s are a guess for comparing layouts: the model knows nothing of bf16, of links only
orders of magnitude, and is wrong several times over on CPU ranks. What a layout reaches is measured
when it is built (train/node_step.py, train/probe.py) and said beside the guess.
"""

import itertools
from dataclasses import dataclass, replace

from peer.parallel.layout import Layout, LayoutWish, Schedule, require_possible, why_impossible
from peer.parallel.machine_memory import MARGIN_RATIO
from peer.parallel.memory import MemoryTable, Setting, estimate
from protos.contract.errors import MachineError, UsageError
from protos.contract.text import counted

GIB = 2**30
_TURN_SECONDS = 1.0
"""A turn of the loop should take no longer, so that a stop is obeyed at once."""
_LAYER_SECONDS = 2e-4
"""Of starting one layer's operations, forward and backward, whatever their size."""
_UTILIZATION_RATIO = 0.5
_RECOMPUTE_RATIO = 4 / 3
_MICRO_BATCHES_PER_STAGE = 4
_SPLIT_RATIO = 0.97
"""Efficiency that cutting matrices or layers leaves, per axis."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One device that a rank trains on."""

    name: str
    """As torch names it; CPU devices are shares of the machine."""
    memory_bytes: int
    flop_per_second: float
    """Of a large matrix product."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """The devices that this peer lends."""

    devices: tuple[Device, ...]
    link_bytes_per_second: float
    """Between two of them."""
    link_latency_seconds: float
    host_memory_bytes: int
    """For daemon, swarm process and shared vectors."""
    max_micro_batch_sequences: int = 8

    @property
    def is_cpu(self) -> bool:
        """True if ranks are processes on the CPU."""
        return self.devices[0].name.startswith("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The choice."""

    layout: Layout
    table: MemoryTable
    devices: tuple[Device, ...]
    """One per local rank, in order."""
    turn_seconds: float
    """What a turn of the loop should take."""
    reason: str

    def lines(self) -> list[str]:
        """Memory table and reason, for people."""
        rows = [f"{name:<26}{size / GIB:8.2f} GiB" for name, size in self.table.rows()]
        return [*rows, self.reason]


@dataclass(frozen=True, slots=True)
class _Candidate:
    layout: Layout
    table: MemoryTable
    guessed_seconds_per_token: float
    """Right within a factor of several; what a trainer then measures is the figure to quote."""
    missing_bytes: int


def plan_layout(
    setting: Setting,
    node: Node,
    wish: LayoutWish | None = None,
    *,
    round_tokens: int = 4096,
    max_turn_sequences: int | None = None,
) -> Plan:
    """Choose a layout. `max_turn_sequences` bounds a turn (after an out of memory).

    Raises UsageError for a wish that the model or the number of devices refuses, MachineError with
    the missing gigabytes when nothing fits.
    """
    wish = wish or LayoutWish()
    _check_wish(wish, setting, node)
    candidates = [
        _weigh(layout, setting, node, round_tokens=round_tokens)
        for layout in _layouts(wish, setting, node, max_turn_sequences)
    ]
    fitting = [candidate for candidate in candidates if candidate.missing_bytes <= 0]
    if not fitting:
        raise _nothing_fits(candidates, setting, node)
    short = [
        c
        for c in fitting
        if _turn_seconds(c.layout, setting, c.guessed_seconds_per_token) <= _TURN_SECONDS
    ]
    best = min(short or fitting, key=_preference)
    return Plan(
        layout=best.layout,
        table=best.table,
        devices=node.devices[: best.layout.num_ranks],
        turn_seconds=_turn_seconds(best.layout, setting, best.guessed_seconds_per_token),
        reason=_reason(best, candidates, short or fitting, node),
    )


def _check_wish(wish: LayoutWish, setting: Setting, node: Node) -> None:
    if not wish.has_axes:
        return
    wish.require_devices(len(node.devices))
    require_possible(wish.layout(), setting.shape)


def _layouts(
    wish: LayoutWish, setting: Setting, node: Node, max_turn_sequences: int | None
) -> list[Layout]:
    """Everything that the wish and the model allow, the simplest first."""
    schedule = wish.schedule or Schedule.ONE_F_ONE_B
    if wish.has_axes:
        axes = [(wish.dp or 1, wish.tp or 1, wish.pp or 1, bool(wish.is_sharded))]
    else:
        axes = _axes(len(node.devices))
    found = []
    for (dp, tp, pp, is_sharded), has_checkpointing in itertools.product(axes, (False, True)):
        if wish.has_checkpointing not in (None, has_checkpointing):
            continue
        base = Layout(
            dp=dp,
            tp=tp,
            pp=pp,
            is_sharded=is_sharded,
            schedule=schedule,
            has_checkpointing=has_checkpointing,
        )
        if not why_impossible(base, setting.shape):
            found += _with_micro_batches(base, wish, node, max_turn_sequences)
    return found


def _axes(num_devices: int) -> list[tuple[int, int, int, bool]]:
    axes = []
    for count in range(1, num_devices + 1):
        for tp in _divisors(count):
            for pp in _divisors(count // tp):
                axes.append((count // (tp * pp), tp, pp, False))
        if count > 1:
            axes.append((count, 1, 1, True))
    return axes


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _with_micro_batches(
    base: Layout, wish: LayoutWish, node: Node, max_turn_sequences: int | None
) -> list[Layout]:
    count = _MICRO_BATCHES_PER_STAGE * base.pp if base.pp > 1 else 1
    least = base.num_stages if base.pp > 1 else 1
    wished = wish.micro_batch_sequences or 0
    bound = max_turn_sequences or max(node.max_micro_batch_sequences, wished) * count * base.dp
    sizes = [max(1, min(wished, bound // base.dp))] if wished else []
    size = 1
    while not wished and size <= node.max_micro_batch_sequences:
        sizes.append(size)
        size *= 2
    layouts = []
    for size in sizes:
        fitting_count = max(least, min(count, bound // (base.dp * size)))
        layout = replace(base, micro_batch_sequences=size, num_micro_batches=fitting_count)
        if size == 1 or layout.turn_sequences <= bound:
            layouts.append(layout)
    return layouts


def _weigh(layout: Layout, setting: Setting, node: Node, *, round_tokens: int) -> _Candidate:
    table = estimate(layout, setting)
    usable = [d.memory_bytes * (1 - MARGIN_RATIO) for d in node.devices[: layout.num_ranks]]
    missing = max(table.device_bytes - min(usable), table.host_bytes - node.host_memory_bytes)
    return _Candidate(
        layout,
        table,
        _seconds_per_token(layout, setting, node, round_tokens=round_tokens),
        round(missing),
    )


def _seconds_per_token(layout: Layout, setting: Setting, node: Node, *, round_tokens: int) -> float:
    """Of one token of the whole node."""
    shape = setting.shape
    speed = min(d.flop_per_second for d in node.devices[: layout.num_ranks]) * _UTILIZATION_RATIO
    compute = shape.flop_per_token() / (speed * layout.num_ranks)
    compute *= _RECOMPUTE_RATIO if layout.has_checkpointing else 1.0
    num_split = (layout.tp > 1) + (layout.pp > 1) + (layout.dp > 1)
    compute /= _SPLIT_RATIO**num_split
    if layout.pp > 1:
        # A whole turn fills and drains the pipeline once.
        steps = layout.num_micro_batches * layout.schedule.stages_per_rank
        compute *= (steps + layout.pp - 1) / steps
    stream_bytes = shape.d_model * setting.activation_bytes
    micro_tokens = layout.micro_batch_sequences * shape.seq_len
    compute += shape.num_layers * _LAYER_SECONDS / (micro_tokens * layout.dp * layout.pp)
    link, latency = node.link_bytes_per_second, node.link_latency_seconds
    moved = 0.0
    if layout.tp > 1:
        share = (layout.tp - 1) / layout.tp
        moved += 8 * shape.num_layers * (stream_bytes * share / link + latency / micro_tokens)
    if layout.pp > 1:
        borders = layout.num_stages - 1
        moved += 2 * borders * (stream_bytes / link + latency / micro_tokens) / layout.pp
    moved /= layout.dp
    if layout.is_sharded:
        share = (layout.dp - 1) / layout.dp
        turn_tokens = micro_tokens * layout.dp
        moved += 3 * shape.vector_bytes * share / (link * turn_tokens)
        moved += 3 * shape.num_layers * latency / turn_tokens
    elif layout.dp > 1:
        share = 2 * (layout.dp - 1) / layout.dp
        held = shape.vector_bytes / (layout.tp * layout.pp)
        moved += share * held / (link * max(round_tokens, 1))
    return compute + moved


def _turn_seconds(layout: Layout, setting: Setting, seconds_per_token: float) -> float:
    return layout.turn_sequences * setting.shape.seq_len * seconds_per_token


def _preference(candidate: _Candidate) -> tuple[float, int, int]:
    """Quickest first; then the fewer processes, then the fewer windows."""
    layout = candidate.layout
    return candidate.guessed_seconds_per_token, layout.num_ranks, layout.turn_sequences


def _reason(
    best: _Candidate, candidates: list[_Candidate], fitting: list[_Candidate], node: Node
) -> str:
    layout = best.layout
    devices = counted(len(node.devices), "device")
    windows = f"{layout.num_micro_batches} x {layout.micro_batch_sequences} windows a turn"
    memory = f"{best.table.device_bytes / GIB:.2f} of {node.devices[0].memory_bytes / GIB:.2f} GiB"
    text = (
        f"{layout.text} on {layout.num_ranks} of {devices}, {windows}: "
        f"guessed, not measured, {1 / best.guessed_seconds_per_token:,.0f} tokens/s, {memory}"
    )
    others = [c for c in fitting if _kind(c.layout) != _kind(layout)]
    if others:
        second = min(others, key=_preference)
        ratio = second.guessed_seconds_per_token / best.guessed_seconds_per_token
        text += f"; {second.layout.text} would take {ratio:.2f} times as long"
    alone = [c for c in candidates if c.layout.num_ranks == 1 and not c.layout.has_checkpointing]
    if alone and layout.num_ranks > 1 and min(c.missing_bytes for c in alone) > 0:
        missing = min(c.missing_bytes for c in alone) / GIB
        text += f"; one device lacks {missing:.2f} GiB"
    return text


def _kind(layout: Layout) -> tuple[int, int, int, bool]:
    return layout.dp, layout.tp, layout.pp, layout.is_sharded


def _nothing_fits(
    candidates: list[_Candidate], setting: Setting, node: Node
) -> MachineError | UsageError:
    if not candidates:
        return UsageError(
            f"no layout of {counted(len(node.devices), 'device')} suits "
            f"{counted(setting.shape.num_layers, 'layer')} and "
            f"{counted(setting.shape.num_heads, 'head')}",
            allowed="a layout that divides them",
            remedy="choose another --layout, or leave it at auto",
        )
    least = min(candidates, key=lambda candidate: candidate.missing_bytes)
    table = least.table
    lend = "lend more --devices, "
    if node.is_cpu:  # its shares divide one memory
        lend = "lend fewer shares with --devices cpu:N, " if len(node.devices) > 1 else ""
    return MachineError(
        f"{least.missing_bytes / GIB:.2f} GiB are missing for {least.layout.text}: each of "
        f"{least.layout.num_ranks} devices needs {table.device_bytes / GIB:.2f} GiB of "
        f"{node.devices[0].memory_bytes / GIB:.2f}, swarm and shared vectors "
        f"{table.host_bytes / GIB:.2f} GiB of {node.host_memory_bytes / GIB:.2f}",
        allowed="a model whose training step fits the devices and memory that are lent",
        remedy=f"raise --memory-limit, {lend}or join a run with a smaller model",
    )
