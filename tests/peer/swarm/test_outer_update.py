"""Fragments and the outer Nesterov update against hand-worked numbers and torch's SGD."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from peer.swarm.fragments import Fragment, FragmentPlan
from peer.swarm.outer_update import OuterUpdate, exact_update_for
from protos.contract.errors import CorruptDataError
from protos.contract.model_shape import ModelShape
from protos.contract.run_spec import RunSpec, StrategySpec
from tests.peer.model.tiny import SPEC, VARIANTS


def spec_of(num_fragments: int, order: str = "strided", *, variant: str = "untied") -> RunSpec:
    strategy = StrategySpec(
        name="diloco",
        inner_steps=2 * num_fragments,
        inner_batch_tokens=24,
        num_fragments=num_fragments,
        fragment_order=order,
        outer_lr=0.5,
        outer_momentum=0.75,
    )
    return replace(SPEC, model=VARIANTS[variant], strategy=strategy)


def unit_sizes(variant: str) -> tuple[int, int, int]:
    """Embedding, layer, last norm of the tiny model."""
    model = VARIANTS[variant]
    d_kv = model.num_kv_heads * model.head_dim
    attention = 2 * model.d_model * model.num_heads * model.head_dim + 2 * model.d_model * d_kv
    layer = 2 * model.d_model + attention + 3 * model.d_model * model.d_ff
    return model.vocab_size * model.d_model, layer, model.d_model


def test_sync_and_one_fragment_have_the_whole_vector() -> None:
    num_values = ModelShape.from_spec(SPEC.model).num_parameters
    for spec in (SPEC, spec_of(1, variant="tied")):
        assert FragmentPlan(spec).fragments == (Fragment(((0, num_values),)),)


def test_strided_takes_every_other_unit() -> None:
    embedding, layer, norm = unit_sizes("untied")
    even, odd = FragmentPlan(spec_of(2)).fragments  # embedding, layer 0, layer 1, norm and head
    assert even.runs == ((0, embedding), (embedding + layer, embedding + 2 * layer))
    head = embedding + 2 * layer
    assert odd.runs == ((embedding, embedding + layer), (head, head + norm + embedding))


def test_a_tied_model_has_no_head_unit() -> None:
    embedding, layer, norm = unit_sizes("tied")
    first, second, third = FragmentPlan(spec_of(3, variant="tied")).fragments
    assert first.runs == ((0, embedding),)
    assert second.runs == ((embedding, embedding + layer),)
    assert third.runs == ((embedding + layer, embedding + 2 * layer + norm),)


def test_sequential_balances_runs_of_units() -> None:
    embedding, layer, norm = unit_sizes("untied")
    sizes = [f.num_values for f in FragmentPlan(spec_of(2, "sequential")).fragments]
    assert sizes == [embedding + layer, layer + norm + embedding]
    sizes = [f.num_values for f in FragmentPlan(spec_of(3, "sequential")).fragments]
    assert sizes == [embedding + layer, layer, norm + embedding]


@pytest.mark.parametrize("order", ["strided", "sequential"])
@pytest.mark.parametrize("variant", ["tied", "untied"])
@pytest.mark.parametrize("num_fragments", [1, 2, 3])
def test_every_value_is_in_exactly_one_fragment(
    order: str, variant: str, num_fragments: int
) -> None:
    plan = FragmentPlan(spec_of(num_fragments, order, variant=variant))
    counts = np.zeros(ModelShape.from_spec(VARIANTS[variant]).num_parameters, dtype=np.int32)
    for fragment in plan.fragments:
        for begin, end in fragment.runs:
            counts[begin:end] += 1
    assert (counts == 1).all()
    assert len(plan.fragments) == num_fragments
    turns = [plan.of_outer_step(step) for step in range(1, 2 * num_fragments + 1)]
    assert turns == 2 * list(plan.fragments)


def test_pack_keeps_canonical_order() -> None:
    packed = np.empty(4, dtype=np.float32)
    Fragment(((1, 3), (6, 8))).pack(np.arange(9, dtype=np.float32), packed)
    assert packed.tolist() == [1, 2, 6, 7]


def test_two_outer_steps_by_hand() -> None:
    """One value, lr 0.5, momentum 0.75: m1 = 2, step 2 + 1.5; m2 = 0.75 * 2 + 4, step 4 + 4.125."""
    update = OuterUpdate(spec_of(1))
    size = ModelShape.from_spec(VARIANTS["untied"]).num_parameters
    anchors, momentum = np.full(size, 10, dtype=np.float32), np.zeros(size, dtype=np.float32)
    update.apply(anchors, momentum, np.full(size, 2, dtype=np.float32), update_number=1)
    assert set(momentum) == {2.0} and set(anchors) == {8.25}
    update.apply(anchors, momentum, np.full(size, 4, dtype=np.float32), update_number=2)
    assert set(momentum) == {5.5} and set(anchors) == {8.25 - 0.5 * (4 + 4.125)}


def test_follows_torch_nesterov_and_leaves_other_fragments_alone() -> None:
    spec = spec_of(2)
    update, plan = exact_update_for(spec), FragmentPlan(spec)
    rng = np.random.default_rng(0)
    size = ModelShape.from_spec(spec.model).num_parameters
    anchors = rng.standard_normal(size).astype(np.float32)
    momentum = np.zeros_like(anchors)
    expected = [torch.nn.Parameter(torch.from_numpy(anchors.copy())) for _ in range(2)]
    sgd = [torch.optim.SGD([tensor], lr=0.5, momentum=0.75, nesterov=True) for tensor in expected]
    for number in range(1, 7):
        fragment = plan.of_outer_step(number)
        delta = rng.standard_normal(fragment.num_values).astype(np.float32)
        before = anchors.copy()
        update.apply(
            anchors,
            momentum,
            delta,
            update_number=number,
            schedule_tokens=0,
            cooldown_start_tokens=0,
            budget_tokens=0,
        )
        whole = np.zeros(size, dtype=np.float32)
        offset = 0
        for begin, end in fragment.runs:
            whole[begin:end] = delta[offset : offset + end - begin]
            offset += end - begin
        index = (number - 1) % 2
        expected[index].grad = torch.from_numpy(whole)
        sgd[index].step()
        mine = whole != 0
        np.testing.assert_allclose(
            anchors[mine], expected[index].detach().numpy()[mine], rtol=1e-6, atol=1e-6
        )
        assert np.array_equal(anchors[~mine], before[~mine])


def test_values_that_are_not_finite_change_nothing() -> None:
    update = OuterUpdate(spec_of(1))
    size = ModelShape.from_spec(VARIANTS["untied"]).num_parameters
    anchors, momentum = np.ones(size, dtype=np.float32), np.zeros(size, dtype=np.float32)
    delta = np.zeros(size, dtype=np.float32)
    delta[-1] = np.nan
    with pytest.raises(CorruptDataError, match="pseudo-gradient holds values"):
        update.apply(anchors, momentum, delta, update_number=1)
    assert set(anchors) == {1.0} and not momentum.any()
