"""Import: folders that transformers wrote give the same logits here, and back again; everything the
decoder does not compute is refused.
"""

import errno
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from peer.checkpoint import initial
from peer.checkpoint.export import export_model
from peer.checkpoint.hf_import import load_hf_params, read_hf_config, require_vocabulary
from peer.checkpoint.initial import initial_params, load_initial, save_initial
from peer.checkpoint.model_card import credits_from_status, model_card
from peer.cli.checkpoints import open_checkpoint
from peer.cli.transfer import export, import_model
from peer.home import machine_error_from_os_error
from peer.model.decoder import Decoder, FlatParameters
from peer.model.init import initial_vector
from protos.contract.errors import CorruptDataError, MachineError, MusterError, UsageError
from protos.contract.initial_file import InitialHeader, file_digest
from tests.peer.checkpoint.test_export import TOKENIZER
from tests.peer.model.tiny import SPEC, VARIANTS, build, random_windows

CONFIG = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 12,
    "rope_theta": 4321.0, "rms_norm_eps": 1e-4, "eos_token_id": 0, "bos_token_id": 0,
}  # fmt: skip


def write_folder(folder: Path, *, dtype: str = "float32", shards: bool = False, **changes: Any):
    """A folder as transformers saves it; returns its model."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(5)
    config = transformers.LlamaConfig(**(CONFIG | changes))
    model = transformers.LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()
    model.save_pretrained(folder, **({"max_shard_size": "10KB"} if shards else {}))
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    return model


def logits_of(spec: Any, params: np.ndarray, inputs_BT: torch.Tensor) -> torch.Tensor:
    model = Decoder(spec)
    FlatParameters(model, has_grads=False, values=torch.from_numpy(np.array(params)))
    with torch.inference_mode():
        return model(inputs_BT)


@pytest.mark.parametrize(
    ("dtype", "shards", "changes"),
    [
        ("float32", False, {}),
        ("bfloat16", False, {"tie_word_embeddings": True}),
        ("float32", True, {"num_key_value_heads": 4}),
    ],
)
def test_a_folder_comes_in_and_goes_out_with_the_same_logits(
    tmp_path: Path, dtype: str, shards: bool, changes: dict[str, Any]
) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = write_folder(tmp_path / "hf", dtype=dtype, shards=shards, **changes).float()
    assert (len(list((tmp_path / "hf").glob("*.safetensors"))) > 1) is shards
    import_model(tmp_path / "hf", tmp_path / "in", is_json=True)
    opened = open_checkpoint(tmp_path / "in")
    inputs_BT, _ = random_windows(opened.model_spec, num_windows=2)
    with torch.inference_mode():
        expected = theirs(inputs_BT).logits
    ours = logits_of(opened.model_spec, opened.params, inputs_BT)
    assert float((ours - expected).abs().max()) <= 1e-4
    export(tmp_path / "in", tmp_path / "out", licence="apache-2.0", is_json=True)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.inference_mode():
        assert float((again(inputs_BT).logits - expected).abs().max()) <= 1e-5
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: apache-2.0" in card and opened.provenance["initial_digest"] in card


def test_an_import_that_cannot_be_written_leaves_the_folder_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "hf")

    def full(*_: object) -> str:
        raise machine_error_from_os_error(OSError(errno.ENOSPC, "full"), action="write it")

    (tmp_path / "empty").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(initial, "save_initial", full)
        for folder in (tmp_path / "in", tmp_path / "empty"):
            with pytest.raises(MachineError, match="disk is full"):
                import_model(tmp_path / "hf", folder, is_json=True)
            assert not folder.exists() or not list(folder.iterdir())
    import_model(tmp_path / "hf", tmp_path / "in", is_json=True)


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_what_export_wrote_comes_back_bit_for_bit(tmp_path: Path, variant: str) -> None:
    _, flat = build(VARIANTS[variant])
    (tmp_path / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    export_model(
        VARIANTS[variant],
        flat.values.numpy(),
        folder=tmp_path / "out",
        tokenizer_path=tmp_path / "tokenizer.json",
        eos_token_id=0,
    )
    found = read_hf_config(tmp_path / "out")
    assert found.model == VARIANTS[variant] and found.eos_token_id == 0
    assert np.array_equal(load_hf_params(tmp_path / "out", found.model), flat.values.numpy())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "yarn"),
        ({"model_type": "mistral"}, "mistral"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "SequenceClassification"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"eos_token_id": [1, 2]}, "eos_token_id"),
        ({"num_key_value_heads": 3}, "num_kv_heads"),
        ({"hidden_size": None}, "config.json"),
        ({"num_attention_heads": 0}, "0 is not an integer"),
        ({"max_position_embeddings": math.inf}, "inf is not an integer"),
        ({"rope_parameters": {"rope_theta": math.inf}}, "rope_theta"),
        ({"rms_norm_eps": math.nan}, "norm_epsilon"),
    ],
)
def test_models_that_the_decoder_does_not_compute(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    plain = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]} | CONFIG | changes
    (tmp_path / "config.json").write_text(json.dumps(plain))
    with pytest.raises(MusterError, match=said) as refused:
        read_hf_config(tmp_path)
    assert refused.value.allowed and refused.value.remedy


def test_whole_numbers_may_be_written_with_a_point(tmp_path: Path) -> None:
    plain = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]} | CONFIG
    (tmp_path / "config.json").write_text(json.dumps(plain))
    expected = read_hf_config(tmp_path)
    changes = {"max_position_embeddings": float(plain["max_position_embeddings"])}
    changes["hidden_size"] = float(plain["hidden_size"])
    (tmp_path / "config.json").write_text(json.dumps(plain | changes))
    assert read_hf_config(tmp_path) == expected
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(MusterError, match="does not parse"):
        read_hf_config(tmp_path)


def test_weights_that_are_not_the_configs(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    _, flat = build(SPEC.model)
    (tmp_path / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    export_model(
        SPEC.model, flat.values.numpy(), folder=tmp_path, eos_token_id=0,
        tokenizer_path=tmp_path / "tokenizer.json",
    )  # fmt: skip
    path = tmp_path / "model.safetensors"
    whole, tensors = path.read_bytes(), load_file(path)
    norm, bias = "model.norm.weight", "model.layers.0.self_attn.q_proj.bias"

    def refused(kind: type[MusterError], said: str) -> None:
        with pytest.raises(kind, match=said) as found:
            load_hf_params(tmp_path, SPEC.model)
        assert found.value.allowed and found.value.remedy

    for changed, kind, said in (
        (tensors | {bias: torch.zeros(32)}, UsageError, "q_proj.bias"),
        ({k: v for k, v in tensors.items() if k != norm}, CorruptDataError, "lacks 1"),
        (tensors | {norm: torch.zeros(25)}, UsageError, "25"),
        (tensors | {norm: torch.full((24,), torch.nan)}, CorruptDataError, "not finite"),
        (tensors | {"lm_head.weight": torch.zeros(61, 24)}, UsageError, "tie_word"),
    ):
        save_file(changed, path)
        refused(kind, said)
    path.write_bytes(whole[: len(whole) // 2])
    refused(CorruptDataError, "cannot be read")
    path.rename(tmp_path / "pytorch_model.bin")
    refused(UsageError, "no safetensors")


def test_a_tokenizer_with_more_ids_than_embeddings(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(TOKENIZER))
    require_vocabulary(path, vocab_size=4)
    with pytest.raises(UsageError, match="ids up to 3") as refused:
        require_vocabulary(path, vocab_size=3)
    assert "3" in refused.value.allowed and refused.value.remedy
    path.write_text("{}")
    with pytest.raises(CorruptDataError):
        require_vocabulary(path, vocab_size=3)


def test_a_run_starts_from_the_file_that_its_spec_names(tmp_path: Path) -> None:
    _, flat = build(SPEC.model)
    params = flat.values.numpy()
    header = InitialHeader(
        model=SPEC.model, tokenizer_digest="0" * 64, eos_token_id=0, origin="test"
    )
    path = tmp_path / "initial.safetensors"
    digest = save_initial(path, header, params)
    assert digest == save_initial(tmp_path / "again", header, params) == file_digest(path)
    spec = replace(SPEC, initial_digest=digest)
    assert spec.run_digest != SPEC.run_digest and type(spec).from_wire(spec.to_wire()) == spec
    assert np.array_equal(initial_params(spec, path), params)
    assert np.array_equal(initial_params(SPEC, None), initial_vector(SPEC))
    with pytest.raises(UsageError, match="imported model"):
        initial_vector(spec)
    with pytest.raises(CorruptDataError, match="no file"):
        initial_params(spec, None)
    with pytest.raises(CorruptDataError, match="digest"):
        initial_params(replace(SPEC, initial_digest="ab" * 32), path)
    with pytest.raises(UsageError, match="d_ff") as refused:
        initial_params(replace(spec, model=replace(SPEC.model, d_ff=48)), path)
    assert "d_ff = 40" in refused.value.allowed
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CorruptDataError):
        load_initial(path)


def test_credits_name_only_who_agreed() -> None:
    digest = SPEC.run_digest
    plain = {"run_digest": digest, "credited_tokens_by_peer": {"aa" * 16: 12, "ab" * 16: 36}}
    credits = credits_from_status(plain, run_digest=digest, consenting={"aa": "Anna"})
    assert [(c.who, c.tokens) for c in credits] == [("ab" * 6, 36), ("Anna", 12)]
    card = model_card(
        SPEC.model, run_spec=SPEC, provenance={"run_digest": digest}, manifest=None, credits=credits
    )
    assert all(text in card for text in (digest, SPEC.data.dataset_id, "| Anna | 12 |", "| 48 |"))
    for consenting, run_digest, said in (
        ({"a": "x"}, digest, "2 credited peers"),
        ({"ff": "x"}, digest, "0 credited peers"),
        ({}, "0" * 64, "credits of the run"),
    ):
        with pytest.raises(UsageError, match=said) as refused:
            credits_from_status(plain, run_digest=run_digest, consenting=consenting)
        assert refused.value.allowed and refused.value.remedy
    with pytest.raises(UsageError, match="no credits"):
        credits_from_status([], run_digest=digest, consenting={})
