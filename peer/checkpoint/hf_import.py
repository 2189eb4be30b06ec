"""A Hugging Face folder of the Llama family as a model of ours, strictly.

What the folder may hold is what the decoder computes: RMSNorm, plain RoPE, SwiGLU without biases,
grouped queries, tied or untied head. Anything else in config.json or among the tensors is refused
with what was found, because a model that loads and computes something else is worse than none.
Weights are F32, BF16 or F16 in one or more safetensors files and become fp32; pickles are never
opened.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from peer.checkpoint.export import named_parameters
from peer.model.hf_names import hf_name
from protos.contract.digest import Float32Vector
from protos.contract.errors import CorruptDataError, UsageError
from protos.contract.model_shape import ModelShape
from protos.contract.run_spec import ModelSpec

MAX_DEFAULT_SEQ_LEN = 4096
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_BUFFER_SUFFIX = ".rotary_emb.inv_freq"  # written by old versions; a function of the config

# Key of config.json -> (what LlamaConfig takes when it is absent, what the decoder computes).
_FIXED: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "model_type": (None, ("llama",)),
    "hidden_act": ("silu", ("silu",)),
    "attention_bias": (False, (False,)),
    "mlp_bias": (False, (False,)),
    "rope_scaling": (None, (None,)),
    "quantization_config": (None, (None,)),
    "partial_rotary_factor": (1.0, (1.0,)),
    "sliding_window": (None, (None,)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class HfModel:
    """What config.json says."""

    model: ModelSpec
    eos_token_id: int


def read_hf_config(
    folder: Path, *, seq_len: int | None = None, eos_token_id: int | None = None
) -> HfModel:
    """Model of a folder; `seq_len` None: its context, at most MAX_DEFAULT_SEQ_LEN.

    Raises CorruptDataError for a folder without a readable config.json, UsageError for a model that
    the decoder does not compute.
    """
    path = folder / "config.json"
    try:
        plain = json.loads(path.read_text())
        max_positions = _whole(plain["max_position_embeddings"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptDataError(
            f"{path} is missing or does not parse ({error!r})",
            allowed="a folder from `muster-peer export` or of a Llama model in transformers' form",
            remedy="name such a folder, or a state file (*.safetensors)",
        ) from error
    _check_architecture(plain)
    if seq_len is not None and not 2 <= seq_len <= max_positions:
        raise UsageError(
            f"--seq-len {seq_len}",
            allowed=f"2 to the model's {max_positions}",
            remedy="choose a window within it",
        )
    try:
        heads = _whole(plain["num_attention_heads"])
        width = _whole(plain["hidden_size"])
        spec = ModelSpec(
            vocab_size=_whole(plain["vocab_size"]),
            d_model=width,
            num_layers=_whole(plain["num_hidden_layers"]),
            num_heads=heads,
            num_kv_heads=_whole(_or(plain.get("num_key_value_heads"), heads)),
            head_dim=_whole(_or(plain.get("head_dim"), width // heads)),
            d_ff=_whole(plain["intermediate_size"]),
            seq_len=seq_len or min(max_positions, MAX_DEFAULT_SEQ_LEN),
            has_tied_embeddings=bool(plain.get("tie_word_embeddings", False)),
            rope_theta=_rope_theta(plain),
            norm_epsilon=float(plain.get("rms_norm_eps", 1e-6)),
        )
    except UsageError as error:  # a number that no model of ours has
        raise CorruptDataError(
            f"{path}: {error.found}",
            allowed=error.allowed,
            remedy="correct config.json, or name another model",
        ) from error
    except (KeyError, ValueError, TypeError, ArithmeticError) as error:
        raise CorruptDataError(
            f"{path}: {error!r}",
            allowed="the numbers of a Llama model",
            remedy="fetch the folder again",
        ) from error
    return HfModel(model=spec, eos_token_id=_eos_token_id(plain, eos_token_id, spec.vocab_size))


def load_hf_params(folder: Path, spec: ModelSpec) -> Float32Vector:
    """Canonical vector of a folder's weights. Raises CorruptDataError, UsageError."""
    params = np.empty(ModelShape.from_spec(spec).num_parameters, dtype=np.float32)
    target_by_name = {hf_name(n): view for n, view in named_parameters(spec, params).items()}
    missing = set(target_by_name)
    tied_head: torch.Tensor | None = None
    for name, tensor in _tensors(folder):
        if name.endswith(_BUFFER_SUFFIX):
            continue
        if name == _HEAD and spec.has_tied_embeddings:
            tied_head = tensor
            continue
        if name not in missing:
            raise UsageError(
                f"{folder} has a tensor {name}",
                allowed="the weights of a Llama model without biases, each once",
                remedy="import a model of that family",
            )
        target = target_by_name[name]
        if tuple(tensor.shape) != target.shape or tensor.dtype not in _DTYPES:
            raise UsageError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)}",
                allowed=f"float32, bfloat16 or float16 of shape {target.shape}",
                remedy="import an unquantised model whose config.json is its own",
            )
        target[...] = tensor.float().numpy()
        missing.discard(name)
    if missing:
        raise CorruptDataError(
            f"{folder} lacks {len(missing)} tensors, such as {min(missing)}",
            allowed="all weights that config.json asks for",
            remedy="fetch the folder again",
        )
    if tied_head is not None and not np.array_equal(
        tied_head.float().numpy(), target_by_name[_EMBEDDING]
    ):
        raise UsageError(
            f"{folder}: tie_word_embeddings, yet {_HEAD} differs from the embedding",
            allowed="a tied head that is the embedding, or tie_word_embeddings = false",
            remedy="correct config.json",
        )
    if not np.isfinite(params).all():
        raise CorruptDataError(
            f"{folder} holds weights that are not finite",
            allowed="finite values only enter a model",
            remedy="fetch the folder again",
        )
    return params


