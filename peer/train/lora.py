"""Low-rank adapters (Hu et al. 2022, "LoRA") through the library peft, the extra `lora`.

peft adapts torch's linear layers, so the model is opened as transformers' Llama from a folder in
its form; both compute the same logits (tests/peer/checkpoint). Afterwards the adapters are merged,
so the result is a plain model again, and kept beside it in peft's own form.
"""

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from peer.checkpoint.export import named_parameters
from peer.model.decoder import HeadUse
from peer.model.hf_names import hf_name
from protos.contract.digest import Float32Vector
from protos.contract.errors import ErrorCode, MachineError, UsageError
from protos.contract.model_shape import ModelShape
from protos.contract.run_spec import ModelSpec

_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class LoraModel:
    """A model whose adapters are trained and whose weights are not."""

    def __init__(self, folder: Path, *, rank: int) -> None:
        """Open a folder in transformers' form. Raises MachineError without peft, UsageError for a
        rank below 1.
        """
        if rank < 1:
            raise UsageError(f"--lora {rank}", allowed="a rank of at least 1", remedy="8 is usual")
        try:
            from peft import LoraConfig, get_peft_model
            from transformers import LlamaForCausalLM
        except ImportError as error:
            raise MachineError(
                f"peft cannot be imported ({error})",
                allowed="the extra `lora`: peft and transformers",
                remedy="pip install -c ops/constraints.txt '.[lora]' in Muster's folder, or "
                "leave --lora out to train all parameters",
                code=ErrorCode.DEPENDENCY_MISSING,
            ) from error
        config = LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules=_TARGETS, task_type="CAUSAL_LM"
        )
        base = LlamaForCausalLM.from_pretrained(folder).float()  # type: ignore[no-untyped-call]
        self._model: Any = get_peft_model(base, config)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those of the adapters."""
        return [parameter for parameter in self._model.parameters() if parameter.requires_grad]

    def __call__(self, tokens_BT: Tensor, *, head: HeadUse) -> Tensor:
        """`head` of the normed hidden_BTD and the output matrix weight_VD."""
        whole = self._model.get_base_model()
        hidden_BTD = whole.model(tokens_BT, use_cache=False).last_hidden_state
        return head(hidden_BTD, whole.lm_head.weight)

    def save_adapter(self, folder: Path) -> None:
        """In peft's form."""
        self._model.save_pretrained(str(folder))

    def merged(self, spec: ModelSpec) -> Float32Vector:
        """Canonical vector of the model with its adapters added in; ends this object's use."""
        tensors = self._model.merge_and_unload().state_dict()
        params = np.empty(ModelShape.from_spec(spec).num_parameters, dtype=np.float32)
        for name, view in named_parameters(spec, params).items():
            view[...] = tensors[hf_name(name)].float().numpy()
        return params
