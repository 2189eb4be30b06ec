"""The planner's choices for shapes, memories and links whose answer can be said in advance."""

from dataclasses import replace

import pytest

from peer.parallel.layout import Layout, LayoutWish, Schedule, parse_layout
from peer.parallel.memory import Setting, estimate
from peer.parallel.plan import GIB, Device, Node, plan_layout
from protos.contract.errors import MachineError, UsageError
from protos.contract.model_shape import SHAPE_PRESETS, ModelShape
from protos.contract.run_spec import TINY_MODEL

TINY = Setting(shape=ModelShape.from_spec(TINY_MODEL))
BIG = Setting(shape=SHAPE_PRESETS["llama3.2-1b"], is_cpu=False, activation_bytes=2)


def gpus(count: int, gib: float, *, link: float = 100e9, latency: float = 20e-6) -> Node:
    device = Device(name="cuda", memory_bytes=round(gib * GIB), flop_per_second=400e12)
    return Node(
        devices=tuple(replace(device, name=f"cuda:{index}") for index in range(count)),
        link_bytes_per_second=link,
        link_latency_seconds=latency,
        host_memory_bytes=512 * GIB,
        max_micro_batch_sequences=64,
    )


def cpus(count: int, gib: float) -> Node:
    device = Device(name="cpu", memory_bytes=round(gib * GIB), flop_per_second=50e9)
    return Node(
        devices=(device,) * count,
        link_bytes_per_second=3e9,
        link_latency_seconds=2e-4,
        host_memory_bytes=64 * GIB,
    )


def test_a_small_model_on_one_device_takes_it_as_it_is() -> None:
    plan = plan_layout(TINY, cpus(1, 4))
    assert plan.layout.num_ranks == 1 and not plan.layout.has_checkpointing
    assert plan.table.device_bytes < 4 * GIB and "guessed" in plan.reason
    assert "GiB" in "\n".join(plan.lines())


def test_copies_are_quickest_when_the_model_fits() -> None:
    plan = plan_layout(BIG, gpus(4, 139), round_tokens=2**20)
    assert (plan.layout.dp, plan.layout.tp, plan.layout.pp) == (4, 1, 1)
    assert not plan.layout.is_sharded and "times as long" in plan.reason


def test_recomputation_before_anything_else_when_activations_do_not_fit() -> None:
    roomy = plan_layout(BIG, gpus(1, 139))
    tight = plan_layout(BIG, gpus(1, 28))
    assert not roomy.layout.has_checkpointing and tight.layout.has_checkpointing
    assert tight.table.device_bytes < 28 * GIB < roomy.table.device_bytes


def test_a_model_that_no_device_holds_is_sharded_or_split_by_the_speed_of_the_links() -> None:
    shape = SHAPE_PRESETS["llama3-8b"]
    setting = Setting(shape=shape, is_cpu=False, activation_bytes=2)
    fast = plan_layout(setting, gpus(4, 80, link=400e9, latency=1e-6), round_tokens=2**20)
    slow = plan_layout(setting, gpus(4, 80, link=1e9, latency=1e-4), round_tokens=2**20)
    assert fast.layout.num_ranks == slow.layout.num_ranks == 4
    assert fast.layout.pp == 1 and fast.layout.tp * fast.layout.dp == 4
    assert slow.layout.pp == 4, "only activations at the borders cross slow links"
    for plan in (fast, slow):
        assert "one device lacks" in plan.reason and plan.table.device_bytes < 80 * GIB


def test_nothing_fits_says_how_many_gigabytes_are_missing() -> None:
    setting = Setting(shape=SHAPE_PRESETS["llama3-70b"], is_cpu=False, activation_bytes=2)
    with pytest.raises(MachineError) as failure:
        plan_layout(setting, gpus(2, 24))
    assert "GiB are missing" in failure.value.found and failure.value.exit_code == 4
    with pytest.raises(MachineError, match="swarm and shared vectors"):
        plan_layout(TINY, replace(cpus(1, 8), host_memory_bytes=2**20))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tp=2,pp=2", (1, 2, 2, False)),
        ("dp=2", (2, 1, 1, False)),
        ("fsdp=2", (2, 1, 1, True)),
        ("pp=2,schedule=gpipe", (1, 1, 2, False)),
    ],
)
def test_a_wish_is_obeyed(text: str, expected: tuple[int, int, int, bool]) -> None:
    setting = replace(TINY, shape=replace(TINY.shape, num_kv_heads=6))
    layout = plan_layout(setting, cpus(4, 8), parse_layout(text)).layout
    assert (layout.dp, layout.tp, layout.pp, layout.is_sharded) == expected
    if "gpipe" in text:
        assert layout.schedule is Schedule.GPIPE


def test_a_wish_for_more_devices_than_are_lent_is_refused() -> None:
    with pytest.raises(UsageError) as failure:
        plan_layout(TINY, cpus(2, 8), parse_layout("tp=2,pp=2"))
    assert "takes 4 devices, 2 are lent" in failure.value.found
    assert "--devices" in failure.value.allowed
    assert "--layout" in failure.value.remedy
    with pytest.raises(UsageError, match="more than 2 layers"):
        plan_layout(TINY, cpus(4, 8), parse_layout("pp=4"))


def test_after_an_out_of_memory_a_turn_is_bounded() -> None:
    wish = LayoutWish(dp=1, tp=1, pp=2)
    for bound in (8, 4, 2):
        layout = plan_layout(TINY, cpus(2, 8), wish, max_turn_sequences=bound).layout
        assert layout.turn_sequences <= bound
    assert plan_layout(TINY, cpus(1, 8), max_turn_sequences=1).layout.turn_sequences == 1


def test_a_wished_micro_batch_is_obeyed_until_memory_was_not_enough() -> None:
    wish = parse_layout("dp=2,micro=16")
    assert plan_layout(TINY, cpus(2, 8), wish).layout.micro_batch_sequences == 16
    after = plan_layout(TINY, cpus(2, 8), wish, max_turn_sequences=8).layout
    assert (after.micro_batch_sequences, after.turn_sequences) == (4, 8)


def test_a_pipelines_freed_logits_stay_with_a_process() -> None:
    setting = Setting(shape=ModelShape.from_spec(replace(TINY_MODEL, vocab_size=16_384)))
    layout = Layout(pp=2, micro_batch_sequences=2, num_micro_batches=4)
    tokens = 4 * layout.micro_batch_sequences * TINY_MODEL.seq_len
    on_gpu = replace(setting, is_cpu=False)
    for where, kept_bytes in ((setting, 4 * tokens * 16_384), (on_gpu, 0)):
        four = estimate(layout, where)
        eight = estimate(replace(layout, num_micro_batches=8), where)
        assert eight.runtime_bytes - four.runtime_bytes == kept_bytes


def test_splitting_a_model_divides_what_a_rank_holds() -> None:
    setting = Setting(shape=SHAPE_PRESETS["llama2-7b"])
    alone = Layout()
    one = estimate(alone, setting)
    two = estimate(replace(alone, tp=2), setting)
    four = estimate(replace(alone, tp=2, pp=2, num_micro_batches=4), setting)
    assert two.parameters_bytes == pytest.approx(one.parameters_bytes / 2, rel=0.01)
    assert four.parameters_bytes == pytest.approx(one.parameters_bytes / 4, rel=0.15)
    sharded = estimate(replace(alone, dp=4, is_sharded=True), setting)
    assert sharded.parameters_bytes == pytest.approx(one.parameters_bytes / 4, rel=0.01)
