"""How a model lies on the devices of one node, and which layouts a model cannot have. Pure.

Axes (the local rank counts them in this order, the last one fastest): dp copies of the model, each
on its own windows; pp stages of layers; tp shares of every matrix. `fsdp` in the place of dp shards
parameters, gradients and optimizer over the copies. Schedules are those of
torch.distributed.pipelining: GPipe (Huang et al. 2019), 1F1B (Narayanan et al. 2019), interleaved
(Narayanan et al. 2021), zero bubble (Qi et al. 2023).
"""

import re
from dataclasses import dataclass
from enum import StrEnum

from protos.contract.errors import UsageError
from protos.contract.model_shape import ModelShape
from protos.contract.text import counted

AUTO = "auto"
_PATTERN = re.compile(r"[a-z]+=[A-Za-z0-9-]+(,[a-z]+=[A-Za-z0-9-]+)*")
MAX_RANKS = 1024


class Schedule(StrEnum):
    """In which order a pipeline runs its micro-batches."""

    GPIPE = "gpipe"
    ONE_F_ONE_B = "1f1b"
    INTERLEAVED = "interleaved"
    ZERO_BUBBLE = "zero-bubble"

    @property
    def stages_per_rank(self) -> int:
        """Stages that a rank holds."""
        return 2 if self in (Schedule.INTERLEAVED, Schedule.ZERO_BUBBLE) else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """One way to lay a model out."""

    dp: int = 1
    """Copies of the model; windows are dealt among them."""
    tp: int = 1
    pp: int = 1
    is_sharded: bool = False
    """True: the copies share one set of parameters (FSDP)."""
    schedule: Schedule = Schedule.ONE_F_ONE_B
    has_checkpointing: bool = False
    micro_batch_sequences: int = 1
    """Windows of one forward pass of one copy."""
    num_micro_batches: int = 1
    """Forward passes of one turn; a pipeline needs several to be full."""

    @property
    def num_ranks(self) -> int:
        """Processes, one per device."""
        return self.dp * self.tp * self.pp

    @property
    def turn_sequences(self) -> int:
        """Most windows of one turn of the training loop."""
        return self.dp * self.micro_batch_sequences * self.num_micro_batches

    @property
    def num_stages(self) -> int:
        """Stages of the pipeline, those of one rank counted apart."""
        return self.pp * (self.schedule.stages_per_rank if self.pp > 1 else 1)

    @property
    def text(self) -> str:
        """For people, and as `--layout` takes it."""
        parts = []
        if self.dp > 1:
            parts.append(f"{'fsdp' if self.is_sharded else 'dp'}={self.dp}")
        parts += [f"{axis}={n}" for axis, n in (("pp", self.pp), ("tp", self.tp)) if n > 1]
        if self.pp > 1 and self.schedule is not Schedule.ONE_F_ONE_B:
            parts.append(f"schedule={self.schedule.value}")
        if self.has_checkpointing:
            parts.append("checkpointing=on")
        return ",".join(parts) or "one device"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutWish:
    """What the owner asked for; None: the planner decides."""

    dp: int | None = None
    tp: int | None = None
    pp: int | None = None
    is_sharded: bool | None = None
    schedule: Schedule | None = None
    has_checkpointing: bool | None = None
    micro_batch_sequences: int | None = None

    @property
    def has_axes(self) -> bool:
        """True if it says how the devices are used."""
        return any(axis is not None for axis in (self.dp, self.tp, self.pp))

    def layout(self) -> Layout:
        """The least that would grant it."""
        return Layout(
            dp=self.dp or 1,
            tp=self.tp or 1,
            pp=self.pp or 1,
            is_sharded=bool(self.is_sharded),
            schedule=self.schedule or Schedule.ONE_F_ONE_B,
            has_checkpointing=bool(self.has_checkpointing),
        )

    def require_devices(self, num_devices: int) -> None:
        """Raises UsageError if it takes more."""
        layout = self.layout()
        if layout.num_ranks > num_devices:
            raise UsageError(
                f"layout {layout.text} takes {layout.num_ranks} devices, "
                f"{num_devices} {'is' if num_devices == 1 else 'are'} lent",
                allowed=f"dp x tp x pp of at most {num_devices}, the number of --devices",
                remedy="leave --layout at auto, which uses what is lent as far as the model allows",
            )


def parse_layout(text: str) -> LayoutWish:
    """Read `auto` or `tp=2,pp=2,schedule=1f1b,checkpointing=on,micro=4`. Raises UsageError."""
    wish: dict[str, object] = {}
    text = text.strip().lower()
    if text == AUTO:
        return LayoutWish()
    if not _PATTERN.fullmatch(text):
        raise _unreadable(text, "it is not key=value, key=value")
    for part in text.split(","):
        key, value = part.split("=")
        if key in ("dp", "fsdp", "tp", "pp", "micro"):
            if not value.isdecimal() or not 1 <= int(value) <= MAX_RANKS:
                raise _unreadable(text, f"{key} is {value}")
            field = {"fsdp": "dp", "micro": "micro_batch_sequences"}.get(key, key)
            if field in wish:
                raise _unreadable(text, f"{key} says again what another key says")
            wish[field] = int(value)
            if key in ("dp", "fsdp"):
                wish["is_sharded"] = key == "fsdp"
        elif key == "schedule" and value in tuple(Schedule):
            wish["schedule"] = Schedule(value)
        elif key == "checkpointing" and value in ("on", "off"):
            wish["has_checkpointing"] = value == "on"
        else:
            raise _unreadable(text, f"{part} is unknown")
    if any(axis in wish for axis in ("dp", "tp", "pp")):
        wish = {"dp": 1, "tp": 1, "pp": 1, "is_sharded": False} | wish
    return LayoutWish(**wish)  # type: ignore[arg-type]


