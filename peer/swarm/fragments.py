"""Fragments: the parts of the canonical vector that take turns, one per outer step (Streaming
DiLoCo, Douillard et al. 2025, arXiv 2501.18512, section 2.2).

A model is cut into units in the order of its forward pass: the embedding, each layer, the head with
the last norm (a tied head is the embedding, and the last norm then goes with the last layer).
`strided` puts unit i into fragment i mod P, so that every fragment holds layers from all depths;
`sequential` cuts the units into P runs of about equal size. Outer step n syncs fragment (n - 1) mod
P. The fragment's values travel as one packed vector, in canonical order. Pure arithmetic from the
spec, hence the same on every member; with one fragment the packed vector is the whole one.
"""

import math
from dataclasses import dataclass

from protos.contract.digest import Float32Vector
from protos.contract.model_shape import ModelShape
from protos.contract.run_spec import RunSpec


@dataclass(frozen=True, slots=True)
class Fragment:
    """Some values of the canonical vector."""

    runs: tuple[tuple[int, int], ...]
    """(begin, end), rising, never touching."""

    @property
    def num_values(self) -> int:
        """Length of the packed vector."""
        return sum(end - begin for begin, end in self.runs)

    def pack(self, vector: Float32Vector, packed: Float32Vector) -> None:
        """Copy the fragment's values out of a canonical vector."""
        offset = 0
        for begin, end in self.runs:
            packed[offset : offset + end - begin] = vector[begin:end]
            offset += end - begin

    def unpack(self, packed: Float32Vector, vector: Float32Vector) -> None:
        """Copy packed values back to their places in a canonical vector."""
        offset = 0
        for begin, end in self.runs:
            vector[begin:end] = packed[offset : offset + end - begin]
            offset += end - begin


class FragmentPlan:
    """All fragments of a run."""

    def __init__(self, spec: RunSpec) -> None:
        """Cut as the spec's strategy says; `sync` has one fragment."""
        strategy = spec.strategy
        units = _units(ModelShape.from_spec(spec.model))
        num_fragments = strategy.num_fragments
        assert num_fragments <= len(units), "RunSpec has checked it"
        if strategy.fragment_order == "strided":
            index_of_unit = [index % num_fragments for index in range(len(units))]
        else:
            index_of_unit = _balanced_runs([end - begin for begin, end in units], num_fragments)
        by_fragment: list[list[tuple[int, int]]] = [[] for _ in range(num_fragments)]
        for unit, index in zip(units, index_of_unit, strict=True):
            by_fragment[index].append(unit)
        self.fragments = tuple(Fragment(_joined(runs)) for runs in by_fragment)

    def of_outer_step(self, outer_step: int) -> Fragment:
        """The fragment that outer step `outer_step` (from 1) syncs."""
        assert outer_step >= 1
        return self.fragments[(outer_step - 1) % len(self.fragments)]

    def others_at(self, outer_step: int) -> Fragment:
        """All values that outer step `outer_step` does not sync, in canonical order."""
        own = self.of_outer_step(outer_step)
        others = [f.runs for f in self.fragments if f is not own]
        return Fragment(_joined(sorted(run for runs in others for run in runs)))


def _units(shape: ModelShape) -> list[tuple[int, int]]:
    """(begin, end) of each unit of the canonical vector, in order."""
    ends: list[int] = []
    last_name, offset = "", 0
    for name, dimensions in shape.parameter_table():
        unit = ".".join(name.split(".")[:2]) if name.startswith("layers.") else "head"
        if name.startswith(("tok_embeddings", "pos_embeddings")):
            unit = "embedding"
        if unit == "head" and shape.has_tied_embeddings:
            unit = last_name
        offset += math.prod(dimensions)
        if unit == last_name:
            ends[-1] = offset
        else:
            ends.append(offset)
        last_name = unit
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _balanced_runs(sizes: list[int], num_runs: int) -> list[int]:
    """Run of each unit: in order, none empty, the largest as small as can be (ties: early runs
    small).
    """
    num_units = len(sizes)
    best: dict[tuple[int, int], tuple[int, int]] = {(num_units, 0): (0, num_units)}
    for begin in range(num_units - 1, -1, -1):
        for runs in range(1, num_runs + 1):
            choices = [
                (max(sum(sizes[begin:end]), best[end, runs - 1][0]), end)
                for end in range(begin + 1, num_units + 1)
                if (end, runs - 1) in best
            ]
            if choices:
                best[begin, runs] = min(choices)
    index_of_unit: list[int] = []
    begin = 0
    for run in range(num_runs):
        end = best[begin, num_runs - run][1]
        index_of_unit += [run] * (end - begin)
        begin = end
    return index_of_unit


def _joined(units: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Units as runs, neighbours joined."""
    runs: list[tuple[int, int]] = []
    for begin, end in units:
        if runs and runs[-1][1] == begin:
            runs[-1] = (runs[-1][0], end)
        else:
            runs.append((begin, end))
    return tuple(runs)
