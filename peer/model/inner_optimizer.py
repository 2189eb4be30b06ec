"""Optimizers of inner steps, which are private to a peer: fast kernels, no bits promised.

`adamw`: decoupled decay of matrices only (Loshchilov and Hutter 2019), fused where torch has it.
`muon`: the momentum of each hidden matrix is made nearly orthogonal by five Newton-Schulz steps
(Jordan et al. 2024) and scaled by 0.2 sqrt(max(rows, columns)), so that its root mean square is
that of AdamW's step and learning rate and decay stay the same (Liu et al. 2025, arXiv 2502.16982,
section 2.2); embedding, head and gains go by AdamW. It holds one moment instead of two for hidden
matrices. Whole matrices are needed, so it cannot work on shards of them. `adamw8bit`: AdamW with
a quarter of the memory for the moments of matrices (adamw8bit.py); slower, and meant for GPUs.
"""

from collections.abc import Sequence

import torch
from torch import nn

from peer.model.adamw8bit import AdamW8bit
from protos.contract.run_spec import OptimizerSpec


def adamw(spec: OptimizerSpec, parameters: Sequence[nn.Parameter]) -> torch.optim.AdamW:
    """AdamW with decoupled decay of matrices only; fused where torch has it."""
    matrices = [p for p in parameters if p.ndim >= 2]
    others = [p for p in parameters if p.ndim < 2]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": spec.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=spec.peak_lr,
        betas=(spec.beta1, spec.beta2),
        eps=spec.epsilon,
        fused=parameters[0].device.type in ("cpu", "cuda"),
    )


class InnerOptimizer:
    """The optimizer that a spec names, over named parameters of a model."""

    def __init__(
        self, spec: OptimizerSpec, named_parameters: Sequence[tuple[str, nn.Parameter]]
    ) -> None:
        """Moments are zero."""
        self.lr = spec.peak_lr
        """Of the last step."""
        hidden, compact, others = [], [], []
        for name, parameter in named_parameters:
            if spec.name == "muon" and parameter.ndim == 2 and name.startswith("layers."):
                hidden.append(parameter)
            elif spec.name == "adamw8bit" and parameter.ndim == 2:
                compact.append(parameter)
            else:
                others.append(parameter)
        self._optimizers: list[torch.optim.Optimizer] = []
        if others:
            self._optimizers.append(adamw(spec, others))
        if compact:
            self._optimizers.append(AdamW8bit(spec, compact))
        if hidden:
            self._optimizers.append(
                torch.optim.Muon(
                    hidden,
                    lr=spec.peak_lr,
                    weight_decay=spec.weight_decay,
                    momentum=spec.muon_momentum,
                    nesterov=True,
                    adjust_lr_fn="match_rms_adamw",
                )
            )

    def step(self, *, lr: float) -> None:
        """One step on the gradients that lie in the parameters."""
        self.lr = lr
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