def _unreadable(text: str, why: str) -> UsageError:
    return UsageError(
        f"layout {text!r}: {why}",
        allowed="auto, or dp=N or fsdp=N, tp=N, pp=N, schedule="
        + "|".join(schedule.value for schedule in Schedule)
        + ", checkpointing=on|off, micro=N, joined by commas",
        remedy="write for example tp=2,pp=2",
    )


def device_names(text: str) -> list[str]:
    """torch's names of the devices in `--devices`: `cpu:2` are two shares of the CPU, `cuda:0,1`
    two GPUs; auto, cpu and cuda are one device.
    """
    kind, _, numbers = text.partition(":")
    if kind == "cpu" and numbers:
        return ["cpu"] * int(numbers)
    if numbers:
        return [f"{kind}:{number}" for number in numbers.split(",")]
    return [text]


def kv_heads_of_rank(shape: ModelShape, *, tp: int, tp_rank: int) -> tuple[int, ...]:
    """Key/value heads that a rank's query heads read: each once if equally many read it, else one
    for every query head.
    """
    group_heads = shape.num_heads // shape.num_kv_heads
    rank_heads = shape.num_heads // tp
    first = tp_rank * rank_heads
    read = [head // group_heads for head in range(first, first + rank_heads)]
    counts = {head: read.count(head) for head in read}
    return tuple(counts) if len(set(counts.values())) == 1 else tuple(read)


def has_replicated_kv(shape: ModelShape, *, tp: int) -> bool:
    """True if the key/value heads cannot be dealt to the ranks, so that each computes all."""
    return shape.num_kv_heads % tp != 0


def why_impossible(layout: Layout, shape: ModelShape) -> str:
    """Why this model cannot have this layout, with the numbers; "" if it can."""
    tp, pp = layout.tp, layout.pp
    if tp > 1:
        if shape.num_heads % tp:
            return f"tp={tp} does not divide {shape.num_heads} query heads"
        if shape.seq_len % tp:
            return f"tp={tp} does not divide the sequence length {shape.seq_len}"
        if shape.d_ff % tp:
            return f"tp={tp} does not divide d_ff {shape.d_ff}"
        if -(-shape.vocab_size // tp) * (tp - 1) >= shape.vocab_size:
            return f"tp={tp} leaves a rank without any of {shape.vocab_size} words"
    if layout.num_stages > shape.num_layers:
        return (
            f"{layout.num_stages} pipeline stages are more than "
            f"{counted(shape.num_layers, 'layer')}"
        )
    if layout.is_sharded and (tp > 1 or pp > 1):
        return "fsdp together with tp or pp is not built"
    is_v_shaped = pp > 1 and layout.schedule is Schedule.ZERO_BUBBLE
    if is_v_shaped and tp > 1:
        return "the zero-bubble schedule together with tp is not built"
    return ""


def require_possible(layout: Layout, shape: ModelShape) -> None:
    """Raises UsageError with what would be possible."""
    why = why_impossible(layout, shape)
    if not why:
        return
    raise UsageError(
        f"layout {layout.text}: {why}",
        allowed="tp that divides the query heads, the sequence length and d_ff; at most one stage "
        "of a pipeline per layer",
        remedy="choose another --layout, or leave it at auto",
    )


def stage_layers(num_layers: int, num_stages: int) -> tuple[tuple[int, int], ...]:
    """(begin, end) of each stage's layers: as even as can be, the first and last stage, which also
    hold embedding and head, never larger than the others.
    """
    sizes = [num_layers // num_stages] * num_stages
    middle_first = sorted(range(num_stages), key=lambda i: abs(i - (num_stages - 1) / 2))
    for index in middle_first[: num_layers % num_stages]:
        sizes[index] += 1
    begins = [sum(sizes[:index]) for index in range(num_stages)]
    return tuple((begin, begin + size) for begin, size in zip(begins, sizes, strict=True))


def stages_of_rank(layout: Layout, pp_rank: int) -> tuple[int, ...]:
    """Indices of the stages that a rank holds: looped for interleaved, V-shaped for zero bubble."""
    if layout.pp == 1 or layout.schedule.stages_per_rank == 1:
        return (pp_rank,)
    if layout.schedule is Schedule.ZERO_BUBBLE:
        return (pp_rank, layout.num_stages - 1 - pp_rank)
    return (pp_rank, pp_rank + layout.pp)
