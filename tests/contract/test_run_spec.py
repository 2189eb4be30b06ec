"""RunSpec: golden digest, both forms, strictness."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos.contract.errors import UsageError
from protos.contract.model_shape import SHAPE_PRESETS, ModelShape
from protos.contract.run_spec import (
    MODEL_PRESETS,
    DataSpec,
    ModelSpec,
    OptimizerSpec,
    RunSpec,
    ScheduleSpec,
    StrategySpec,
    floor_to_windows,
    parse_fields,
    plain_fields,
)
from protos.contract.strategy_spec import ADDED_LATER

GOLDEN_SPEC = RunSpec(
    seed=7,
    budget_tokens=1_024_000,
    model=ModelSpec(
        vocab_size=4096,
        d_model=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        d_ff=128,
        seq_len=128,
        has_tied_embeddings=False,
        rope_theta=10_000.0,
        norm_epsilon=1e-5,
    ),
    optimizer=OptimizerSpec(
        peak_lr=1e-3, beta1=0.9, beta2=0.95, epsilon=1e-8, weight_decay=0.1, clip_norm=1.0
    ),
    schedule=ScheduleSpec(lr_warmup_tokens=10_000, cooldown_ratio=0.2),
    strategy=StrategySpec(name="sync", global_batch_tokens=32_768, codec="fp32"),
    data=DataSpec(dataset_id="ab" * 32, max_data_passes=4, eval_tokens=0),
)
GOLDEN_DIGEST = "f0091b87dbda10e0b7cc5cdfd853683a18ebc1749b87cae4750c8d7fd7477e8f"


def test_digest_is_golden() -> None:
    """If this fails, peers of two versions would disagree about what a run is: raise
    PROTOCOL_VERSION.
    """
    assert GOLDEN_SPEC.run_digest == GOLDEN_DIGEST


DEFAULT_SPEC = RunSpec(
    seed=0,
    budget_tokens=1024 * 256,
    model=MODEL_PRESETS["tiny"],
    data=DataSpec(dataset_id="0" * 64),
)
DEFAULT_DIGEST = "8b3f272d9e65b6a554f64d5eb1da131f67c26d9436015d34faf289978564cae1"


def test_digest_of_the_default_spec_is_golden() -> None:
    """If this fails, runs stored by earlier versions have lost their digest: mark a new field as
    ADDED_LATER, and never change a default.
    """
    assert DEFAULT_SPEC.run_digest == DEFAULT_DIGEST


@dataclasses.dataclass(frozen=True, kw_only=True)
class _LaterModel(ModelSpec):
    num_more: int = dataclasses.field(default=3, metadata=ADDED_LATER)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _LaterSpec(RunSpec):
    """RunSpec of a later version, with a new key at the top and one in a table."""

    more: float = dataclasses.field(default=0.5, metadata=ADDED_LATER)


def test_a_field_that_is_added_later_changes_only_specs_that_use_it() -> None:
    values = {f.name: getattr(DEFAULT_SPEC, f.name) for f in dataclasses.fields(DEFAULT_SPEC)}
    later_model = _LaterModel(**plain_fields(DEFAULT_SPEC.model))
    later = _LaterSpec(**values | {"model": later_model})
    assert later.to_wire() == DEFAULT_SPEC.to_wire() and later.run_digest == DEFAULT_DIGEST
    used = [
        dataclasses.replace(later, more=0.25),
        dataclasses.replace(later, model=dataclasses.replace(later_model, num_more=4)),
    ]
    assert len({spec.run_digest for spec in (*used, DEFAULT_SPEC)}) == 3


def test_forms_give_the_spec_back() -> None:
    assert RunSpec.from_wire(GOLDEN_SPEC.to_wire()) == GOLDEN_SPEC
    assert RunSpec.from_toml(GOLDEN_SPEC.to_toml()) == GOLDEN_SPEC


@given(
    seed=st.integers(0, 2**63 - 1),
    num_windows=st.integers(1, 2**30),
    peak_lr=st.floats(1e-9, 10, allow_nan=False),
    weight_decay=st.integers(0, 3) | st.floats(0, 1),
)
def test_any_spec_survives_both_forms(
    seed: int, num_windows: int, peak_lr: float, weight_decay: float
) -> None:
    spec = dataclasses.replace(
        GOLDEN_SPEC,
        seed=seed,
        budget_tokens=num_windows * 128,
        optimizer=OptimizerSpec(peak_lr=peak_lr, weight_decay=weight_decay),
    )
    for copy in (RunSpec.from_wire(spec.to_wire()), RunSpec.from_toml(spec.to_toml())):
        assert copy == spec
        assert copy.run_digest == spec.run_digest


def test_missing_keys_take_defaults_and_required_ones_are_named() -> None:
    text = GOLDEN_SPEC.to_toml().replace("clip_norm = 1.0\n", "")
    assert RunSpec.from_toml(text) == GOLDEN_SPEC
    with pytest.raises(UsageError, match="model: d_model is missing"):
        RunSpec.from_toml(text.replace("d_model = 64\n", ""))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("peak_lr", "peek_lr", "unknown key 'peek_lr'.*did you mean 'peak_lr'"),
        ("[optimizer]", "[optimiser]", "unknown key 'optimiser'.*did you mean 'optimizer'"),
        ("seed = 7", "seed = 7\nzzz = 1", "unknown key 'zzz'.*remove it"),
        ("[security]", "[security]\nmode = 1", "security: unknown key 'mode'"),
        ("seed = 7", "seed = 7.5", "seed = 7.5; a whole number; give"),
        ("seed = 7", "seed = true", "seed = True; a whole number"),
        ("seed = 7", "seed = -1", "seed = -1"),
        ("peak_lr = 0.001", "peak_lr = nan", "peak_lr = nan"),
        ("peak_lr = 0.001", "peak_lr = 0", "peak_lr = 0"),
        ('"sync"', '"dilco"', "strategy.name = 'dilco'.*sync, diloco"),
        ("inner_steps = 30", "inner_steps = 50", "inner_steps = 50.*belongs to diloco"),
        (
            "muon_momentum = 0.95",
            "muon_momentum = 0.98",
            "muon_momentum = 0.98.*belongs to muon",
        ),
        ("mix_ratio = 0.0", "mix_ratio = 0.5", "mix_ratio = 0.5.*belongs to diloco"),
        ('"causal"', '"maskd"', "objective.name = 'maskd'.*masked"),
        ("mean_span_tokens = 3.0", "mean_span_tokens = 0.5", "objective.mean_span_tokens = 0.5"),
        (
            "corruption_ratio = 0.15",
            "corruption_ratio = 0.9",
            "corruption_ratio = 0.9.*at most 0.5",
        ),
        ('"fp32"', '"int3"', "codec 'int3'.*fp32.*int8"),
        ("num_kv_heads = 2", "num_kv_heads = 3", "num_kv_heads = 3.*divisor of num_heads = 4"),
        ("head_dim = 16", "head_dim = 15", "head_dim = 15.*even"),
        ("budget_tokens = 1024000", "budget_tokens = 1024001", "multiple of model.seq_len = 128"),
        ("batch_tokens = 32768", "batch_tokens = 127", "global_batch_tokens = 127"),
        ("abab", "ABAB", "data.dataset_id"),
        ("seed = 7", "seed = ", "not TOML"),
    ],
)
def test_bad_toml_is_refused_with_the_place(old: str, new: str, message: str) -> None:
    text = GOLDEN_SPEC.to_toml()
    assert old in text
    with pytest.raises(UsageError, match=message):
        RunSpec.from_toml(text.replace(old, new))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, ""),
        ({"num_fragments": 4, "overlap_inner_steps": 4, "inner_steps": 20, "mix_ratio": 0.5}, ""),
        (
            {"num_fragments": 5, "inner_steps": 25},
            "num_fragments = 5.*at most 4: .* 2 layers, head",
        ),
        ({"num_fragments": 4}, "num_fragments = 4.*divisor of strategy.inner_steps = 30"),
        ({"num_fragments": 0}, "num_fragments = 0"),
        ({"overlap_inner_steps": 30}, "overlap_inner_steps = 30.*0 to 29"),
        ({"num_fragments": 3, "overlap_inner_steps": 10}, "overlap_inner_steps = 10.*0 to 9"),
        ({"inner_batch_tokens": 1000}, "inner_batch_tokens = 1000.*multiple of model.seq_len"),
        ({"fragment_order": "random"}, "fragment_order = 'random'.*strided, sequential"),
        ({"outer_momentum": 1.0}, "outer_momentum = 1.0"),
        ({"outer_lr": 0.0}, "outer_lr = 0.0"),
        ({"mix_ratio": 1.0}, "mix_ratio = 1.0"),
        ({"mix_ratio": float("nan")}, "mix_ratio = nan"),
        ({"overlap_inner_steps": 3}, ""),
    ],
)
def test_diloco_settings(settings: dict[str, object], message: str) -> None:
    table = {"name": "diloco", **settings}
    plain = json.loads(GOLDEN_SPEC.to_wire())
    plain["strategy"] |= table
    if message:
        with pytest.raises(UsageError, match=message):
            parse_fields(RunSpec, plain, where="run spec")
    else:
        spec = parse_fields(RunSpec, plain, where="run spec")
        assert RunSpec.from_toml(spec.to_toml()) == spec
        assert spec.run_digest != GOLDEN_SPEC.run_digest


def test_every_float_is_a_finite_number() -> None:
    plain = json.loads(GOLDEN_SPEC.to_wire())
    tables = {"": plain} | {k: v for k, v in plain_fields(GOLDEN_SPEC).items() if type(v) is dict}
    floats = [(t, k) for t, table in tables.items() for k, v in table.items() if type(v) is float]
    assert len(floats) >= 12
    for table, key in floats:
        for value in (float("nan"), float("inf"), float("-inf")):
            changed = plain | {table: plain.get(table, {}) | {key: value}}
            with pytest.raises(UsageError) as refusal:
                parse_fields(RunSpec, changed, where="run spec")
            assert f"{key} = {value}" in refusal.value.found
            assert refusal.value.allowed == "a finite number" and refusal.value.remedy


def test_round_tokens_of_both_strategies() -> None:
    assert StrategySpec(global_batch_tokens=500).round_tokens(7) == 500
    assert StrategySpec().round_unit_tokens(128) == 128
    diloco = StrategySpec(name="diloco", inner_steps=24, num_fragments=2, inner_batch_tokens=256)
    assert diloco.round_tokens(3) == 3 * 12 * 256
    assert diloco.round_unit_tokens(128) == 256
    assert diloco.state_vectors == ("params", "outer_momentum")


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"{", b'{"model": 3}', b"\xff"])
def test_bad_wire_is_refused(data: bytes) -> None:
    with pytest.raises(UsageError):
        RunSpec.from_wire(data)


def test_presets_are_about_as_large_as_they_say() -> None:
    tiny = ModelShape.from_spec(MODEL_PRESETS["tiny"])
    assert 1.5e6 <= tiny.num_parameters <= 2.5e6


def test_a_llama_shape_can_be_trained_and_a_gpt_shape_cannot() -> None:
    shape = SHAPE_PRESETS["llama3.2-1b"]
    assert ModelShape.from_spec(ModelSpec.from_shape(shape)) == shape
    with pytest.raises(UsageError, match="GPT-family"):
        ModelSpec.from_shape(SHAPE_PRESETS["gpt2"])


def test_floor_to_windows() -> None:
    assert [floor_to_windows(tokens, 8) for tokens in (0, 7, 8, 23)] == [0, 0, 8, 16]
