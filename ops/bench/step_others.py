"""Other people's decoders for ops/bench/step, loaded from where who runs it has put them.

nanoGPT, torchtitan (release 0.2.2) and lingua are not packages that could be depended on: their
model files are imported as they are, and modules that these import but a training step does not use
(tokenizers, job configs, xformers) are stood in for by empty ones. Hugging Face's Llama comes from
the installed transformers. All are given the same width, depth, heads and data.
"""

import importlib
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from protos.contract.run_spec import ModelSpec

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """A model that can be trained, and what its step costs."""

    name: str
    model: nn.Module
    loss: Loss
    """(inputs_BT, labels_BT) -> mean loss."""
    num_matmul_parameters: int

    def flop_per_token(self, spec: ModelSpec) -> float:
        """By the convention of contract/model_shape.py."""
        attention = 12 * spec.num_layers * spec.num_heads * spec.head_dim * spec.seq_len
        return 6.0 * self.num_matmul_parameters + attention


def _count(model: nn.Module, *, look_ups: tuple[str, ...] = ()) -> int:
    named = model.named_parameters()
    return sum(p.numel() for name, p in named if p.ndim == 2 and name not in look_ups)


class _Anything(types.ModuleType):
    """A module in which every name is an empty class."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (), {})
        setattr(self, name, made)
        return made


def _stand_in(*names: str) -> None:
    for name in names:
        sys.modules.setdefault(name, _Anything(name))


def _bare_package(name: str, path: Path) -> None:
    """A package whose own __init__ is not run."""
    package = types.ModuleType(name)
    package.__path__ = [str(path)]
    sys.modules[name] = package


def hugging_face(spec: ModelSpec) -> Contender:
    """LlamaForCausalLM of the installed transformers, sdpa attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=spec.vocab_size,
        hidden_size=spec.d_model,
        intermediate_size=spec.d_ff,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_heads,
        num_key_value_heads=spec.num_kv_heads,
        max_position_embeddings=spec.seq_len,
        tie_word_embeddings=True,
        use_cache=False,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)

    def loss(inputs_BT: Tensor, labels_BT: Tensor) -> Tensor:
        logits = model(input_ids=inputs_BT).logits.float()
        return F.cross_entropy(logits.flatten(0, 1), labels_BT.flatten())

    return Contender(name="hf-llama", model=model, loss=loss, num_matmul_parameters=_count(model))


def nano_gpt(spec: ModelSpec, root: Path) -> Contender:
    """karpathy/nanoGPT model.py: LayerNorm, GELU, learned positions, tied."""
    sys.path.insert(0, str(root))
    module = importlib.import_module("model")
    sys.path.pop(0)
    config = module.GPTConfig(
        block_size=spec.seq_len,
        vocab_size=spec.vocab_size,
        n_layer=spec.num_layers,
        n_head=spec.num_heads,
        n_embd=spec.d_model,
        dropout=0.0,
        bias=False,
    )
    model = module.GPT(config)

    def loss(inputs_BT: Tensor, labels_BT: Tensor) -> Tensor:
        out: Tensor = model(inputs_BT, labels_BT)[1]
        return out

    count = _count(model, look_ups=("transformer.wpe.weight",))
    return Contender(name="nanogpt", model=model, loss=loss, num_matmul_parameters=count)


def torchtitan_llama3(spec: ModelSpec, root: Path) -> Contender:
    """pytorch/torchtitan models/llama3 of release 0.2.2, sdpa; its head is not tied."""
    top = root / "torchtitan"
    for name in ("", ".models", ".models.llama3", ".models.llama3.model", ".protocols"):
        _bare_package("torchtitan" + name, top.joinpath(*name.split(".")[1:]))
    _bare_package("torchtitan.components", top / "components")
    _bare_package("torchtitan.tools", top / "tools")
    _stand_in(
        *("torchtitan.config", "torchtitan.components.tokenizer", "torchtitan.protocols.model"),
        *("torchtitan.protocols.train_spec", "torchtitan.tools.logging", "torchtitan.models.utils"),
    )
    sys.modules["torchtitan.models.utils"].trunc_normal_ = nn.init.trunc_normal_  # type: ignore[attr-defined]

    class Protocol(nn.Module):
        def __init__(self, model_args: object) -> None:
            super().__init__()

    sys.modules["torchtitan.protocols.train_spec"].ModelProtocol = Protocol  # type: ignore[attr-defined]
    module = importlib.import_module("torchtitan.models.llama3.model.model")
    arguments = importlib.import_module("torchtitan.models.llama3.model.args")
    model = module.Transformer(
        arguments.TransformerModelArgs(
            dim=spec.d_model,
            n_layers=spec.num_layers,
            n_heads=spec.num_heads,
            n_kv_heads=spec.num_kv_heads,
            vocab_size=spec.vocab_size,
            max_seq_len=spec.seq_len,
        )
    )
    model.init_weights()

    def loss(inputs_BT: Tensor, labels_BT: Tensor) -> Tensor:
        logits = model(inputs_BT)
        return F.cross_entropy(logits.flatten(0, 1).float(), labels_BT.flatten())

    count = _count(model, look_ups=("tok_embeddings.weight",))
    return Contender(name="torchtitan", model=model, loss=loss, num_matmul_parameters=count)


def lingua(spec: ModelSpec, root: Path) -> Contender:
    """facebookresearch/lingua apps/main, sdpa attention, tied."""
    _bare_package("xformers", root)
    _stand_in("xformers.ops")
    sys.path.insert(0, str(root))
    module = importlib.import_module("apps.main.transformer")
    sys.path.pop(0)
    model = module.LMTransformer(
        module.LMTransformerArgs(
            dim=spec.d_model,
            n_layers=spec.num_layers,
            n_heads=spec.num_heads,
            n_kv_heads=spec.num_kv_heads,
            vocab_size=spec.vocab_size,
            max_seqlen=spec.seq_len,
            weight_tying=True,
        )
    )
    model.init_weights()

    def loss(inputs_BT: Tensor, labels_BT: Tensor) -> Tensor:
        out: Tensor = model(inputs_BT, labels_BT, attn_impl="sdpa")
        return out

    return Contender(name="lingua", model=model, loss=loss, num_matmul_parameters=_count(model))


def compiled(contender: Contender) -> Contender:
    """The same model, its loss under torch.compile as a whole."""
    return Contender(
        name=contender.name + "-compiled",
        model=contender.model,
        loss=torch.compile(contender.loss, dynamic=False),
        num_matmul_parameters=contender.num_matmul_parameters,
    )
