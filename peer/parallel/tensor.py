"""Tensor parallel: every matrix cut over the ranks of the tp axis, with sequence parallel between
the layers and the loss computed on shares of the vocabulary (Shoeybi et al. 2019, Korthikanti et
al. 2022). Parameters are DTensors; hooks on the model's modules move the activations.

- embedding and head: rows (words); the vocabulary need not divide.
- wq, w1, w3, and wk, wv: rows (heads, MLP width). If the key/value heads cannot be dealt to the
  ranks, wk and wv are whole on each, which uses the heads that its queries read; gradients add up.
- wo, w2: columns; their partial sums are scattered over the sequence.
- norms: whole, on a shard of the sequence, so their gradients are partial sums too.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from peer.model.decoder import Decoder, Layer
from peer.model.loss import pieced_loss
from peer.parallel.layout import has_replicated_kv, kv_heads_of_rank
from protos.contract.model_shape import ModelShape

ROWS, COLUMNS, WHOLE = Shard(0), Shard(1), Replicate()
SEQUENCE = Shard(1)
"""Of activations_BTD."""


def weight_placement(name: str, shape: ModelShape, *, tp: int) -> Placement:
    """How a parameter of ModelShape.parameter_table() lies on the tp axis."""
    kind = name.split(".")[-2]
    if kind in ("wo", "w2"):
        return COLUMNS
    if kind.endswith("norm") or (kind in ("wk", "wv") and has_replicated_kv(shape, tp=tp)):
        return WHOLE
    return ROWS


def local_extent(
    dimensions: tuple[int, ...], mesh: DeviceMesh, placement: Placement
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(shape of this rank's part, where it begins in the whole)."""
    size, offset = compute_local_shape_and_global_offset(torch.Size(dimensions), mesh, [placement])
    return tuple(size), tuple(offset)


def distributed_parameter(
    dimensions: tuple[int, ...], mesh: DeviceMesh, placement: Placement, device: torch.device
) -> nn.Parameter:
    """A zeroed DTensor parameter; no rank ever holds the whole."""
    size, _ = local_extent(dimensions, mesh, placement)
    whole = torch.empty(dimensions, device="meta")
    local = torch.zeros(size, device=device)
    return nn.Parameter(
        DTensor.from_local(
            local, mesh, [placement], run_check=False, shape=whole.shape, stride=whole.stride()
        )
    )


def add_hooks(part: Decoder, mesh: DeviceMesh) -> None:
    """Make a decoder whose parameters are distributed compute in tensor parallel."""
    shape = ModelShape.from_spec(part.spec)
    if part.part.is_first:
        part.tok_embeddings.register_forward_pre_hook(
            lambda _, args: (DTensor.from_local(args[0], mesh, [WHOLE], run_check=False),)
        )
        part.tok_embeddings.register_forward_hook(_to_sequence)
    for layer in part.layers.values():
        assert isinstance(layer, Layer)
        for block in (layer.attention, layer.mlp):
            block.register_forward_pre_hook(_gather)
        attention = layer.attention
        attention.wq.register_forward_hook(_to_local)
        kv_hook = _kv_hook(shape, mesh)
        attention.wk.register_forward_hook(kv_hook)
        attention.wv.register_forward_hook(kv_hook)
        attention.wo.register_forward_pre_hook(
            lambda _, args: (DTensor.from_local(args[0], mesh, [Shard(2)], run_check=False),)
        )
        attention.wo.register_forward_hook(_to_sequence)
        layer.mlp.w2.register_forward_hook(_to_sequence)


def from_neighbour(x_BTD: Tensor, mesh: DeviceMesh) -> Tensor:
    """A stage's input, a shard of the sequence, as DTensor."""
    return DTensor.from_local(x_BTD, mesh, [SEQUENCE], run_check=False)


def local_part(x: Tensor) -> Tensor:
    """This rank's share of a distributed tensor."""
    assert isinstance(x, DTensor)
    return x.to_local()


@dataclass(frozen=True, slots=True)
class _Words:
    """VocabularyShare of a process group."""

    begin: int
    group: dist.ProcessGroup

    def combined(self, total_N: Tensor, picked_N: Tensor) -> tuple[Tensor, Tensor]:
        """Two messages: the highest sums, then what is left of all."""
        highest_N = total_N.clone()
        dist.all_reduce(highest_N, dist.ReduceOp.MAX, group=self.group)
        sums = torch.stack(((total_N - highest_N).exp(), picked_N))
        dist.all_reduce(sums, group=self.group)
        return highest_N + sums[0].log(), sums[1]


def vocabulary_loss(
    hidden_BTD: DTensor, weight_VD: DTensor, labels_BT: Tensor, weights_B: Tensor | None
) -> Tensor:
    """Summed loss of the head's words on all ranks, the same on each; no rank has all logits."""
    mesh = weight_VD.device_mesh
    _, (begin, _) = local_extent(tuple(weight_VD.shape), mesh, ROWS)
    whole_BTD = hidden_BTD.redistribute(placements=[WHOLE]).to_local(grad_placements=[Partial()])
    words = _Words(begin, mesh.get_group())
    return pieced_loss(whole_BTD, weight_VD.to_local(), labels_BT, weights_B, words)


def _gather(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0].redistribute(placements=[WHOLE]), *args[1:])


def _to_sequence(_: nn.Module, __: Any, output: DTensor) -> DTensor:
    return output.redistribute(placements=[SEQUENCE])


def _to_local(_: nn.Module, __: Any, output: DTensor) -> Tensor:
    return output.to_local()


def _kv_hook(shape: ModelShape, mesh: DeviceMesh) -> Any:
    if not has_replicated_kv(shape, tp=mesh.size()):
        return _to_local
    heads = kv_heads_of_rank(shape, tp=mesh.size(), tp_rank=mesh.get_local_rank())
    width = shape.head_dim
    columns = torch.cat([torch.arange(head * width, (head + 1) * width) for head in heads])

    def own_heads(_: nn.Module, __: Any, output: DTensor) -> Tensor:
        # Each rank reads other heads, so what comes back is a partial sum.
        whole: Tensor = output.to_local(grad_placements=[Partial()])
        return whole.index_select(-1, columns.to(whole.device))

    return own_heads
