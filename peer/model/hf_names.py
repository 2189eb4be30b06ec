"""Names of our parameters in transformers' Llama; shapes and layouts are the same, rotary positions
included.
"""

import re

_LAYER_NAMES = {
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w3": "mlp.up_proj",
    "mlp.w2": "mlp.down_proj",
}
_OTHER_NAMES = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_PATTERN = re.compile(r"layers\.(\d+)\.(.+)\.weight")


def hf_name(name: str) -> str:
    """transformers' name of a parameter of ModelShape.parameter_table()."""
    match = _LAYER_PATTERN.fullmatch(name)
    if match is None:
        return _OTHER_NAMES[name]
    return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.weight"
