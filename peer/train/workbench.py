"""What the loop works with, for the layout that the planner chooses on this machine's devices.

On one device the model is whole in this process (MicroStep, FlatParameters); otherwise this process
leads local ranks (node_step.py). What the daemon has learnt from earlier trainers (devices that
were lost, memory that was not enough) comes with the configuration, so a plan made after a fault is
a plan for what is left.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from peer.config import EXECUTIONS_OF_RANKS
from peer.ipc import Message
from peer.model.adamw8bit import STATE_BYTES
from peer.model.decoder import Decoder, FlatParameters
from peer.parallel.devices import (
    available_memory_bytes,
    choose_device,
    measure_flop_per_second,
    unused_gpu_note,
)
from peer.parallel.faults import GROUP_TIMEOUT_SECONDS
from peer.parallel.layout import AUTO, Layout, LayoutWish, device_names, parse_layout
from peer.parallel.machine_memory import host_memory_bytes
from peer.parallel.memory import Setting, estimate
from peer.parallel.plan import Device, Node, Plan, plan_layout
from peer.shared_vectors import SharedVectors
from peer.swarm.strategy import Strategy
from peer.train.node_step import NodeInnerSteps, NodeParameters, NodeStep
from peer.train.probe import set_up_step
from peer.train.step import Execution, MicroStep
from peer.train.strategies import build_strategy, flat_strategy, has_inner_optimizer
from protos.contract.errors import MachineError
from protos.contract.model_shape import FP32_BYTES, ModelShape
from protos.contract.run_spec import RunSpec

_CPU_LINK = (2e9, 2e-4)
"""Bytes per second and latency of gloo on loopback, between processes that compute."""
_GPU_LINK = (20e9, 3e-5)
"""Of NCCL without NVLink: the planner errs towards layouts that move little."""
_NOMINAL_FLOP_PER_SECOND = 50e9
_MAX_SEQUENCES = {"cpu": 8, "cuda": 64}
_WATCHED_TURNS = 10.0
_PATIENCE_TURNS = 20.0
"""Planned turns that a rank waits for another; a busy machine is slower than its plan."""
_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workbench:
    """Step and strategy, and what the daemon is told about them."""

    step: MicroStep | NodeStep
    strategy: Strategy
    layout: Layout
    turn_sequences: int
    turn_seconds: float
    least_turn_seconds: float
    """The daemon must let local ranks wait for each other before it calls a turn too long."""
    reason: str
    devices_text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Lent:
    """Devices that are left, with their positions among those that were lent; rank 0 has the
    first.
    """

    names: tuple[str, ...]
    positions: tuple[int, ...]

    @classmethod
    def from_message(cls, message: Message) -> "_Lent":
        """Those that no earlier trainer has lost."""
        names = device_names(message.get("devices") or message["device"])
        lost = set(message.get("lost_devices") or ())
        left = [position for position in range(len(names)) if position not in lost]
        if not left:
            raise MachineError(
                f"all devices that were lent are lost: {', '.join(names)}",
                allowed="at least one device that works",
                remedy="see what the driver says of them (dmesg, nvidia-smi), restart the machine, "
                "or lend the CPU with --device cpu",
            )
        return cls(names=tuple(names[position] for position in left), positions=tuple(left))


def describe_node(
    names: Sequence[str], setting: Setting, *, limit_bytes: int | None, num_threads: int
) -> Node:
    """Devices with memory and speed as they are now. CPU devices share the machine's memory, or
    what the owner allows of it, after the swarm's part. Raises MachineError for one that is not
    there.
    """
    devices = [choose_device(name) for name in names]
    is_cpu = devices[0].type == "cpu"
    host_bytes = estimate(Layout(dp=len(names)), setting).host_bytes
    total_bytes = host_memory_bytes()
    if limit_bytes is not None:
        total_bytes = min(total_bytes, limit_bytes)
    speed = _NOMINAL_FLOP_PER_SECOND
    if len(names) > 1:
        torch.set_num_threads(max(1, num_threads // len(names)) if is_cpu else num_threads)
        speed = measure_flop_per_second(devices[0])
    share = max(0, total_bytes - host_bytes) // len(names)
    bandwidth, latency = _CPU_LINK if is_cpu else _GPU_LINK
    return Node(
        devices=tuple(
            Device(
                name=str(device),
                memory_bytes=share if is_cpu else available_memory_bytes(device),
                flop_per_second=speed,
            )
            for device in devices
        ),
        link_bytes_per_second=bandwidth,
        link_latency_seconds=latency,
        host_memory_bytes=host_bytes if is_cpu else total_bytes,
        max_micro_batch_sequences=_MAX_SEQUENCES.get(devices[0].type, 8),
    )


def plan_for(spec: RunSpec, message: Message) -> tuple[Plan, tuple[int, ...]]:
    """(plan, positions of its devices among those lent). Raises MusterError."""
    lent = _Lent.from_message(message)
    shape = ModelShape.from_spec(spec.model)
    is_cpu = choose_device(lent.names[0]).type == "cpu"
    setting = Setting(
        shape=shape,
        num_state_vectors=len(spec.strategy.state_vectors),
        has_inner_optimizer=has_inner_optimizer(spec),
        moments_bytes=STATE_BYTES if spec.optimizer.name == "adamw8bit" else 2 * FP32_BYTES,
        is_cpu=is_cpu,
        activation_bytes=4 if is_cpu else 2,
    )
    node = describe_node(
        lent.names,
        setting,
        limit_bytes=message.get("memory_limit_bytes"),
        num_threads=message["num_threads"],
    )
    wish, note = _wish(message, num_devices=len(lent.names))
    plan = _chosen_plan(spec, message, setting, node, wish)
    if AUTO in lent.names:
        note = unused_gpu_note() + note
    return replace(plan, reason=note + plan.reason), lent.positions


def _chosen_plan(
    spec: RunSpec, message: Message, setting: Setting, node: Node, wish: LayoutWish
) -> Plan:
    """The planner's choice, or one device where ranks cannot do the work or would be slower."""

    def plan(wish: LayoutWish) -> Plan:
        return plan_layout(
            setting,
            node,
            wish,
            round_tokens=spec.strategy.global_batch_tokens,
            max_turn_sequences=message["max_micro_batch_sequences"],
        )

    if wish.has_axes or len(node.devices) == 1:
        return plan(wish)
    alone = replace(wish, dp=1, tp=1, pp=1, is_sharded=False)
    if spec.optimizer.name == "muon":
        return _because(plan(alone), "muon needs whole matrices")
    is_native_likely = message.get("execution", AUTO) in (AUTO, Execution.NATIVE)
    if not (node.is_cpu and is_native_likely):
        return plan(wish)
    try:
        return _because(
            plan(alone),
            "the model fits one, and ranks that share a CPU lack its faster native step",
        )
    except MachineError:  # it needs the memory of several
        return plan(wish)


