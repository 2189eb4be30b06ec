"""Pipeline parallel: a run of layers per stage, micro-batches through torch's schedules.

The last stage gives the summed loss itself, so what its successor would be never sees logits, and
gradients are sums: `scale_grads=False`, because torch would divide what earlier turns have added.
Inputs that are not activations (labels, masks) are looked up by the rows of a micro-batch, which
every stage knows; shapes are fixed, so a short batch is filled up with windows that predict
nothing.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage, schedules

from peer.model.decoder import Decoder
from peer.parallel.layout import Schedule
from peer.parallel.tensor import from_neighbour, local_part

_CLASSES: dict[Schedule, Any] = {
    Schedule.GPIPE: schedules.ScheduleGPipe,
    Schedule.ONE_F_ONE_B: schedules.Schedule1F1B,
    Schedule.INTERLEAVED: schedules.ScheduleInterleaved1F1B,
    Schedule.ZERO_BUBBLE: schedules.ScheduleZBVZeroBubble,
}


@dataclass(slots=True)
class Batch:
    """Windows of the turn under way, the same on every rank of a copy."""

    inputs_BT: Tensor
    labels_BT: Tensor
    weights_B: Tensor | None
    mask: Tensor | None

    def rows(self, rows_B: Tensor) -> "Batch":
        """Some of them."""
        mask = self.mask
        return Batch(
            self.inputs_BT[rows_B],
            self.labels_BT[rows_B],
            None if self.weights_B is None else self.weights_B[rows_B],
            mask if mask is None or mask.dim() == 2 else mask[rows_B],
        )


LossOf = Callable[[Tensor, Tensor, Batch], Tensor]
"""(normed stream, weight of the head, batch) -> summed loss in nats."""


class StageModule(nn.Module):
    """What torch's pipeline calls: tokens or the stream of the stage before, in; stream or loss,
    out.
    """

    def __init__(
        self,
        part: Decoder,
        batch: Callable[[], Batch],
        loss_of: LossOf,
        mesh: DeviceMesh | None,
        watched: Callable[[Batch], AbstractContextManager[None]],
    ) -> None:
        """`watched`: context of the forward pass of a micro-batch."""
        super().__init__()
        self.decoder = part
        self._batch, self._loss_of, self._mesh = batch, loss_of, mesh
        self._watched = watched

    def forward(self, x: Tensor, rows: Tensor) -> Tensor:
        """`x`: tokens_BT or the stream of the stage before; `rows` of the turn's windows."""
        batch = self._batch().rows(rows)
        with self._watched(batch):
            return self._forward(x, batch)

    def _forward(self, x: Tensor, batch: Batch) -> Tensor:
        decoder = self.decoder
        if decoder.part.is_first:
            x = decoder.tok_embeddings(x)
        elif self._mesh is not None:
            x = from_neighbour(x, self._mesh)
        x = decoder.run_layers(x, 0, batch.inputs_BT.shape[1], None, batch.mask)
        if decoder.part.is_last:
            return self._loss_of(decoder.norm(x), decoder.head_weight, batch)
        return x if self._mesh is None else local_part(x)


def build_schedule(
    modules: dict[int, StageModule],
    *,
    schedule: Schedule,
    num_stages: int,
    num_micro_batches: int,
    micro_batch_shape: tuple[int, int, int],
    tokens_len: int,
    group: dist.ProcessGroup,
    device: torch.device,
) -> Any:
    """A schedule for exactly `num_micro_batches`; `modules` are this rank's by stage index,
    `micro_batch_shape` (B, T of the stream, D), `tokens_len` T of the tokens.
    """
    B, T, D = micro_batch_shape
    tokens = torch.empty((B, tokens_len), dtype=torch.int64, device="meta")
    stream = torch.empty((B, T, D), device="meta", requires_grad=True)
    loss = torch.empty((), device="meta", requires_grad=True)
    stages = [
        PipelineStage(
            module,
            index,
            num_stages,
            device,
            input_args=tokens if index == 0 else stream,
            output_args=loss if index == num_stages - 1 else stream,
            group=group,
        )
        for index, module in modules.items()
    ]
    is_multi = schedule.stages_per_rank > 1
    return _CLASSES[schedule](
        stages if is_multi else stages[0],
        num_micro_batches,
        loss_fn=lambda output, _: output,
        scale_grads=False,
    )


def run_schedule(schedule: Any, modules: dict[int, StageModule], batch: Batch, last: int) -> float:
    """One forward and backward of all micro-batches; returns the loss if this rank has the last
    stage, else 0.
    """
    rows = torch.arange(batch.inputs_BT.shape[0])
    losses: list[Tensor] = []
    arguments = (batch.inputs_BT,) if 0 in modules else ()
    if last in modules:
        schedule.step(*arguments, rows=rows, target=rows, losses=losses, return_outputs=False)
    else:
        schedule.step(*arguments, rows=rows)
    return float(sum(loss.detach().double() for loss in losses)) if losses else 0.0