def require_vocabulary(tokenizer_path: Path, *, vocab_size: int) -> None:
    """Raise UsageError if the tokenizer has ids that the model has no embedding for."""
    try:
        plain = json.loads(tokenizer_path.read_bytes())
        words = plain["model"]["vocab"]
        ids = list(words.values()) if isinstance(words, dict) else [len(words) - 1]
        ids += [int(token["id"]) for token in plain.get("added_tokens", [])]
        num_ids = max(ids) + 1
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptDataError(
            f"{tokenizer_path}: {error!r}",
            allowed="the tokenizer.json of the model",
            remedy="put it beside the model",
        ) from error
    if num_ids > vocab_size:
        raise UsageError(
            f"{tokenizer_path} has ids up to {num_ids - 1}",
            allowed=f"ids below the model's vocabulary of {vocab_size}",
            remedy="use the tokenizer that the model was trained with",
        )


def _check_architecture(plain: dict[str, Any]) -> None:
    for key, (default, allowed) in _FIXED.items():
        found = _or(plain.get(key), default)
        if key == "rope_scaling" and isinstance(found, dict):
            found = None if _rope_type(found) == "default" else found
        if found not in allowed:
            raise _unsupported(f"{key} = {found!r}", " or ".join(map(repr, allowed)))
    rope_type = _rope_type(_rope(plain))
    if rope_type != "default":
        raise _unsupported(f"rope_type = {rope_type!r}", "'default', without scaling")
    names = plain.get("architectures") or ["LlamaForCausalLM"]
    if names != ["LlamaForCausalLM"]:
        raise _unsupported(f"architectures = {names}", "LlamaForCausalLM")


def _unsupported(found: str, allowed: str) -> UsageError:
    return UsageError(
        f"config.json: {found}",
        allowed=allowed,
        remedy="import another model: Muster's decoder is Llama's, without biases or scaled RoPE",
    )


def _rope(plain: dict[str, Any]) -> dict[str, Any]:
    found = plain.get("rope_parameters")
    return found if isinstance(found, dict) else {}


def _rope_theta(plain: dict[str, Any]) -> float:
    found = float(_rope(plain).get("rope_theta", plain.get("rope_theta", 10_000.0)))
    if not math.isfinite(found):
        raise ValueError(f"rope_theta {found}")
    return found


def _rope_type(rope: dict[str, Any]) -> str:
    return str(rope.get("rope_type", rope.get("type", "default")))


def _eos_token_id(plain: dict[str, Any], wanted: int | None, vocab_size: int) -> int:
    found = plain.get("eos_token_id") if wanted is None else wanted
    if type(found) is not int or not 0 <= found < vocab_size:
        raise UsageError(
            f"eos_token_id = {found!r}",
            allowed=f"one id below {vocab_size} that ends a document",
            remedy="name one with `muster-peer import FOLDER DIR --eos-token-id N`, then use DIR",
        )
    return found


def _whole(value: Any) -> int:
    """An integer from 1 up, also where JSON writes 4096.0. Raises ValueError."""
    is_whole = type(value) is int or (isinstance(value, float) and value.is_integer())
    if not is_whole or value < 1:
        raise ValueError(f"{value!r} is not an integer from 1 up")
    return int(value)


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the folder's safetensors files, one at a time."""
    paths = sorted(folder.glob("*.safetensors"))
    paths = [path for path in paths if path.name.startswith("model")] or paths
    if not paths:
        raise UsageError(
            f"{folder} has no safetensors file",
            allowed="model.safetensors, or model-*.safetensors; pickles are not opened",
            remedy="save the model with safe_serialization=True",
        )
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    yield name, file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CorruptDataError(
                f"{path} cannot be read ({error})",
                allowed="a whole safetensors file",
                remedy="fetch it again; it may be truncated",
            ) from error
