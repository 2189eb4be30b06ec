"""Models small enough for tests, and data for them."""

from dataclasses import replace

import torch
from torch import Tensor

from peer.model.decoder import Decoder, FlatParameters
from peer.model.init import initial_vector
from protos.contract.run_spec import (
    DataSpec,
    ModelSpec,
    OptimizerSpec,
    RunSpec,
    ScheduleSpec,
    StrategySpec,
)

torch.set_num_threads(1)

BASE = ModelSpec(
    vocab_size=61,
    d_model=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    d_ff=40,
    seq_len=12,
)
VARIANTS = {
    "tied": BASE,
    "untied": replace(BASE, has_tied_embeddings=False),
    "all-heads": replace(BASE, num_kv_heads=4),
    "one-kv-head": replace(BASE, num_kv_heads=1, has_tied_embeddings=False),
}
SPEC = RunSpec(
    seed=7,
    budget_tokens=12 * 1000,
    model=BASE,
    optimizer=OptimizerSpec(peak_lr=1e-2),
    schedule=ScheduleSpec(lr_warmup_tokens=96),
    strategy=StrategySpec(global_batch_tokens=96),
    data=DataSpec(dataset_id="0" * 64),
)


def build(spec: ModelSpec) -> tuple[Decoder, FlatParameters]:
    """A model with its initial values, stirred so that every parameter has a real gradient."""
    model = Decoder(spec)
    flat = FlatParameters(model)
    generator = torch.Generator().manual_seed(11)
    noise = 0.1 * torch.randn(flat.values.numel(), generator=generator)
    flat.values.copy_(torch.from_numpy(initial_vector(replace(SPEC, model=spec))) + noise)
    return model, flat


def random_windows(spec: ModelSpec, *, num_windows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(inputs_BT, labels_BT) of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(spec.vocab_size, (num_windows, spec.seq_len + 1), generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
