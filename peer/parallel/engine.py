"""One local rank's share of the model: memory, forward and backward, gradients made whole, inner
steps.

Gradients add up in place over the turns of a contribution; `finish` then makes them whole: partial
sums over the tp axis, both copies of a tied embedding, copies of the model over the dp axis. After
that every gradient lies as its parameter does, and `zero` comes before the next turn.
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from peer.model.decoder import Decoder, DecoderPart
from peer.model.inner_optimizer import InnerOptimizer
from peer.model.loss import examples_on, head_loss
from peer.model.objectives import IGNORED, Examples
from peer.model.probe import LayerProbe, Sums, gradient_sums
from peer.parallel.bridge import CanonicalVector, Piece, collect, scatter
from peer.parallel.layout import Layout, Schedule, stage_layers, stages_of_rank
from peer.parallel.mesh import Groups, Place
from peer.parallel.pipeline import Batch, StageModule, build_schedule, run_schedule
from peer.parallel.tensor import (
    WHOLE,
    add_hooks,
    distributed_parameter,
    local_extent,
    vocabulary_loss,
    weight_placement,
)
from protos.contract.model_shape import ModelShape
from protos.contract.run_spec import ModelSpec, OptimizerSpec

_EMBEDDING = "tok_embeddings.weight"


@dataclass(slots=True)
class _Held:
    """A parameter of this rank and where it belongs."""

    piece: Piece
    parameter: nn.Parameter
    stage: int

    @property
    def values(self) -> Tensor:
        """This rank's part, the very memory."""
        return _local(self.parameter.detach())

    @property
    def grad(self) -> Tensor:
        """This rank's part of the gradient; zeros if there is none."""
        grad = self.parameter.grad
        return torch.zeros_like(self.values) if grad is None else _local(grad)


