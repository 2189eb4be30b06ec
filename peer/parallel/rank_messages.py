"""What a node's leader and its other ranks say to each other, as plain data for peer/ipc.py."""

import dataclasses
from typing import Any

import numpy as np

from peer.model.objectives import Examples
from peer.parallel.layout import Layout, Schedule
from protos.contract.run_spec import ModelSpec, OptimizerSpec

PlainData = dict[str, Any]


def plain_examples(examples: Examples) -> PlainData:
    """Arrays as bytes."""
    return {
        name: {"dtype": value.dtype.str, "shape": list(value.shape), "data": value.tobytes()}
        for name in Examples.__slots__
        if (value := getattr(examples, name)) is not None
    }


def examples_from(plain: PlainData) -> Examples:
    """Inverse of plain_examples."""
    arrays = {
        name: np.frombuffer(value["data"], dtype=value["dtype"]).reshape(value["shape"]).copy()
        for name, value in plain.items()
    }
    return Examples(**arrays)


def plain_layout(layout: Layout) -> PlainData:
    """Fields by name."""
    return dataclasses.asdict(layout)


def layout_from(plain: PlainData) -> Layout:
    """Inverse of plain_layout."""
    return Layout(**plain | {"schedule": Schedule(plain["schedule"])})


def plain_specs(model: ModelSpec, optimizer: OptimizerSpec) -> PlainData:
    """What a rank needs of the run."""
    return {"model": dataclasses.asdict(model), "optimizer": dataclasses.asdict(optimizer)}


def specs_from(plain: PlainData) -> tuple[ModelSpec, OptimizerSpec]:
    """Inverse of plain_specs."""
    return ModelSpec(**plain["model"]), OptimizerSpec(**plain["optimizer"])
