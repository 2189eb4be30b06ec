"""Inner optimizers: Muon against its formula, AdamW for the rest, and what is refused."""

from dataclasses import replace

import pytest
import torch

from peer.model.inner_optimizer import InnerOptimizer
from peer.model.loss import summed_loss
from protos.contract.errors import UsageError
from protos.contract.run_spec import OptimizerSpec, RunSpec, StrategySpec
from tests.peer.model.tiny import BASE, SPEC, build, random_windows

MUON = OptimizerSpec(name="muon", peak_lr=1e-2, weight_decay=0.1)


def test_muon_steps_along_the_nearest_orthogonal_matrix() -> None:
    model, flat = build(BASE)
    before = flat.values.clone()
    flat.grads.copy_(torch.randn(flat.grads.shape, generator=torch.Generator().manual_seed(2)))
    weight = model.get_submodule("layers.0.mlp.w1").weight
    embedding = model.tok_embeddings.weight
    old_weight, old_embedding = weight.detach().clone(), embedding.detach().clone()
    grad = weight.grad
    assert grad is not None
    InnerOptimizer(MUON, list(model.named_parameters())).step(lr=1e-2)
    assert not torch.equal(before, flat.values)
    moved = (old_weight * (1 - 1e-2 * 0.1) - weight.detach()) / 1e-2
    left, _, right = torch.linalg.svd(grad, full_matrices=False)
    expected = 0.2 * max(weight.shape) ** 0.5 * (left @ right)
    # Newton-Schulz brings singular values to 0.7..1.2, not to 1
    cosine = torch.nn.functional.cosine_similarity(moved.ravel(), expected.ravel(), dim=0)
    assert cosine > 0.97
    singular = torch.linalg.svdvals(moved) / (0.2 * max(weight.shape) ** 0.5)
    assert singular.min() > 0.6 and singular.max() < 1.3
    adamw = old_embedding * (1 - 1e-2 * 0.1) - 1e-2 * embedding.grad.sign()
    assert torch.allclose(embedding.detach(), adamw, atol=1e-5), "the embedding goes by AdamW"


@pytest.mark.parametrize("name", ["adamw", "muon", "adamw8bit"])
def test_a_model_learns(name: str) -> None:
    model, flat = build(BASE)
    optimizer = InnerOptimizer(replace(MUON, name=name), list(model.named_parameters()))
    inputs_BT, labels_BT = random_windows(BASE, num_windows=4)
    losses = []
    for _ in range(30):
        flat.grads.zero_()
        loss = summed_loss(model(inputs_BT), labels_BT) / labels_BT.numel()
        loss.backward()
        optimizer.step(lr=1e-2)
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("name", ["muon", "adamw8bit"])
def test_what_has_no_exact_form_is_for_diloco(name: str) -> None:
    optimizer = replace(MUON, name=name)
    with pytest.raises(UsageError, match=f"{name} goes with diloco"):
        replace(SPEC, optimizer=optimizer)
    with pytest.raises(UsageError, match="adamw, muon"):
        OptimizerSpec(name="mion")
    seq_len = SPEC.model.seq_len
    strategy = StrategySpec(name="diloco", inner_steps=2, inner_batch_tokens=seq_len)
    spec = replace(SPEC, optimizer=optimizer, strategy=strategy)
    assert RunSpec.from_toml(spec.to_toml()) == spec
