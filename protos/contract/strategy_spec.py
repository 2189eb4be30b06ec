"""How peers train together: the `strategy` table of the RunSpec.

`sync` averages gradients and makes one exact update per round; `diloco` averages what many inner
steps have changed, with optional fragments, overlap and mixing (the names of the papers stand with
the fields). Settings that would have no effect are refused.
"""

import dataclasses
from dataclasses import dataclass

from protos.contract import codecs_wire
from protos.contract.digest import STATE_LAYOUTS
from protos.contract.errors import UsageError

STRATEGIES: tuple[str, ...] = ("sync", "diloco")
FRAGMENT_ORDERS: tuple[str, ...] = ("strided", "sequential")
ADDED_LATER = {"is_added_later": True}
"""Metadata of a field of the RunSpec that the first runs did not have; see run_spec.py."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StrategySpec:
    """How peers train together."""

    name: str = "sync"
    global_batch_tokens: int = 4_096
    """sync: tokens of one outer step over the whole swarm. diloco: batch of the one-process run
    that a result is compared with.
    """
    codec: str = "fp32"
    """How averaged vectors travel; see codecs_wire."""
    inner_steps: int = 30
    """diloco: inner steps of an average peer between two outer steps of the same fragment (H)."""
    inner_batch_tokens: int = 1_024
    """diloco: tokens of one inner step of one peer; whole windows."""
    outer_lr: float = 0.7
    """diloco: learning rate of the outer Nesterov momentum."""
    outer_momentum: float = 0.9
    num_fragments: int = 1
    """diloco: parts of the model that take turns, one per outer step (Streaming DiLoCo's P)."""
    fragment_order: str = "strided"
    """strided: layer i is in fragment i mod num_fragments; sequential: runs of layers."""
    overlap_inner_steps: int = 0
    """diloco: inner steps that may be trained while a fragment travels (Streaming DiLoCo's tau)."""
    mix_ratio: float = 0.0
    """diloco: share of the difference from the other peers that stays in the local parameters when
    a fragment arrives (Streaming DiLoCo's alpha).
    """

    def __post_init__(self) -> None:
        check_setting(
            self.name in STRATEGIES, "strategy.name", self.name, "one of " + ", ".join(STRATEGIES)
        )
        check_setting(
            self.global_batch_tokens >= 1,
            "strategy.global_batch_tokens",
            self.global_batch_tokens,
            ">= 1",
        )
        codecs_wire.check_codec(self.codec)
        if self.name == "diloco":
            self._check_diloco()
        else:
            self._check_diloco_is_unset()

    def _check_diloco(self) -> None:
        for name in ("inner_steps", "inner_batch_tokens", "num_fragments"):
            check_setting(
                getattr(self, name) >= 1, f"strategy.{name}", getattr(self, name), "at least 1"
            )
        check_setting(self.outer_lr > 0, "strategy.outer_lr", self.outer_lr, "above 0")
        for name in ("outer_momentum", "mix_ratio"):
            value = getattr(self, name)
            check_setting(0 <= value < 1, f"strategy.{name}", value, "0 <= value < 1")
        check_setting(
            self.fragment_order in FRAGMENT_ORDERS,
            "strategy.fragment_order",
            self.fragment_order,
            "one of " + ", ".join(FRAGMENT_ORDERS),
        )
        check_setting(
            self.inner_steps % self.num_fragments == 0,
            "strategy.num_fragments",
            self.num_fragments,
            f"a divisor of strategy.inner_steps = {self.inner_steps}",
        )
        check_setting(
            0 <= self.overlap_inner_steps < self.inner_steps // self.num_fragments,
            "strategy.overlap_inner_steps",
            self.overlap_inner_steps,
            f"0 to {self.inner_steps // self.num_fragments - 1}, less than the inner steps of one"
            " outer step (inner_steps / num_fragments)",
        )

    def _check_diloco_is_unset(self) -> None:
        """A setting without effect is a mistake, not a detail."""
        for spec_field in dataclasses.fields(self):
            if spec_field.name in ("name", "global_batch_tokens", "codec"):
                continue
            value = getattr(self, spec_field.name)
            check_setting(
                value == spec_field.default,
                f"strategy.{spec_field.name}",
                value,
                f"left out with strategy.name = {self.name!r}; it belongs to diloco",
            )

    @property
    def state_vectors(self) -> tuple[str, ...]:
        """Names of the replicated vectors, in the order of the state's digest."""
        return STATE_LAYOUTS[self.name]

    def round_tokens(self, num_contributors: int) -> int:
        """Planned tokens of one outer step over the whole swarm."""
        if self.name == "sync":
            return self.global_batch_tokens
        inner_steps = self.inner_steps // self.num_fragments
        return num_contributors * inner_steps * self.inner_batch_tokens

    def round_unit_tokens(self, seq_len: int) -> int:
        """Round budgets are multiples of this: windows, or whole inner steps."""
        return seq_len if self.name == "sync" else self.inner_batch_tokens


def check_setting(is_allowed: bool, name: str, value: object, allowed: str) -> None:
    """Raise UsageError, with what is allowed, unless it is."""
    if not is_allowed:
        raise UsageError(
            f"{name} = {value!r}",
            allowed=f"{name} must be {allowed}",
            remedy=f"correct {name}: in the spec's file, or in the flag that gives it",
        )
