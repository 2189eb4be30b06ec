"""Between a rank's shards and the node's canonical flat fp32 vector.

All ranks of a node share memory with their leader, so nothing is sent: each rank copies its parts,
parameter by parameter, between its tensors and their places in the vector. What lies on several
ranks is written by the first of them. There is no temporary but one that moves a part off an
accelerator.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from protos.contract.digest import Float32Vector
from protos.contract.model_shape import ModelShape


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A rank's part of one parameter."""

    name: str
    begin: tuple[int, ...]
    """Where it begins in the whole parameter."""
    size: tuple[int, ...]
    is_owned: bool
    """True on the one rank that writes it into the vector."""


class CanonicalVector:
    """The vector as tensors by name and part."""

    def __init__(self, shape: ModelShape, values: Float32Vector) -> None:
        """`values` are those of all parameters in the order of the table."""
        self._view_by_name: dict[str, Tensor] = {}
        flat = torch.from_numpy(values)
        offset = 0
        for name, dimensions in shape.parameter_table():
            end = offset + math.prod(dimensions)
            self._view_by_name[name] = flat[offset:end].view(dimensions)
            offset = end
        assert offset == values.size

    def part(self, piece: Piece) -> Tensor:
        """The place of a part."""
        view = self._view_by_name[piece.name]
        for dim, (begin, length) in enumerate(zip(piece.begin, piece.size, strict=True)):
            view = view.narrow(dim, begin, length)
        return view


@torch.no_grad()
def scatter(vector: CanonicalVector, pieces: Iterable[tuple[Piece, Tensor]]) -> None:
    """Copy the vector into local tensors."""
    for piece, local in pieces:
        if local.numel():
            local.copy_(vector.part(piece))


@torch.no_grad()
def collect(vector: CanonicalVector, pieces: Iterable[tuple[Piece, Tensor]]) -> None:
    """Copy what this rank owns into the vector."""
    for piece, local in pieces:
        if piece.is_owned and local.numel():
            vector.part(piece).copy_(local)