class RankEngine:
    """The model as one rank of a layout holds it."""

    def __init__(
        self, spec: ModelSpec, layout: Layout, *, rank: int, groups: Groups, device: torch.device
    ) -> None:
        """Build this rank's stages, zeroed; every rank of the node does the same."""
        self.spec, self.layout, self.device = spec, layout, device
        self.place = Place.of(rank, layout)
        self.is_bf16 = False
        self._groups = groups
        self._shape = ModelShape.from_spec(spec)
        self._mesh = groups.mesh("tp") if layout.tp > 1 else None
        bounds = stage_layers(spec.num_layers, layout.num_stages)
        self.parts = {
            stage: self._build(DecoderPart(*bounds[stage], spec.num_layers))
            for stage in stages_of_rank(layout, self.place.pp_rank)
        }
        self._held = list(self._hold())
        self._last = layout.num_stages - 1
        self._batch: Batch | None = None
        self._modules = {
            stage: StageModule(part, self._current_batch, _loss_of, self._mesh, self._watched)
            for stage, part in self.parts.items()
        }
        self._schedule_by_shape: dict[tuple[int, int], object] = {}
        self._optimizer: InnerOptimizer | None = None
        self._is_finished = self._is_tied_summed = False
        self._probe: LayerProbe | None = None
        self.layer_sums: tuple[dict[str, Sums], dict[str, Sums]] = {}, {}
        """(activations, gradients) of this rank's parts in the last turn that was watched."""

    # Memory.

    def _build(self, part: DecoderPart) -> Decoder:
        decoder = Decoder(self.spec, device=self.device, part=part)
        decoder.has_checkpointing = self.layout.has_checkpointing
        if self.layout.is_sharded:
            mesh = self._groups.mesh("dp")
            for module in (*decoder.layers.values(), decoder):
                sharded = fully_shard(module, mesh=mesh)
                sharded.set_gradient_divide_factor(1.0)
                sharded.set_force_sum_reduction_for_comms(True)  # all that gloo has
            decoder.to_empty(device=self.device)
            return decoder
        for name, parameter in list(decoder.named_parameters()):
            dimensions = tuple(parameter.shape)
            if self._mesh is None:
                memory = nn.Parameter(torch.zeros(dimensions, device=self.device))
            else:
                placement = weight_placement(name, self._shape, tp=self.layout.tp)
                memory = distributed_parameter(dimensions, self._mesh, placement, self.device)
            decoder.get_submodule(name.removesuffix(".weight")).weight = memory
        if self._mesh is not None:
            add_hooks(decoder, self._mesh)
        return decoder

    def _hold(self) -> Iterator[_Held]:
        for stage, part in self.parts.items():
            for name, parameter in part.named_parameters():
                yield _Held(self._piece(name, parameter, stage), parameter, stage)

    def _piece(self, name: str, parameter: nn.Parameter, stage: int) -> Piece:
        begin, size = (0,) * parameter.ndim, tuple(parameter.shape)
        is_owned = self.layout.is_sharded or self.place.dp_rank == 0
        if isinstance(parameter, DTensor):
            (placement,) = parameter.placements
            size, begin = local_extent(size, parameter.device_mesh, placement)
            is_owned = is_owned and (placement != WHOLE or self.place.tp_rank == 0)
        is_second_copy = name == _EMBEDDING and stage > 0
        return Piece(name=name, begin=begin, size=size, is_owned=is_owned and not is_second_copy)

    @property
    def num_values(self) -> int:
        """Parameters that this rank holds."""
        return sum(held.values.numel() for held in self._held)

    # Bridge.

    def load(self, vector: CanonicalVector) -> None:
        """Take parameters from the canonical vector."""
        scatter(vector, ((held.piece, held.values) for held in self._held))

    def store(self, vector: CanonicalVector) -> None:
        """Write the parameters that this rank owns into the canonical vector."""
        collect(vector, ((held.piece, held.values) for held in self._held))

    def store_grads(self, vector: CanonicalVector) -> None:
        """Write whole gradients into the canonical vector. Two copies of a tied embedding are added
        up there, which takes one pass over shared memory instead of a message each way.
        """
        are_apart = len(self._tied()) == 1 and not (self._is_finished and self._is_tied_summed)
        self.finish(sums_tied=not are_apart)
        collect(vector, ((held.piece, held.grad) for held in self._held))
        if not are_apart:
            return
        dist.all_reduce(torch.zeros(1), group=self._groups.embedding)  # the first has written
        (copy,) = self._tied()
        if copy.stage > 0 and self.place.dp_rank == 0:
            vector.part(copy.piece).add_(copy.grad.cpu())

    # Forward and backward.

    def _current_batch(self) -> Batch:
        assert self._batch is not None
        return self._batch

    def watch(self, examples: Examples) -> tuple[float, bool]:
        """`run`, for `layer_sums` too; the gradients before must be zero. Every rank does the same.
        They are made whole one by one for it, beside those that add up, which stay as they are.
        """
        with LayerProbe(*self.parts.values(), looks_always=False) as self._probe:
            result = self.run(examples)
        grads = ((piece.name, grad) for piece, grad in self._whole_grads() if piece.is_owned)
        self.layer_sums = self._probe.activations, gradient_sums(grads)
        self._probe = None
        return result

    def _watched(self, batch: Batch) -> AbstractContextManager[None]:
        if self._probe is None:
            return nullcontext()
        return self._probe.looking_at((batch.labels_BT != IGNORED).any(dim=1))  # without padding

    def run(self, examples: Examples) -> tuple[float, bool]:
        """Forward and backward of this copy's windows; returns (summed loss in nats if this is the
        rank that counts it, else 0; True if loss and gradients here are finite).
        """
        assert not self._is_finished, "gradients are whole; zero them first"
        nats = 0.0
        if examples.inputs_BT.shape[0]:
            self._batch = Batch(*examples_on(examples, self.device))
            kind = self.device.type
            with torch.autocast(kind, dtype=torch.bfloat16, enabled=self.is_bf16):
                nats = self._run_batch(self._batch)
            self._batch = None
        is_finite = math.isfinite(nats) and self._are_grads_finite()
        return (nats if self.place.tp_rank == 0 else 0.0), is_finite

    def _run_batch(self, batch: Batch) -> float:
        size = self.layout.micro_batch_sequences
        num_windows, T = batch.inputs_BT.shape
        if self.layout.pp > 1:
            count, size = micro_batches(self.layout, num_windows)
            assert count * size == num_windows
            schedule = self._schedule(count, size, T)
            return run_schedule(schedule, self._modules, batch, self._last)
        (part,) = self.parts.values()
        nats = 0.0
        for begin in range(0, num_windows, size):
            rows = torch.arange(begin, min(begin + size, num_windows))
            micro = batch.rows(rows)
            with self._watched(micro):
                loss = part(micro.inputs_BT, mask=micro.mask, head=partial(_loss_of, batch=micro))
            nats += float(loss.detach())
            with torch.autocast(self.device.type, enabled=False):
                loss.backward()  # also if not finite: sharded parameters are let go of by it
        return nats

    def _schedule(self, num_micro_batches: int, num_windows: int, seq_len: int) -> object:
        key = num_micro_batches, num_windows
        if key not in self._schedule_by_shape:
            assert self._groups.pp is not None
            self._schedule_by_shape[key] = build_schedule(
                self._modules,
                schedule=self.layout.schedule,
                num_stages=self.layout.num_stages,
                num_micro_batches=num_micro_batches,
                micro_batch_shape=(
                    num_windows,
                    seq_len // self.layout.tp,
                    self.spec.d_model,
                ),
                tokens_len=seq_len,
                group=self._groups.pp,
                device=self.device,
            )
        return self._schedule_by_shape[key]

    @torch.no_grad()
    def _are_grads_finite(self) -> bool:
        total = sum(float(held.grad.sum()) for held in self._held)
        return math.isfinite(total)

    # Gradients.

    def zero(self) -> None:
        """Forget all gradients."""
        self._is_finished = False
        for held in self._held:
            held.parameter.grad = None

    @torch.no_grad()
    def finish(self, *, sums_tied: bool = True) -> None:
        """Make gradients whole, once; every rank calls this between the last turn and `zero`.
        Without `sums_tied` the copies of a tied embedding keep their own for now.
        """
        if not self._is_finished:
            self._is_finished, self._is_tied_summed = True, False
            self._make_whole()
        if sums_tied and not self._is_tied_summed:
            self._is_tied_summed = True
            self._sum_tied()

    def _make_whole(self) -> None:
        for held in self._held:
            held.parameter.grad = _placed_grad(held.parameter)
        if self._groups.dp is not None and not self.layout.is_sharded:
            for held in self._held:
                dist.all_reduce(held.grad, group=self._groups.dp)

    @torch.no_grad()
    def _whole_grads(self) -> Iterator[tuple[Piece, Tensor]]:
        """Copies of the gradients as `finish` would make them, one after the other."""

        def whole(held: _Held) -> Tensor:
            grad = _local(_placed_grad(held.parameter)).clone()
            if self._groups.dp is not None and not self.layout.is_sharded:
                dist.all_reduce(grad, group=self._groups.dp)
            return grad

        copies = self._tied()
        for held in self._held:
            if held.piece.name != _EMBEDDING or not copies:
                yield held.piece, whole(held)
            elif len(copies) == 1:
                grad = whole(held)
                dist.all_reduce(grad, group=self._groups.embedding)
                yield held.piece, grad
            else:
                yield held.piece, whole(copies[0]) + whole(copies[1])

    def _tied(self) -> list[_Held]:
        """This rank's copies of an embedding that several stages hold."""
        if not self.spec.has_tied_embeddings or self.layout.num_stages == 1:
            return []
        return [held for held in self._held if held.piece.name == _EMBEDDING]

    def _sum_tied(self) -> None:
        copies = self._tied()
        if len(copies) == 2:  # V-shaped: both on this rank
            total = copies[0].grad + copies[1].grad
            for held in copies:
                held.grad.copy_(total)
        elif copies:
            dist.all_reduce(copies[0].grad, group=self._groups.embedding)

    @torch.no_grad()
    def grad_norm(self) -> float:
        """Norm of the finished gradient of the whole model: sums of squares in fp64, every
        parameter once. All ranks get the same.
        """
        owned = [held.grad for held in self._held if held.piece.is_owned]
        squares = torch.stack([grad.double().square().sum().cpu() for grad in owned] or
                              [torch.zeros((), dtype=torch.float64)]).sum()  # fmt: skip
        if self.layout.num_ranks > 1:
            dist.all_reduce(squares)
        return math.sqrt(float(squares))

    @torch.no_grad()
    def inner_step(self, spec: OptimizerSpec, *, num_tokens: int, learning_rate: float) -> None:
        """Divide the gradient by its tokens, clip its norm, one step; `zero` is included."""
        self.finish()
        norm = self.grad_norm() / num_tokens
        factor = min(1.0, spec.clip_norm / (norm + 1e-6)) / num_tokens
        if self._optimizer is None:
            self._locals = [nn.Parameter(held.values) for held in self._held]
            names = (held.piece.name for held in self._held)
            self._optimizer = InnerOptimizer(spec, list(zip(names, self._locals, strict=True)))
        for held, local in zip(self._held, self._locals, strict=True):
            local.grad = held.grad.mul_(factor)
        self._optimizer.step(lr=learning_rate)
        for local in self._locals:
            local.grad = None
        self.zero()


