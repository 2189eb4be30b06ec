"""Text generation: temperature, top-k and top-p sampling with a seed, one token at a time with a
key/value cache.

Letters: B sequences (one here), T positions, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peer.model.decoder import Decoder, KeyValueCache
from protos.contract.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is drawn."""

    temperature: float = 0.8
    """0 takes the likeliest token always."""
    top_k: int = 0
    """Draw from the k likeliest tokens; 0 = all."""
    top_p: float = 0.95
    """Draw from the likeliest tokens that together have this probability."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and self.top_k >= 0 and 0 < self.top_p <= 1):
            raise UsageError(
                f"temperature {self.temperature}, top_k {self.top_k}, top_p {self.top_p}",
                allowed="temperature >= 0, top_k >= 0, 0 < top_p <= 1",
                remedy="correct the sampling options",
            )


def next_token_ratios(logits_V: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities to draw from; they add up to 1."""
    if sampling.temperature == 0:
        return torch.nn.functional.one_hot(logits_V.argmax(), logits_V.numel()).float()
    ratios_V = (logits_V.float() / sampling.temperature).softmax(dim=-1)
    sorted_V, order_V = ratios_V.sort(descending=True, stable=True)
    is_kept_V = sorted_V.cumsum(dim=-1) - sorted_V < sampling.top_p
    if sampling.top_k > 0:
        is_kept_V[sampling.top_k :] = False
    kept_V = torch.zeros_like(ratios_V)
    kept_V[order_V[is_kept_V]] = sorted_V[is_kept_V]
    return kept_V / kept_V.sum()


@torch.inference_mode()
def generate_tokens(
    model: Decoder,
    prompt_tokens: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    eos_token_id: int | None = None,
    is_prompt_prefix: bool = False,
) -> Iterator[int]:
    """Yield new tokens until EOS (not yielded) or `max_new_tokens`; deterministic for a seed on one
    machine.

    The model sees at most its seq_len newest tokens: when that is full, the older half is
    forgotten. `is_prompt_prefix`: the prompt (and what is left after forgetting) is seen in both
    directions, as a model of the objective `prefix` was trained to.
    """
    if not prompt_tokens:
        raise UsageError(
            "empty prompt", allowed="at least one token", remedy="begin with the EOS token"
        )
    device = model.norm.weight.device
    generator = torch.Generator().manual_seed(sampling.seed)
    seq_len = model.spec.seq_len
    context = list(prompt_tokens)[-seq_len:]
    cache: KeyValueCache = model.empty_cache()
    fresh = context
    for _ in range(max_new_tokens):
        if len(context) > seq_len:
            context = context[-(seq_len // 2) :]
            cache, fresh = model.empty_cache(), context
        mask_TS = None
        if is_prompt_prefix and len(fresh) == len(context):
            mask_TS = torch.zeros(len(fresh), len(fresh), device=device)
        logits_BTV = model(torch.tensor([fresh], device=device), cache, mask_TS)
        ratios_V = next_token_ratios(logits_BTV[0, -1].cpu(), sampling)
        token = int(torch.multinomial(ratios_V, 1, generator=generator))
        if token == eos_token_id:
            return
        yield token
        context.append(token)
        fresh = [token]
