"""The laws that a plan may use: where N comes from, how loss is known, how far both were measured.

An allocation law (N of C alone) is joined to a loss law by shifting the latter along its frontier
(sizing.anchored), so that every effect and every cost is computed from one law. Without a loss law
of its own an allocation takes Besiroglu's.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from coordinator.scaling.constants import ALLOCATIONS, LOSS_LAWS
from coordinator.scaling.laws import AllocationLaw, LossLaw, Optimum, RatioLaw
from coordinator.scaling.sizing import Growth, anchored, growth_per_tenfold
from protos.contract.errors import UsageError

DEFAULT_LAW = "chinchilla"
TRANSFER_ERROR_RATIO = 0.082
"""Mean error of published constants on somebody else's corpus (Muennighoff's 182 runs)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanLaw:
    """One law to plan with."""

    name: str
    loss_law: LossLaw
    allocation: LossLaw | AllocationLaw | RatioLaw | None
    """None: N comes from the loss law."""
    smallest_flop: float
    """Smallest compute among the runs that it was fitted on."""
    largest_flop: float
    """Largest of them."""
    source: str
    band_ratio_at: Callable[[float], float]
    """Half-width of the 90 % band of its predicted loss at a compute, as a share of the loss."""
    band_reason: str
    params_interval_at: Callable[[float], tuple[float, float]] | None = None
    """95 % interval of N_opt at a compute, where the fit gives one."""
    fit_reasons: tuple[str, ...] = ()
    """How own runs were fitted."""
    warnings: tuple[str, ...] = ()

    def at(self, compute_flop: float) -> LossLaw:
        """The loss law whose optimum at `compute_flop` is this law's."""
        if self.allocation is None:
            return self.loss_law
        return anchored(self.loss_law, self.allocation.optimum(compute_flop))

    def optimum(self, compute_flop: float) -> Optimum:
        """Compute-optimal N and D at C = 6 N D."""
        return self.at(compute_flop).optimum(compute_flop)

    def compute_for_params(self, params_n: float) -> float:
        """The C at which `params_n` is optimal."""
        law = self.loss_law if self.allocation is None else self.allocation
        exponent = law.params_exponent
        at_one = law.optimum(1e20).params_n
        return float(1e20 * (params_n / at_one) ** (1 / exponent))

    @property
    def measured_flop(self) -> tuple[float, float]:
        """Smallest and largest compute among its runs."""
        return self.smallest_flop, self.largest_flop

    @property
    def growth(self) -> Growth:
        """What ten times the compute does to N and D."""
        law = self.loss_law if self.allocation is None else self.allocation
        return growth_per_tenfold(law.params_exponent)


_FIGURE_4 = (1.4e18, 1.3e22)
_TRANSFER_REASON = (
    "constants of another corpus and tokenizer were off by "
    f"{TRANSFER_ERROR_RATIO:.1%} on average where that was measured; your own runs "
    "(--observations) narrow this"
)
# law -> (allocation or None, loss law, (smallest, largest) compute among its runs; those of Kaplan
# and Muennighoff are our reckoning from sizes and tokens, to a power of ten)
_PARTS: Mapping[str, tuple[str | None, str, tuple[float, float]]] = {
    "chinchilla": ("hoffmann-a1", "besiroglu", _FIGURE_4),
    "chinchilla-ratio": ("chinchilla-ratio", "besiroglu", _FIGURE_4),
    "hoffmann-a3": (None, "hoffmann-a3", _FIGURE_4),
    "hoffmann-a3-unrounded": (None, "hoffmann-a3-unrounded", _FIGURE_4),
    "besiroglu": (None, "besiroglu", _FIGURE_4),
    "huber-240": (None, "huber-240", _FIGURE_4),
    "kaplan": ("kaplan", "kaplan-joint", (1e14, 2e20)),
    "porian": ("porian", "besiroglu", (1.25e16, 2.56e19)),
    "deepseek": ("deepseek", "besiroglu", (1e17, 3e20)),
    "llama3": ("llama3", "besiroglu", (6e18, 1e22)),
    "muennighoff": (None, "muennighoff", (4e15, 1e22)),
}
LAW_NAMES: tuple[str, ...] = tuple(_PARTS)


def published_law(name: str) -> PlanLaw:
    """A law of the literature by its name. Raises UsageError for an unknown one."""
    if name not in _PARTS:
        raise UsageError(
            f"law {name!r}", allowed=", ".join(LAW_NAMES), remedy="name one of them in --law"
        )
    allocation, loss, (smallest_flop, largest_flop) = _PARTS[name]
    loss_law = LOSS_LAWS[loss]
    source = loss_law.source
    if allocation is not None:
        source = f"N: {ALLOCATIONS[allocation].source}; loss: {source}"
    return PlanLaw(
        name=name,
        loss_law=loss_law.law,
        allocation=None if allocation is None else ALLOCATIONS[allocation].law,
        smallest_flop=smallest_flop,
        largest_flop=largest_flop,
        source=source,
        band_ratio_at=lambda _: TRANSFER_ERROR_RATIO * 2.06,  # mean of |x| to 90 % of a normal
        band_reason=_TRANSFER_REASON,
    )


_OPINIONS = ("chinchilla", "besiroglu", "porian", "deepseek", "llama3", "muennighoff")
"""Laws that nobody has refuted."""


def opinions(compute_flop: float) -> dict[str, float]:
    """N_opt by every published law that stands."""
    return {name: published_law(name).optimum(compute_flop).params_n for name in _OPINIONS}
