"""Export of a trained model as a Hugging Face folder that transformers.LlamaForCausalLM loads.

config.json, model.safetensors (fp32, transformers' names, no permutation needed),
generation_config.json and the tokenizer's files. The metadata of model.safetensors names run, state
and version, so a file can be traced back to its run.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peer.checkpoint.safetensors_io import Float32Array, save_tensors
from peer.model.hf_names import hf_name
from protos.contract.digest import Float32Vector
from protos.contract.errors import CorruptDataError, ErrorCode, MachineError
from protos.contract.model_shape import ModelShape
from protos.contract.run_spec import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassifierHead:
    """Classes of the last token's final hidden state."""

    weight: Float32Array
    """(classes, d_model)."""
    class_names: tuple[str, ...]

    def config(self, *, pad_token_id: int) -> dict[str, Any]:
        """What config.json says of it; transformers classifies the last token that pads nothing."""
        return {
            "architectures": ["LlamaForSequenceClassification"],
            "id2label": {str(index): name for index, name in enumerate(self.class_names)},
            "label2id": {name: index for index, name in enumerate(self.class_names)},
            "num_labels": len(self.class_names),
            "pad_token_id": pad_token_id,
        }


def named_parameters(spec: ModelSpec, params: Float32Vector) -> dict[str, Float32Array]:
    """Views of the canonical vector by parameter name.

    Raises CorruptDataError for a vector of another model.
    """
    table = ModelShape.from_spec(spec).parameter_table()
    num_values = sum(math.prod(shape) for _, shape in table)
    if params.size != num_values:
        raise CorruptDataError(
            f"{params.size} parameters",
            allowed=f"the {num_values} of the run's model",
            remedy="use the checkpoint with its own run spec",
        )
    views: dict[str, Float32Array] = {}
    offset = 0
    for name, shape in table:
        end = offset + math.prod(shape)
        views[name] = params[offset:end].reshape(shape)
        offset = end
    return views


def hf_config(spec: ModelSpec, *, eos_token_id: int) -> dict[str, Any]:
    """Contents of config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.d_model,
        "intermediate_size": spec.d_ff,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": spec.seq_len,
        "rms_norm_eps": spec.norm_epsilon,
        "rope_theta": spec.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": spec.rope_theta},
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": spec.has_tied_embeddings,
        "bos_token_id": eos_token_id,
        "eos_token_id": eos_token_id,
        "torch_dtype": "float32",
        "use_cache": True,
    }


def export_model(
    spec: ModelSpec,
    params: Float32Vector,
    *,
    folder: Path,
    tokenizer_path: Path,
    eos_token_id: int,
    provenance: Mapping[str, str | int] | None = None,
    card: str = "",
    classifier: ClassifierHead | None = None,
) -> None:
    """Write the folder; existing files of these names are replaced. `card`: text of README.md. With
    a `classifier` it is a folder for transformers.LlamaForSequenceClassification.

    Raises MachineError, CorruptDataError.
    """
    tensors = {hf_name(name): view for name, view in named_parameters(spec, params).items()}
    metadata = {"format": "pt"} | {key: str(value) for key, value in (provenance or {}).items()}
    config = hf_config(spec, eos_token_id=eos_token_id)
    if classifier is not None:
        tensors.pop("lm_head.weight", None)
        tensors["score.weight"] = classifier.weight
        config |= classifier.config(pad_token_id=eos_token_id)
    tokenizer_bytes = tokenizer_path.read_bytes()
    eos_token = _token_of_id(tokenizer_bytes, eos_token_id, path=tokenizer_path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(folder / "model.safetensors", tensors, metadata)
        (folder / "tokenizer.json").write_bytes(tokenizer_bytes)
        for name, plain in {
            "config.json": config,
            "generation_config.json": {"bos_token_id": eos_token_id, "eos_token_id": eos_token_id},
            "tokenizer_config.json": {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": eos_token,
                "eos_token": eos_token,
                **({} if classifier is None else {"pad_token": eos_token}),
                "model_max_length": spec.seq_len,
                "clean_up_tokenization_spaces": False,
            },
        }.items():
            (folder / name).write_text(json.dumps(plain, indent=2) + "\n")
        if card:
            (folder / "README.md").write_text(card)
    except OSError as error:
        raise MachineError(
            f"cannot write {folder}: {error.strerror or error}",
            allowed="a writable folder",
            remedy="choose another folder or free space",
            code=ErrorCode.PERMISSION_DENIED,
        ) from error


def _token_of_id(tokenizer_bytes: bytes, token_id: int, *, path: Path) -> str:
    try:
        plain = json.loads(tokenizer_bytes)
        by_id = {int(index): str(token) for token, index in plain["model"]["vocab"].items()}
        by_id |= {
            int(token["id"]): str(token["content"]) for token in plain.get("added_tokens", [])
        }
        return by_id[token_id]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptDataError(
            f"tokenizer {path}: {error!r}",
            allowed=f"a tokenizer.json with a token {token_id}",
            remedy="fetch it again",
        ) from error
