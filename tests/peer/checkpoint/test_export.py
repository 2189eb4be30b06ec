"""Export: transformers loads the folder and computes the same logits."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from peer.checkpoint.export import export_model
from protos.contract.errors import CorruptDataError
from tests.peer.model.tiny import SPEC, VARIANTS, build, random_windows

BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}
TOKENIZER = {
    "version": "1.0",
    "added_tokens": [
        {
            "id": 0,
            "content": "<|endoftext|>",
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
    ],
    "pre_tokenizer": BYTE_LEVEL,
    "decoder": BYTE_LEVEL,
    "model": {
        "type": "BPE",
        "vocab": {"<|endoftext|>": 0, "a": 1, "b": 2, "ab": 3},
        "merges": ["a b"],
    },
}


@pytest.fixture
def tokenizer_path(tmp_path: Path) -> Path:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(TOKENIZER))
    return path


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_transformers_computes_the_same_logits(
    tmp_path: Path, tokenizer_path: Path, variant: str
) -> None:
    transformers = pytest.importorskip("transformers")
    spec = replace(SPEC, model=replace(VARIANTS[variant], rope_theta=1234.0, norm_epsilon=1e-4))
    model, flat = build(spec.model)
    with torch.no_grad():
        flat.values += 0.1 * torch.randn(
            flat.values.numel(), generator=torch.Generator().manual_seed(1)
        )
    folder = tmp_path / "exported"
    export_model(
        spec.model,
        flat.values.numpy(),
        folder=folder,
        tokenizer_path=tokenizer_path,
        eos_token_id=0,
        provenance={"state_digest": "ff"},
    )
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder).float().eval()
    inputs_BT, _ = random_windows(spec.model, num_windows=3)
    with torch.inference_mode():
        difference = (theirs(inputs_BT).logits - model(inputs_BT)).abs().max()
    assert float(difference) <= 1e-4
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.encode("ab") == [3] and tokenizer.eos_token == "<|endoftext|>"


def test_a_vector_of_another_model_is_refused(tmp_path: Path, tokenizer_path: Path) -> None:
    _, flat = build(VARIANTS["untied"])
    with pytest.raises(CorruptDataError, match="parameters"):
        export_model(
            SPEC.model,
            flat.values.numpy(),
            folder=tmp_path / "out",
            tokenizer_path=tokenizer_path,
            eos_token_id=0,
        )