def _placed_grad(parameter: nn.Parameter) -> Tensor:
    """Gradient, zeros if there is none, that lies as its parameter does; partial sums are added."""
    grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    if isinstance(grad, DTensor) and isinstance(parameter, DTensor):
        grad = grad.redistribute(placements=parameter.placements)
    return grad


def _local(tensor: Tensor) -> Tensor:
    """This rank's part; of a DTensor the very memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _loss_of(hidden_BTD: Tensor, weight_VD: Tensor, batch: Batch) -> Tensor:
    if isinstance(hidden_BTD, DTensor):
        assert isinstance(weight_VD, DTensor), "both are dealt out, or neither"
        return vocabulary_loss(hidden_BTD, weight_VD, batch.labels_BT, batch.weights_B)
    return head_loss(hidden_BTD, weight_VD, batch.labels_BT, batch.weights_B)


def micro_batches(layout: Layout, num_windows: int) -> tuple[int, int]:
    """(micro-batches, windows of each) in which a pipeline trains `num_windows`, padding included:
    at least one micro-batch per stage, smaller ones when there are few windows.
    """
    is_interleaved = layout.schedule is Schedule.INTERLEAVED
    least = layout.pp if is_interleaved else layout.num_stages
    if num_windows <= least * layout.micro_batch_sequences:
        return least, max(1, -(-num_windows // least))
    count = -(-num_windows // layout.micro_batch_sequences)
    if is_interleaved:  # torch wants a multiple of the ranks
        count = -(-count // layout.pp) * layout.pp
    return count, layout.micro_batch_sequences


def needed_windows(layout: Layout, num_windows: int) -> int:
    """Windows of each copy of the model in a turn of `num_windows`, padding included: pipelines
    need whole micro-batches; sharded copies run in step.
    """
    per_copy = -(-num_windows // layout.dp)
    if layout.pp == 1:
        return per_copy
    count, size = micro_batches(layout, per_copy)
    return count * size


def deal(examples: Examples, layout: Layout) -> list[Examples]:
    """The windows of a turn, one share for each copy of the model."""
    num_windows = examples.inputs_BT.shape[0]
    size = needed_windows(layout, num_windows)
    shares = []
    for copy in range(layout.dp):
        share = examples.select(slice(copy * size, min((copy + 1) * size, num_windows)))
        needs_padding = layout.pp > 1 or layout.is_sharded
        shares.append(share.padded_to(size) if needs_padding else share)
    return shares
