"""Shapes for a wanted N, and the memory that they need."""

import pytest

from coordinator.scaling.shapes import MemoryRule, choose_shape, largest_params
from protos.contract.model_shape import ModelShape
from protos.contract.run_spec import TINY_MODEL, ModelSpec


@pytest.mark.parametrize("params_n", [1.6e6, 1e7, 3.3e7, 1e8, 4e8, 1e9, 7e9, 6.7e10, 1e12])
def test_shapes_are_near_and_not_above(params_n: float) -> None:
    shape = choose_shape(params_n, vocab_size=4096 if params_n < 1e8 else 32_768, seq_len=1024)
    assert 0.9 * params_n <= shape.num_matmul_parameters <= params_n
    assert 30 <= shape.d_model / shape.num_layers <= 300
    assert shape.num_heads * shape.head_dim == shape.d_model
    ModelSpec.from_shape(shape)


def test_absurd_sizes_are_quick() -> None:
    shape = choose_shape(8.3e13, vocab_size=32_768, seq_len=1024)
    assert 0.9 * 8.3e13 <= shape.num_matmul_parameters <= 8.3e13


def test_the_tiny_preset_is_an_ordinary_shape() -> None:
    tiny = ModelShape.from_spec(TINY_MODEL)
    found = choose_shape(tiny.num_matmul_parameters * 1.001, vocab_size=4096, seq_len=256)
    assert (found.d_model, found.num_layers, found.d_ff) == (192, 2, 512)


def test_below_the_smallest_head_the_smallest_shape() -> None:
    shape = choose_shape(1e3, vocab_size=4096, seq_len=64)
    assert (shape.d_model, shape.num_layers) == (32, 1)


def test_memory_caps_n() -> None:
    rule = MemoryRule()
    caps = [
        largest_params(gib * 2**30, rule, vocab_size=32_768, seq_len=1024) for gib in (2, 8, 24)
    ]
    assert caps == sorted(caps) and caps[0] > 0
    shape = choose_shape(float(caps[1]), vocab_size=32_768, seq_len=1024)
    assert rule.needed_bytes(shape) <= 0.9 * 8 * 2**30
    assert largest_params(1e6, rule, vocab_size=32_768, seq_len=1024) == 0
    eight = largest_params(
        8 * 2**30, MemoryRule(bytes_per_parameter=8), vocab_size=32_768, seq_len=1024
    )
    assert eight > 1.5 * caps[1]