def _because(plan: Plan, why: str) -> Plan:
    return replace(plan, reason=f"one device, for {why}: {plan.reason}")


def leader_position(message: Message) -> int:
    """Position of rank 0's device, or of the only one, among those that were lent."""
    return _Lent.from_message(message).positions[0]


def _wish(message: Message, *, num_devices: int) -> tuple[LayoutWish, str]:
    """What the owner asked for, as far as what is left allows; and what to say about that."""
    wish = parse_layout(message.get("layout") or AUTO)
    note = ""
    needed = (wish.dp or 1) * (wish.tp or 1) * (wish.pp or 1)
    if message.get("lost_devices") and needed > num_devices:
        are = "is" if num_devices == 1 else "are"
        note = f"{needed} devices were asked for and {num_devices} {are} left: "
        wish = replace(wish, dp=None, tp=None, pp=None, is_sharded=None, schedule=None)
    if message.get("saves_memory"):
        note += "memory was not enough, so activations are recomputed: "
        wish = replace(wish, has_checkpointing=True)
    return wish, note


def build_workbench(spec: RunSpec, message: Message, vectors: SharedVectors) -> Workbench:
    """Plan, then build. Raises MusterError, LocalRankError."""
    plan, positions = plan_for(spec, message)
    for line in plan.lines():
        _LOGGER.info("plan: %s", line)
    if plan.layout.num_ranks == 1:
        return _on_one_device(spec, message, vectors, plan)
    return _on_ranks(spec, message, vectors, plan, positions)


