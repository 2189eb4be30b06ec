"""Initial values: pinned bits, keyed by name and seed, right spread, no torch."""

import hashlib
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from peer.model.init import fill_normal, initial_vector, parameter_std
from protos.contract.model_shape import ModelShape
from tests.peer.model.tiny import SPEC

GOLDEN_DIGEST = "188c8f5dadf99826ea315a46c02784ab81ea506b3575acc9cf7e95f1023ea440"
"""Changes only with the rule, and then PROTOCOL_VERSION rises."""


def test_bits_are_pinned() -> None:
    assert hashlib.sha256(initial_vector(SPEC).tobytes()).hexdigest() == GOLDEN_DIGEST


def test_seed_and_name_decide() -> None:
    values = [np.empty(64, dtype=np.float32) for _ in range(4)]
    fill_normal(values[0], seed=1, name="a", std=1.0)
    fill_normal(values[1], seed=1, name="a", std=1.0)
    fill_normal(values[2], seed=2, name="a", std=1.0)
    fill_normal(values[3], seed=1, name="b", std=1.0)
    assert np.array_equal(values[0], values[1])
    assert not np.array_equal(values[0], values[2])
    assert not np.array_equal(values[0], values[3])


def test_values_do_not_depend_on_the_length_of_the_vector() -> None:
    long, short = np.empty(2**20 + 10, dtype=np.float32), np.empty(100, dtype=np.float32)
    fill_normal(long, seed=1, name="a", std=1.0)
    fill_normal(short, seed=1, name="a", std=1.0)
    assert np.array_equal(long[:100], short)


def test_mean_and_spread() -> None:
    values = np.empty(400_000, dtype=np.float32)
    fill_normal(values, seed=3, name="x", std=0.5)
    assert abs(values.mean()) < 0.005
    assert values.std() == pytest.approx(0.5, rel=0.01)
    assert abs(values).max() < 0.5 * 3.47


def test_gains_are_ones_and_matrices_have_their_std() -> None:
    spec = replace(SPEC, model=replace(SPEC.model, d_model=192, d_ff=256, vocab_size=999))
    vector, offset = initial_vector(spec), 0
    for name, shape in ModelShape.from_spec(spec.model).parameter_table():
        size = int(np.prod(shape))
        part = vector[offset : offset + size]
        if len(shape) == 1:
            assert (part == 1.0).all()
        else:
            std = parameter_std(name, shape, has_tied_embeddings=True)
            assert part.std() == pytest.approx(std, rel=0.05), name
        offset += size
    assert offset == vector.size


def test_neither_init_nor_update_imports_torch() -> None:
    code = "import sys, peer.model.init, peer.swarm.exact_update; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
