"""Parameter counts of published models, and the FLOP convention by hand."""

import pytest

from protos.contract.model_shape import SHAPE_PRESETS, ModelShape
from protos.contract.run_spec import TINY_MODEL

# Counts printed in the papers and model cards (GPT-2: release; GPT-3: table 2.1; Llama 1: table 2;
# Llama 2 and 3: number of parameters in the published weights).
PUBLISHED_PARAMETERS = {
    "gpt2": 124.44e6,
    "gpt2-medium": 354.8e6,
    "gpt2-large": 774.0e6,
    "gpt2-xl": 1557.6e6,
    "gpt3-125m": 125e6,
    "gpt3-760m": 760e6,
    "gpt3-6.7b": 6.7e9,
    "gpt3-13b": 13.0e9,
    "gpt3-175b": 175.0e9,
    "llama1-7b": 6.7e9,
    "llama1-13b": 13.0e9,
    "llama1-33b": 32.5e9,
    "llama1-65b": 65.2e9,
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3-405b": 405_853_388_800,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
}


def test_every_preset_has_a_published_count() -> None:
    assert set(SHAPE_PRESETS) == set(PUBLISHED_PARAMETERS)


@pytest.mark.parametrize("name", sorted(SHAPE_PRESETS))
def test_preset_matches_published_count(name: str) -> None:
    assert SHAPE_PRESETS[name].num_parameters == pytest.approx(PUBLISHED_PARAMETERS[name], rel=0.01)


def test_table_is_the_canonical_order() -> None:
    shape = ModelShape(
        vocab_size=10,
        d_model=4,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=6,
        d_ff=5,
        seq_len=8,
        has_tied_embeddings=False,
    )
    assert shape.parameter_table() == (
        ("tok_embeddings.weight", (10, 4)),
        ("layers.0.attention_norm.weight", (4,)),
        ("layers.0.attention.wq.weight", (12, 4)),
        ("layers.0.attention.wk.weight", (6, 4)),
        ("layers.0.attention.wv.weight", (6, 4)),
        ("layers.0.attention.wo.weight", (4, 12)),
        ("layers.0.mlp_norm.weight", (4,)),
        ("layers.0.mlp.w1.weight", (5, 4)),
        ("layers.0.mlp.w3.weight", (5, 4)),
        ("layers.0.mlp.w2.weight", (4, 5)),
        ("norm.weight", (4,)),
        ("output.weight", (10, 4)),
    )
    assert shape.num_parameters == 40 + 4 + 48 + 24 + 24 + 48 + 4 + 3 * 20 + 4 + 40
    assert shape.num_matmul_parameters == 48 + 24 + 24 + 48 + 60 + 40
    assert shape.flop_per_token() == 6 * 244 + 12 * 1 * 12 * 8
    assert shape.vector_bytes == 4 * shape.num_parameters
    assert shape.state_bytes == 12 * shape.num_parameters


def test_tying_removes_the_output_matrix_but_not_its_work() -> None:
    fields = vars_of(ModelShape.from_spec(TINY_MODEL))
    tied = ModelShape(**{**fields, "has_tied_embeddings": True})
    untied = ModelShape(**{**vars_of(tied), "has_tied_embeddings": False})
    head = TINY_MODEL.vocab_size * TINY_MODEL.d_model
    assert untied.num_parameters - tied.num_parameters == head
    assert untied.flop_per_token() == tied.flop_per_token()
    assert "output.weight" not in dict(tied.parameter_table())


def vars_of(shape: ModelShape) -> dict[str, object]:
    """Fields of a shape, without what it has cached."""
    return {name: getattr(shape, name) for name in ModelShape.__dataclass_fields__}
