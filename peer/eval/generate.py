"""Text generation: temperature, top-k and top-p sampling with seeds, several prompts at once, with
a key/value cache.

Prompts of different lengths are padded on the left. Rotary positions enter attention as differences
only, so a padded prompt gets the logits that it has alone (up to rounding), and a row's tokens do
not depend on its neighbours: each row draws from a generator of its own. Whatever the cache cannot
go on with (the window is full, so the oldest half is forgotten) is computed anew from the tokens.

Letters: B sequences, T positions, S key positions, V vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from peer.model.decoder import Decoder, KeyValueCache
from protos.contract.errors import UsageError

MAX_SEED = 2**63
_LEAST_TEMPERATURE = 1e-6
"""Below, quotients of logits are no fp32 numbers any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is drawn."""

    temperature: float = 0.8
    """0, and what is below 1e-6, takes the likeliest token always."""
    top_k: int = 0
    """Draw from the k likeliest tokens; 0 = all."""
    top_p: float = 0.95
    """Draw from the likeliest tokens that together have this probability."""
    seed: int = 0
    """Of the first prompt; the next one has the next seed."""

    def __post_init__(self) -> None:
        is_drawable = 0 <= self.temperature < math.inf and self.top_k >= 0 and 0 < self.top_p <= 1
        if not (is_drawable and 0 <= self.seed < MAX_SEED):
            raise UsageError(
                f"temperature {self.temperature}, top_k {self.top_k}, top_p {self.top_p}, seed "
                f"{self.seed}",
                allowed="temperature >= 0, top_k >= 0, 0 < top_p <= 1, seeds of 0 to 2^63 - 1",
                remedy="correct the sampling options",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class NewToken:
    """One step of one row."""

    row: int
    """Index of the prompt."""
    token: int


def next_token_ratios(logits_V: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities to draw from; they add up to 1."""
    if sampling.temperature < _LEAST_TEMPERATURE:
        return torch.nn.functional.one_hot(logits_V.argmax(), logits_V.numel()).float()
    ratios_V = (logits_V.float() / sampling.temperature).softmax(dim=-1)
    sorted_V, order_V = ratios_V.sort(descending=True, stable=True)
    is_kept_V = sorted_V.cumsum(dim=-1) - sorted_V < sampling.top_p
    if sampling.top_k > 0:
        is_kept_V[sampling.top_k :] = False
    kept_V = torch.zeros_like(ratios_V)
    kept_V[order_V[is_kept_V]] = sorted_V[is_kept_V]
    return kept_V / kept_V.sum()


