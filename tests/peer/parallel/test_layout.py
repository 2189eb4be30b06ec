"""What can be asked for, what is refused and why, and how layers and heads are dealt."""

from dataclasses import replace

import pytest

from peer.parallel.layout import (
    Layout,
    LayoutWish,
    Schedule,
    kv_heads_of_rank,
    parse_layout,
    require_possible,
    stage_layers,
    stages_of_rank,
    why_impossible,
)
from protos.contract.errors import UsageError
from protos.contract.model_shape import ModelShape
from tests.peer.model.tiny import BASE

SHAPE = replace(ModelShape.from_spec(BASE), num_layers=6)


def test_a_wish_is_read() -> None:
    assert parse_layout("auto") == LayoutWish() and not LayoutWish().has_axes
    wish = parse_layout("TP=2,pp=3,schedule=zero-bubble,checkpointing=on,micro=4")
    assert (wish.dp, wish.tp, wish.pp, wish.schedule) == (1, 2, 3, Schedule.ZERO_BUBBLE)
    assert wish.has_checkpointing and wish.micro_batch_sequences == 4
    assert parse_layout("fsdp=4").is_sharded and not parse_layout("dp=4").is_sharded
    assert not parse_layout("checkpointing=off").has_axes


@pytest.mark.parametrize(
    "text",
    ["", "tp", "tp=0", "tp=two", "tp=2;pp=2", "ep=2", "dp=2,fsdp=2", "tp=2,tp=2",
     "schedule=fast", "checkpointing=yes", "pp=100000"],
)  # fmt: skip
def test_an_unreadable_wish_says_what_is_allowed(text: str) -> None:
    with pytest.raises(UsageError) as failure:
        parse_layout(text)
    assert "schedule=gpipe|1f1b" in failure.value.allowed and "tp=2,pp=2" in failure.value.remedy


@pytest.mark.parametrize(
    ("layout", "changes", "words"),
    [
        (Layout(tp=3), {}, "does not divide 4 query heads"),
        (Layout(tp=2), {"seq_len": 63}, "sequence length 63"),
        (Layout(tp=2), {"d_ff": 41}, "d_ff 41"),
        (Layout(pp=7), {}, "7 pipeline stages are more than 6 layers"),
        (Layout(pp=4, schedule=Schedule.INTERLEAVED), {}, "8 pipeline stages"),
        (Layout(dp=2, tp=2, is_sharded=True), {}, "fsdp together"),
    ],
)
def test_what_does_not_divide_is_refused_before_anything_starts(
    layout: Layout, changes: dict[str, int], words: str
) -> None:
    shape = replace(SHAPE, **changes)
    assert words in why_impossible(layout, shape)
    with pytest.raises(UsageError, match="auto"):
        require_possible(layout, shape)


def test_odd_vocabularies_and_few_kv_heads_are_possible() -> None:
    shape = replace(SHAPE, vocab_size=511, num_kv_heads=1)
    assert why_impossible(Layout(tp=4, pp=2), shape) == ""


def test_layers_are_dealt_evenly_and_the_ends_get_no_more() -> None:
    assert stage_layers(6, 3) == ((0, 2), (2, 4), (4, 6))
    assert stage_layers(7, 3) == ((0, 2), (2, 5), (5, 7))
    for num_layers, num_stages in ((5, 4), (11, 4), (9, 2)):
        bounds = stage_layers(num_layers, num_stages)
        sizes = [end - begin for begin, end in bounds]
        assert sum(sizes) == num_layers and max(sizes) - min(sizes) <= 1
        assert [begin for begin, _ in bounds[1:]] == [end for _, end in bounds[:-1]]


def test_stages_of_a_rank_follow_the_schedule() -> None:
    looped = Layout(pp=2, schedule=Schedule.INTERLEAVED)
    shaped = Layout(pp=2, schedule=Schedule.ZERO_BUBBLE)
    assert [stages_of_rank(looped, rank) for rank in (0, 1)] == [(0, 2), (1, 3)]
    assert [stages_of_rank(shaped, rank) for rank in (0, 1)] == [(0, 3), (1, 2)]
    assert [stages_of_rank(Layout(pp=2), rank) for rank in (0, 1)] == [(0,), (1,)]


def test_key_value_heads_of_a_rank_are_those_that_its_queries_read() -> None:
    shape = replace(SHAPE, num_heads=8, num_kv_heads=2)
    assert [kv_heads_of_rank(shape, tp=4, tp_rank=r) for r in range(4)] == [(0,), (0,), (1,), (1,)]
    assert [kv_heads_of_rank(shape, tp=2, tp_rank=r) for r in range(2)] == [(0,), (1,)]
    shape = replace(SHAPE, num_heads=6, num_kv_heads=3)
    assert [kv_heads_of_rank(shape, tp=2, tp_rank=r) for r in range(2)] == [(0, 0, 1), (1, 2, 2)]