def _on_one_device(
    spec: RunSpec, message: Message, vectors: SharedVectors, plan: Plan
) -> Workbench:
    torch.set_num_threads(message["num_threads"])
    device = choose_device(plan.devices[0].name)
    model = Decoder(spec.model, device=device)
    model.has_checkpointing = plan.layout.has_checkpointing
    parameters = FlatParameters(model, device=device)
    step = MicroStep(model, parameters)
    bound = message["max_micro_batch_sequences"] or 0
    probe = set_up_step(
        step,
        wanted=message["execution"],
        cache_dir=Path(message["step_cache_path"]),
        bound=bound,
    )
    sequences = min(probe.micro_batch_sequences, bound or probe.micro_batch_sequences)
    return Workbench(
        step=step,
        strategy=flat_strategy(spec, model, parameters, vectors),
        layout=plan.layout,
        turn_sequences=sequences,
        turn_seconds=sequences * probe.sequence_seconds,
        least_turn_seconds=0.0,
        reason=f"{plan.reason}; {probe}",
        devices_text=str(device),
    )


def _on_ranks(
    spec: RunSpec,
    message: Message,
    vectors: SharedVectors,
    plan: Plan,
    positions: tuple[int, ...],
) -> Workbench:
    from peer.parallel.ranks import (
        LocalRanks,  # seconds of imports that one device need not wait for
    )

    layout = plan.layout
    _check_ranks_can(spec, message, layout)
    ranks = LocalRanks(layout.num_ranks, num_values=vectors.num_values, positions=positions)
    is_cpu = plan.devices[0].name == "cpu"
    num_threads = message["num_threads"]
    try:
        ranks.configure(
            spec.model,
            spec.optimizer,
            layout,
            devices=[device.name for device in plan.devices],
            num_threads=max(1, num_threads // layout.num_ranks) if is_cpu else num_threads,
            timeout_seconds=max(GROUP_TIMEOUT_SECONDS, _PATIENCE_TURNS * plan.turn_seconds),
        )
        step = NodeStep(spec.model, ranks)
        seconds, probe_reason = step.probe_precision(num_windows=layout.turn_sequences)
    except BaseException:
        ranks.close()
        raise
    return Workbench(
        step=step,
        strategy=build_strategy(spec, NodeInnerSteps(ranks), NodeParameters(ranks), vectors),
        layout=layout,
        turn_sequences=layout.turn_sequences,
        turn_seconds=seconds,
        least_turn_seconds=1.5 * ranks.timeout_seconds / _WATCHED_TURNS,
        reason=f"{plan.reason}; {probe_reason}",
        devices_text=f"{layout.num_ranks} x {plan.devices[0].name} {layout.text}",
    )


def _check_ranks_can(spec: RunSpec, message: Message, layout: Layout) -> None:
    """Raise MachineError for what only one device can do."""
    if spec.optimizer.name == "muon":
        raise MachineError(
            f"layout {layout.text} and optimizer.name = 'muon'",
            allowed="one device: muon needs whole matrices",
            remedy="join with one --device, or with one that holds the model",
        )
    if message["execution"] not in EXECUTIONS_OF_RANKS:
        raise MachineError(
            f"layout {layout.text} and execution {message['execution']}",
            allowed="auto or eager with several devices",
            remedy="leave out --execution, or join with one --device",
        )