class Context:
    """What the model sees of each row, with or without a cache; `next_logits` is the one way in."""

    def __init__(
        self,
        model: Decoder,
        prompts: Sequence[Sequence[int]],
        *,
        is_prompt_prefix: bool = False,
        has_cache: bool = True,
    ) -> None:
        """`is_prompt_prefix`: the prompt (and what is left after forgetting) is seen in both
        directions, as a model of the objective `prefix` was trained to.
        """
        self._model = model
        self._rows = [list(prompt)[-model.spec.seq_len :] for prompt in prompts]
        self._prefixes = [len(row) for row in self._rows]
        self._is_prompt_prefix = is_prompt_prefix
        self._has_cache = has_cache
        self._cache: KeyValueCache | None = None
        self._hidden_BS: Tensor | None = None
        """True at the positions that pad a row, as far as the cache reaches."""
        self._device = model.norm.weight.device

    def next_logits(self) -> Tensor:
        """logits_BV of the token after each row. On the CPU, fp32."""
        if self._cache is None or not self._has_cache:
            return self._prefill()
        assert self._hidden_BS is not None
        B = len(self._rows)
        fresh_B1 = torch.tensor([[row[-1]] for row in self._rows], device=self._device)
        self._hidden_BS = torch.cat((self._hidden_BS, self._hidden_BS.new_zeros(B, 1)), dim=1)
        mask_B1S = torch.zeros(self._hidden_BS.shape, device=self._device)
        mask_B1S = mask_B1S.masked_fill(self._hidden_BS, -math.inf)[:, None, :]
        logits_B1V: Tensor = self._model(fresh_B1, self._cache, mask_B1S)
        return logits_B1V[:, -1].float().cpu()

    def append(self, tokens_B: Sequence[int]) -> None:
        """Extend every row by one token, forgetting the older half of a row that is full."""
        seq_len = self._model.spec.seq_len
        for index, token in enumerate(tokens_B):
            row = self._rows[index]
            row.append(token)
            if len(row) > seq_len:
                self._rows[index] = row[-(seq_len // 2) :]
                self._prefixes[index] = seq_len // 2
                self._cache = None
        if self._hidden_BS is not None and self._hidden_BS.shape[1] >= seq_len:
            self._cache = None

    def _prefill(self) -> Tensor:
        longest = max(len(row) for row in self._rows)
        num_pads = [longest - len(row) for row in self._rows]
        tokens_BT = torch.tensor(
            [[row[0]] * pads + row for row, pads in zip(self._rows, num_pads, strict=True)],
            device=self._device,
        )
        positions = torch.arange(longest, device=self._device)
        pads_B = torch.tensor(num_pads, device=self._device)
        self._hidden_BS = positions < pads_B[:, None]
        is_seen_BTS = (positions[:, None] >= positions).expand(len(self._rows), -1, -1)
        if self._is_prompt_prefix:
            ends_B = pads_B + torch.tensor(self._prefixes, device=self._device)
            in_prefix_BT = positions < ends_B[:, None]
            is_seen_BTS = is_seen_BTS | (in_prefix_BT[:, :, None] & in_prefix_BT[:, None, :])
        is_self = torch.eye(longest, dtype=torch.bool, device=self._device)
        is_seen_BTS = (is_seen_BTS & ~self._hidden_BS[:, None, :]) | is_self  # no row without a key
        mask_BTS = torch.zeros(is_seen_BTS.shape, device=self._device)
        mask_BTS = mask_BTS.masked_fill(~is_seen_BTS, -math.inf)
        self._cache = self._model.empty_cache()
        logits_BV: Tensor = self._model(tokens_BT, self._cache, mask_BTS, head=_last_logits)
        return logits_BV.float().cpu()


def _last_logits(hidden_BTD: Tensor, weight_VD: Tensor) -> Tensor:
    """logits_BV; those of a whole prompt would be many and are of no use."""
    return F.linear(hidden_BTD[:, -1], weight_VD)


@torch.inference_mode()
def generate_batch(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    eos_token_id: int | None = None,
    is_prompt_prefix: bool = False,
    has_cache: bool = True,
) -> Iterator[NewToken]:
    """Yield new tokens of every row as they come, until its EOS (not yielded) or `max_new_tokens`;
    deterministic for a seed on one machine. Row i draws with seed + i.

    The model sees at most the seq_len newest tokens of a row: when that is full, the older half is
    forgotten. Raises UsageError for an empty prompt or a token outside the vocabulary.
    """
    _check_prompts(prompts, vocab_size=model.spec.vocab_size)
    seeds = [(sampling.seed + row) % MAX_SEED for row in range(len(prompts))]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    context = Context(model, prompts, is_prompt_prefix=is_prompt_prefix, has_cache=has_cache)
    is_done = [False] * len(prompts)
    for _ in range(max_new_tokens):
        logits_BV = context.next_logits()
        tokens_B = []
        for row, generator in enumerate(generators):
            ratios_V = next_token_ratios(logits_BV[row], sampling)
            token = int(torch.multinomial(ratios_V, 1, generator=generator))
            tokens_B.append(token)
            is_done[row] = is_done[row] or token == eos_token_id
            if not is_done[row]:
                yield NewToken(row=row, token=token)
        if all(is_done):
            return
        context.append(tokens_B)


def generate_tokens(
    model: Decoder,
    prompt_tokens: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    eos_token_id: int | None = None,
    is_prompt_prefix: bool = False,
    has_cache: bool = True,
) -> Iterator[int]:
    """`generate_batch` of one prompt."""
    for new in generate_batch(
        model,
        [prompt_tokens],
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        eos_token_id=eos_token_id,
        is_prompt_prefix=is_prompt_prefix,
        has_cache=has_cache,
    ):
        yield new.token


def _check_prompts(prompts: Sequence[Sequence[int]], *, vocab_size: int) -> None:
    if not prompts or not all(prompts):
        raise UsageError(
            "empty prompt", allowed="at least one token", remedy="begin with the EOS token"
        )
    largest = max(max(prompt) for prompt in prompts)
    if largest >= vocab_size:
        raise UsageError(
            f"token {largest} in a prompt",
            allowed=f"tokens below the model's vocabulary of {vocab_size}",
            remedy="use the tokenizer that the model was trained with",
        )
