"""Initial parameters: a pure function of (seed, parameter name, shape), the same bits on every
machine.

Philox is keyed by SHA-256 of seed and name, so a value depends neither on the order of construction
nor on the layout, and any process can build it without torch (whose RNG differs between CPUs). Only
the raw 64-bit words of the generator are used, because those alone are promised to stay: the sum of
a word's four 16-bit parts is a bell-shaped integer (Irwin-Hall, cut at 3.5 standard deviations),
which is centred exactly and scaled by one fp32 multiplication.

Standard deviations: linear weights fan_in ** -0.5 (keeps the variance of what they read), the two
that write into the residual stream (`wo`, `w2`) RESIDUAL_RATIO of that: the stream then begins as
the embedding alone. With the usual (2 * num_layers) ** -0.5 the small embeddings drowned in what
the untrained layers add, and the tiny preset was 0.6 nats worse after 400 k tokens. Embeddings have
TIED_STD if they are the head too (larger ones make every token predict itself) and
EMBEDDING_STD if not; an untied head has HEAD_STD (first logits nearly flat: loss ln(V)). Norm gains
are ones.
"""

import hashlib
import math

import numpy as np

from protos.contract.digest import Float32Vector
from protos.contract.errors import UsageError
from protos.contract.model_shape import ModelShape
from protos.contract.run_spec import RunSpec

EMBEDDING_STD = 0.1
TIED_STD = 0.06
HEAD_STD = 0.02
RESIDUAL_RATIO = 0.01
_NUM_PARTS = 4
_PART_MEAN = (2**16 - 1) / 2
_SUM_STD = math.sqrt(_NUM_PARTS * (2**32 - 1) / 12)
_BLOCK_VALUES = 2**20


def parameter_std(name: str, shape: tuple[int, ...], *, has_tied_embeddings: bool) -> float:
    """Standard deviation of a parameter's initial values; 0 for norm gains, which are ones."""
    if len(shape) < 2:
        return 0.0
    if name == "tok_embeddings.weight":
        return TIED_STD if has_tied_embeddings else EMBEDDING_STD
    if name == "output.weight":
        return HEAD_STD
    fan_in = shape[1]
    std: float = fan_in**-0.5
    if name.endswith((".attention.wo.weight", ".mlp.w2.weight")):
        std *= RESIDUAL_RATIO
    return std


def fill_normal(target: Float32Vector, *, seed: int, name: str, std: float) -> None:
    """Fill a contiguous vector with bell-shaped values of mean 0 and standard deviation `std`."""
    key = hashlib.sha256(f"muster init 1|{seed}|{name}".encode()).digest()[:16]
    generator = np.random.Philox(key=int.from_bytes(key, "little"))
    scale = np.float32(std / (2.0 * _SUM_STD))
    centre = np.int32(2 * _NUM_PARTS * _PART_MEAN)
    for begin in range(0, target.size, _BLOCK_VALUES):
        block = target[begin : begin + _BLOCK_VALUES]
        words = np.asarray(generator.random_raw(block.size), dtype=np.uint64)
        parts = words.view(np.uint16).reshape(block.size, _NUM_PARTS)
        sums = parts.sum(axis=1, dtype=np.int32)
        np.multiply((2 * sums - centre).astype(np.float32), scale, out=block)


def initial_vector(spec: RunSpec) -> Float32Vector:
    """Canonical fp32 vector of a run's initial parameters, in the order of the parameter table.

    Raises UsageError for a run that starts from an imported model instead.
    """
    if spec.initial_digest:
        raise UsageError(
            f"a run that starts from the imported model {spec.initial_digest[:16]}...",
            allowed="runs that start from their seed",
            remedy="load the file that the spec names",
        )
    shape = ModelShape.from_spec(spec.model)
    vector = np.empty(shape.num_parameters, dtype=np.float32)
    begin = 0
    for name, dimensions in shape.parameter_table():
        end = begin + math.prod(dimensions)
        is_tied = spec.model.has_tied_embeddings
        std = parameter_std(name, dimensions, has_tied_embeddings=is_tied)
        if std > 0.0:
            fill_normal(vector[begin:end], seed=spec.seed, name=name, std=std)
        else:
            vector[begin:end] = 1.0
        begin = end
    return vector
