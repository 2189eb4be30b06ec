"""The decoder: names, gradients that add up over shards, cache, golden losses."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from peer.model.attention import explicit_attention
from peer.model.decoder import Decoder, FlatParameters
from peer.model.init import initial_vector
from peer.model.loss import summed_loss
from peer.swarm.exact_update import SyncUpdate
from protos.contract.model_shape import ModelShape
from tests.peer.model.tiny import SPEC, VARIANTS, build, random_windows

GOLDEN = Path(__file__).resolve().parents[2] / "golden"


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_parameters_are_those_of_the_table(variant: str) -> None:
    spec = VARIANTS[variant]
    model = Decoder(spec)
    flat = FlatParameters(model)
    found = tuple((name, tuple(p.shape)) for name, p in model.named_parameters())
    assert found == ModelShape.from_spec(spec).parameter_table()
    flat.values.copy_(torch.arange(flat.values.numel()))
    whole = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert torch.equal(whole, flat.values)


@pytest.mark.parametrize("variant", sorted(VARIANTS))
@pytest.mark.parametrize("num_shards", [2, 3])
def test_shards_add_up_to_the_union_batch(variant: str, num_shards: int) -> None:
    model, flat = build(VARIANTS[variant])
    inputs_BT, labels_BT = random_windows(VARIANTS[variant], num_windows=6)

    def gradient(rows: slice) -> torch.Tensor:
        flat.grads.zero_()
        summed_loss(model(inputs_BT[rows]), labels_BT[rows]).backward()
        return flat.grads.clone()

    union = gradient(slice(None)) / labels_BT.numel()
    size = 6 // num_shards
    means, weights = [], []
    for index in range(num_shards):
        rows = slice(index * size, (index + 1) * size)
        tokens = labels_BT[rows].numel()
        means.append(gradient(rows) / tokens)
        weights.append(tokens / labels_BT.numel())
    averaged = sum(weight * mean for weight, mean in zip(weights, means, strict=True))
    assert float((averaged - union).norm() / union.norm()) <= 1e-5
    assert float(union.norm()) > 0


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_gradients_match_finite_differences(variant: str) -> None:
    model, flat = build(VARIANTS[variant])
    inputs_BT, labels_BT = random_windows(VARIANTS[variant], num_windows=2)
    flat.grads.zero_()
    summed_loss(model(inputs_BT), labels_BT).backward()
    generator = torch.Generator().manual_seed(3)
    direction = torch.randn(flat.values.numel(), generator=generator)
    direction /= direction.norm()
    step = 0.02
    with torch.no_grad():
        losses = []
        for sign in (1.0, -1.0):
            flat.values.add_(direction, alpha=sign * step)
            losses.append(float(summed_loss(model(inputs_BT).double(), labels_BT)))
            flat.values.sub_(direction, alpha=sign * step)
    slope = float(flat.grads @ direction)
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(slope, rel=0.02)


def test_a_tied_head_gets_both_gradients_in_one_matrix() -> None:
    tied, untied = VARIANTS["tied"], VARIANTS["untied"]
    model_a, flat_a = build(tied)
    model_b, flat_b = build(untied)
    size = flat_a.values.numel()
    with torch.no_grad():
        flat_b.values[:size] = flat_a.values
        model_b.output.weight.copy_(model_b.tok_embeddings.weight)
    inputs_BT, labels_BT = random_windows(tied, num_windows=2)
    for model, flat in ((model_a, flat_a), (model_b, flat_b)):
        flat.grads.zero_()
        summed_loss(model(inputs_BT), labels_BT).backward()
    both = model_b.tok_embeddings.weight.grad + model_b.output.weight.grad
    torch.testing.assert_close(model_a.tok_embeddings.weight.grad, both)


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_cached_positions_give_the_same_logits(variant: str) -> None:
    model, _ = build(VARIANTS[variant])
    inputs_BT, _ = random_windows(VARIANTS[variant], num_windows=1)
    with torch.inference_mode():
        whole_BTV = model(inputs_BT)
        cache = model.empty_cache()
        parts = [model(inputs_BT[:, :5], cache)]
        parts += [model(inputs_BT[:, t : t + 1], cache) for t in range(5, inputs_BT.shape[1])]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole_BTV, rtol=1e-4, atol=1e-5)


def test_explicit_attention_equals_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    q_BHTK = torch.randn(2, 6, 9, 8, generator=generator)
    k_BGSK = torch.randn(2, 3, 9, 8, generator=generator)
    v_BGSK = torch.randn(2, 3, 9, 8, generator=generator)
    mask_TS = torch.zeros(9, 9).masked_fill(torch.ones(9, 9).triu(1).bool(), -math.inf)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q_BHTK, k_BGSK, v_BGSK, is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(explicit_attention(q_BHTK, k_BGSK, v_BGSK, mask_TS), expected)


def test_losses_follow_the_golden_file() -> None:
    """Ten exact updates in fp32 on fixed data; matrix kernels differ between CPUs, hence a
    tolerance.
    """
    model, flat = build(SPEC.model)
    flat.values.copy_(torch.from_numpy(initial_vector(SPEC)))
    params = flat.values.numpy()
    exp_avg, exp_avg_sq = np.zeros_like(params), np.zeros_like(params)
    update = SyncUpdate(SPEC)
    losses_nats = []
    for number in range(1, 11):
        inputs_BT, labels_BT = random_windows(SPEC.model, num_windows=8, seed=number % 3)
        flat.grads.zero_()
        loss = summed_loss(model(inputs_BT), labels_BT)
        loss.backward()
        losses_nats.append(float(loss.detach()) / labels_BT.numel())
        update.apply(
            params,
            exp_avg,
            exp_avg_sq,
            flat.grads.numpy() / np.float32(labels_BT.numel()),
            update_number=number,
            schedule_tokens=labels_BT.numel() * (number - 1),
            cooldown_start_tokens=10**6,
            budget_tokens=10**7,
        )
    golden = [float(line) for line in (GOLDEN / "tiny_fp32_losses.txt").read_text().split()]
    assert losses_nats == pytest.approx(golden, rel=2e-5)
    assert losses_nats[-1] < losses_nats[0] - 0.3
