"""Process groups of one node: one per axis of a layout, each with a finite time-out.

All groups are made by hand, because a group made by default waits half an hour for a rank that
hangs. They find each other through an anonymous file that all ranks inherit, so nothing listens for
strangers; names in it carry a generation, so that no address of processes that have ended is ever
read again.
"""

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore, PrefixStore, Store
from torch.distributed.device_mesh import DeviceMesh

from peer.parallel.layout import Layout, stages_of_rank


def open_store(fd: int) -> Store:
    """The store in an inherited memory file."""
    return FileStore(f"/proc/self/fd/{fd}", -1)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a local rank stands on the axes."""

    rank: int
    dp_rank: int
    pp_rank: int
    tp_rank: int

    @classmethod
    def of(cls, rank: int, layout: Layout) -> "Place":
        """The last axis counts fastest."""
        rest, tp_rank = divmod(rank, layout.tp)
        dp_rank, pp_rank = divmod(rest, layout.pp)
        return cls(rank, dp_rank, pp_rank, tp_rank)


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """This rank's group on each axis; None where the axis has one rank."""

    dp: dist.ProcessGroup | None
    pp: dist.ProcessGroup | None
    tp: dist.ProcessGroup | None
    embedding: dist.ProcessGroup | None
    """First and last stage, which hold a copy each of a tied embedding."""
    device_type: str

    def mesh(self, axis: str) -> DeviceMesh:
        """One-dimensional mesh of an axis that has several ranks."""
        group = getattr(self, axis)
        assert group is not None
        return DeviceMesh.from_group(group, self.device_type, mesh_dim_names=(axis,))


def _lines(layout: Layout, axis: str) -> list[list[int]]:
    """Ranks that differ in `axis` only."""
    grid = torch.arange(layout.num_ranks).view(layout.dp, layout.pp, layout.tp)
    position = {"dp": 0, "pp": 1, "tp": 2}[axis]
    lines: list[list[int]] = grid.movedim(position, 2).reshape(-1, grid.shape[position]).tolist()
    return lines


def open_groups(
    layout: Layout,
    *,
    rank: int,
    store: Store,
    generation: int,
    timeout_seconds: float,
    device_type: str,
) -> Groups:
    """Join the groups of `layout`; every rank calls this. RuntimeError after the time-out."""
    timeout = timedelta(seconds=timeout_seconds)
    backend = "gloo" if device_type == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(
        backend,
        store=PrefixStore(f"generation{generation}", store),
        rank=rank,
        world_size=layout.num_ranks,
        timeout=timeout,
    )

    def group_of_mine(lines: list[list[int]]) -> dist.ProcessGroup | None:
        mine = None
        for line in lines:
            if len(line) > 1:
                group = dist.new_group(line, timeout=timeout, backend=backend)
                mine = group if rank in line else mine
        return mine

    last = next(
        pp_rank
        for pp_rank in range(layout.pp)
        if layout.num_stages - 1 in stages_of_rank(layout, pp_rank)
    )
    ends = [[line[0], line[last]] for line in _lines(layout, "pp")] if last else []
    # Torch names groups by a counter, and DTensor remembers meshes by that name as long as the
    # process lives: tp comes first, so that its names are the same in every layout.
    tp = group_of_mine(_lines(layout, "tp"))
    return Groups(
        tp=tp,
        dp=group_of_mine(_lines(layout, "dp")),
        pp=group_of_mine(_lines(layout, "pp")),
        embedding=group_of_mine(ends),
        device_type=device_type,
    )


def close_groups() -> None:
    """Leave all groups."""
    if dist.is_initialized():
        dist.destroy_process_group()
