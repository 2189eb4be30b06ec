"""Published constants of every law in one table, each with its source and how sure we are of it.

Units: N parameters, D and batches tokens, C FLOP, loss nats per token. Exponents differ between
corpora, recipes and above all between ways of counting N, so fit your own runs where there are any;
these are what to use before, and what to compare with.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Generic, TypeVar

from coordinator.scaling.laws import (
    AllocationLaw,
    LossLaw,
    PowerRule,
    RatioLaw,
    RepetitionLaw,
    ReplicaPenalty,
)

Law = TypeVar("Law")


class Confidence(StrEnum):
    """How the constants came here."""

    MEASURED = "measured"
    """Recomputed by us from published points."""
    READ = "read"
    """Read in the authors' text, code or stored results."""
    QUOTED = "quoted"
    """Several independent notes agree; the original was not read."""
    MEMORY = "memory"
    """From memory, unchecked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Published(Generic[Law]):
    """One law with its constants."""

    law: Law
    source: str
    confidence: Confidence
    counting: str
    """What N counts, as the source says."""
    note: str = ""
    unit: str = ""
    """Of a rule's value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A number with the interval that its source gives; equal ends where it gives none."""

    value: float
    low: float
    high: float


_PF_DAY_FLOP = 8.64e19
_KAPLAN = "Kaplan et al. 2020, arXiv 2001.08361"
_HOFFMANN = "Hoffmann et al. 2022, arXiv 2203.15556"
_BESIROGLU = "Besiroglu et al. 2024, arXiv 2404.10102, notebook"
_PORIAN = "Porian et al. 2024, arXiv 2406.19146"
_MUENNIGHOFF = "Muennighoff et al. 2023, arXiv 2305.16264, repository"
_DEEPSEEK = "DeepSeek LLM 2024, arXiv 2401.02954"
_LLAMA3 = "Llama 3 2024, arXiv 2407.21783"
_CHARLES = "Charles et al. 2025, arXiv 2503.09799, H = 30"
_STEP_LAW = "Step Law 2025, arXiv 2503.04715, coefficient file"
_BJORCK = "Bjorck et al. 2024 (Microsoft)"
_ALL = "all parameters"
_WITHOUT_EMBEDDING = "without embeddings and head"
_WITH_HEAD = "matrices and head, without the input embedding"

LOSS_LAWS: Mapping[str, Published[LossLaw]] = {
    "hoffmann-a3": Published(
        law=LossLaw(e_nats=1.69, a=406.4, b=410.7, alpha=0.34, beta=0.28),
        source=f"{_HOFFMANN}, approach 3, as printed",
        confidence=Confidence.READ,
        counting=_ALL,
        note="contradicts its own approach 1 (half its N at 1e24 FLOP); refuted by Besiroglu",
    ),
    "hoffmann-a3-unrounded": Published(
        law=LossLaw(e_nats=1.6934, a=406.4, b=410.7, alpha=0.33917, beta=0.28491),
        source=f"{_HOFFMANN}, approach 3, exponents from the figure's source",
        confidence=Confidence.READ,
        counting=_ALL,
        note="e_nats beyond two digits from memory",
    ),
    "besiroglu": Published(
        law=LossLaw(e_nats=1.81686, a=482.006, b=2085.43, alpha=0.34781, beta=0.36585),
        source=_BESIROGLU,
        confidence=Confidence.READ,
        counting=_ALL,
        note="least absolute deviations, 240 points of Hoffmann's figure 4; copies print E 1.8172",
    ),
    "huber-240": Published(
        law=LossLaw(e_nats=1.8172, a=477.83, b=2143.4, alpha=0.34731, beta=0.36717),
        source="the same 240 points, Huber with delta 1e-3",
        confidence=Confidence.MEASURED,
        counting=_ALL,
    ),
    "kaplan-joint": Published(
        law=LossLaw(
            e_nats=0.0, a=8.8e13 ** (0.076 / 0.095), b=5.4e13, alpha=0.8, beta=1.0, kappa=0.095
        ),
        source=f"{_KAPLAN}, eq. 1.5: Nc 8.8e13, Dc 5.4e13, alpha_N 0.076, alpha_D 0.095",
        confidence=Confidence.QUOTED,
        counting=_WITHOUT_EMBEDDING,
        note="runs to convergence; its compute allocation is the separate law below",
    ),
    "muennighoff": Published(
        law=LossLaw(e_nats=1.869, a=521.0, b=1488.0, alpha=0.3527, beta=0.3527),
        source=_MUENNIGHOFF,
        confidence=Confidence.READ,
        counting=_ALL,
        note="the tied law under the repetition law",
    ),
}

ALLOCATIONS: Mapping[str, Published[AllocationLaw | RatioLaw]] = {
    "hoffmann-a1": Published(
        law=AllocationLaw(coefficient=0.09916, exponent=0.4981),
        source=f"{_HOFFMANN}, power law through the table of approach 1",
        confidence=Confidence.MEASURED,
        counting=_ALL,
        note="within 0.3 % of the rows; the 67 B row is rounded (6 N D / C = 1.047)",
    ),
    "chinchilla-ratio": Published(
        law=RatioLaw(tokens_per_param=20.0),
        source=f"{_HOFFMANN}, the rule of thumb",
        confidence=Confidence.MEASURED,
        counting=_ALL,
        note="N = sqrt(C / 120)",
    ),
    "kaplan": Published(
        law=AllocationLaw(coefficient=1.3e9 * _PF_DAY_FLOP**-0.73, exponent=0.73),
        source=f"{_KAPLAN}, N = 1.3e9 C^0.73, C in PF-days",
        confidence=Confidence.MEMORY,
        counting=_WITHOUT_EMBEDDING,
        note="exponent quoted by several, coefficient from memory; superseded by approach 1",
    ),
    "porian": Published(
        law=AllocationLaw(coefficient=0.119, exponent=0.497),
        source=f"{_PORIAN}, RefinedWeb, tuned, constant learning rate, stored fit",
        confidence=Confidence.READ,
        counting=_WITH_HEAD,
    ),
    "deepseek": Published(
        law=AllocationLaw(coefficient=0.1715 / 6, exponent=0.5243),
        source=f"{_DEEPSEEK}: M = 0.1715 C^0.5243 FLOP per token, here N = M / 6",
        confidence=Confidence.QUOTED,
        counting="a sixth of the non-embedding FLOP per token, attention included",
    ),
    "llama3": Published(
        law=AllocationLaw(coefficient=0.299, exponent=0.537, is_tokens=True),
        source=f"{_LLAMA3}: tokens = 0.299 C^0.537",
        confidence=Confidence.READ,
        counting=_ALL,
        note="the printed pair (0.29, 0.53) gives 10 T at 3.8e25, the paper trains on 16.55 T",
    ),
}

ALLOCATION_EXPONENTS: Mapping[str, Published[Interval]] = {
    name: Published(
        law=Interval(value=value, low=low, high=high),
        source=source,
        confidence=confidence,
        counting=counting,
        note=note,
    )
    for name, value, low, high, source, confidence, counting, note in (
        ("hoffmann-a1", 0.50, 0.488, 0.502, _HOFFMANN, Confidence.QUOTED, _ALL,
         "10 to 90 percentile of 80 % subsamples, not a 95 % interval"),
        ("hoffmann-a2", 0.49, 0.462, 0.534, _HOFFMANN, Confidence.QUOTED, _ALL,
         "10 to 90 percentile of 80 % subsamples, not a 95 % interval"),
        ("hoffmann-a3", 0.46, 0.454, 0.455, _HOFFMANN, Confidence.QUOTED, _ALL,
         "10 to 90 percentile of 80 % subsamples, not a 95 % interval"),
        ("besiroglu", 0.513, 0.473, 0.553, _BESIROGLU, Confidence.READ, _ALL,
         "standard error 0.020; the interval is twice that"),
        ("porian-kaplan", 0.835, 0.824, 0.846, _PORIAN, Confidence.READ, _WITHOUT_EMBEDDING,
         "Kaplan's recipe reproduced, RefinedWeb"),
        ("porian-head", 0.707, 0.691, 0.717, _PORIAN, Confidence.READ, _WITH_HEAD,
         "and the head counted"),
        ("porian-warmup", 0.602, 0.591, 0.617, _PORIAN, Confidence.READ, _WITH_HEAD,
         "and a short warm-up"),
        ("porian-cosine", 0.572, 0.560, 0.589, _PORIAN, Confidence.READ, _WITH_HEAD,
         "and a cosine of the right length"),
        ("porian-tuned", 0.497, 0.491, 0.505, _PORIAN, Confidence.READ, _WITH_HEAD,
         "learning rate, batch, beta2 tuned, constant learning rate"),
        ("nanochat", 0.54, 0.54, 0.54, "nanochat log, January 2026", Confidence.READ, _WITH_HEAD,
         "0.37 counting all parameters, 0.70 matrices only: counting moves it most"),
    )
}  # fmt: skip

REPETITIONS: Mapping[str, Published[RepetitionLaw]] = {
    "muennighoff": Published(
        law=RepetitionLaw(law=LOSS_LAWS["muennighoff"].law),
        source=_MUENNIGHOFF,
        confidence=Confidence.READ,
        counting=_ALL,
        note="R_D* 15.39, R_N* 5.31; re-anchor E, A, B on own runs (8.2 % error becomes 5.1 %)",
    ),
}

REPLICAS: Mapping[str, Published[ReplicaPenalty]] = {
    "charles-by-size": Published(
        law=ReplicaPenalty(coefficient=1.0923, exponent=-0.2342),
        source=f"third-party refit of {_CHARLES}",
        confidence=Confidence.READ,
        counting=_ALL,
        note="35 M to 2.4 B, M <= 8; beyond extrapolated",
    ),
    "charles-joint": Published(
        law=ReplicaPenalty(coefficient=0.0116, exponent=0.0),
        source=f"{_CHARLES}, joint fit",
        confidence=Confidence.READ,
        counting=_ALL,
        note="one exponent for all sizes; hides that the penalty falls with N",
    ),
}


def _rule(
    source: str,
    confidence: Confidence,
    unit: str,
    rule: PowerRule,
    *,
    counting: str = _ALL,
    note: str = "",
) -> Published[PowerRule]:
    return Published(
        law=rule, source=source, confidence=confidence, counting=counting, unit=unit, note=note
    )


_LR = "learning rate"
_TOKENS = "tokens"
LEARNING_RATES: Mapping[str, Published[PowerRule]] = {
    "step-law": _rule(
        _STEP_LAW,
        Confidence.READ,
        _LR,
        PowerRule(coefficient=1.79, n_exponent=-0.713, d_exponent=0.307),
        counting="without vocabulary",
        note="bootstrap 95 %: N -0.774 to -0.655, D 0.271 to 0.345",
    ),
    "deepseek": _rule(
        _DEEPSEEK,
        Confidence.QUOTED,
        _LR,
        PowerRule(coefficient=0.3118, c_exponent=-0.1250),
        note="1e17 to 2e19 FLOP",
    ),
    "porian": _rule(
        _PORIAN,
        Confidence.QUOTED,
        _LR,
        PowerRule(coefficient=3.7, n_exponent=-0.36),
        counting=_WITH_HEAD,
    ),
    "bjorck": _rule(
        _BJORCK,
        Confidence.QUOTED,
        _LR,
        PowerRule(coefficient=1.55e-3 * 1e9**0.55, n_exponent=-0.23, d_exponent=-0.32),
        note="at a batch of 0.5 M tokens",
    ),
    **{
        f"diloco-{name}": _rule(_CHARLES, Confidence.READ, "inner learning rate", rule, note=note)
        for name, rule, note in (
            ("dp", PowerRule(coefficient=16319.2, n_exponent=-0.819), "data parallel"),
            ("1", PowerRule(coefficient=74620.6, n_exponent=-0.945), "M = 1"),
            ("2", PowerRule(coefficient=3978.82, n_exponent=-0.780), "M = 2"),
            ("4", PowerRule(coefficient=4512.99, n_exponent=-0.789), "M = 4"),
            ("8", PowerRule(coefficient=618986.0, n_exponent=-1.102), "M = 8"),
            (
                "joint",
                PowerRule(coefficient=22256.0, n_exponent=-0.8827, m_exponent=0.2929),
                "hold-out residual 19 %",
            ),
        )
    },
}

BATCHES: Mapping[str, Published[PowerRule]] = {
    "step-law": _rule(
        _STEP_LAW, Confidence.READ, _TOKENS, PowerRule(coefficient=0.58, d_exponent=0.571)
    ),
    "deepseek": _rule(
        _DEEPSEEK, Confidence.QUOTED, _TOKENS, PowerRule(coefficient=0.2920, c_exponent=0.3271)
    ),
    "porian": _rule(
        _PORIAN,
        Confidence.QUOTED,
        _TOKENS,
        PowerRule(coefficient=0.758, n_exponent=0.703),
        counting=_WITH_HEAD,
        note="0.00037 N^0.703 sequences of 2,048",
    ),
    "zhang-critical": _rule(
        "Zhang et al. 2024, arXiv 2410.21676",
        Confidence.QUOTED,
        _TOKENS,
        PowerRule(coefficient=93.2 * 512 * 1e6**-0.47, n_exponent=0.47),
        note="critical batch at 20 tokens per parameter; set by data, not size",
    ),
    **{
        f"diloco-{name}": _rule(_CHARLES, Confidence.READ, _TOKENS, rule, note=note)
        for name, rule, note in (
            ("dp", PowerRule(coefficient=462.68, n_exponent=0.281), "data parallel"),
            ("1", PowerRule(coefficient=27.873, n_exponent=0.435), "M = 1"),
            ("2", PowerRule(coefficient=15.749, n_exponent=0.479), "M = 2"),
            ("4", PowerRule(coefficient=10.957, n_exponent=0.510), "M = 4"),
            ("8", PowerRule(coefficient=38.072, n_exponent=0.455), "M = 8"),
            (
                "joint",
                PowerRule(coefficient=14.521, n_exponent=0.4695, m_exponent=0.3399),
                "hold-out residual 19 %",
            ),
        )
    },
}

DILOCO_LOSSES: Mapping[str, Published[PowerRule]] = {
    f"diloco-{name}": _rule(_CHARLES, Confidence.READ, "nats", rule, note=note)
    for name, rule, note in (
        ("dp", PowerRule(coefficient=18.129, n_exponent=-0.0953), "data parallel"),
        ("1", PowerRule(coefficient=18.363, n_exponent=-0.0961), "M = 1"),
        ("2", PowerRule(coefficient=18.768, n_exponent=-0.0969), "M = 2"),
        ("4", PowerRule(coefficient=19.762, n_exponent=-0.0992), "M = 4"),
        ("8", PowerRule(coefficient=21.051, n_exponent=-0.1018), "M = 8"),
        (
            "joint",
            PowerRule(coefficient=19.226, n_exponent=-0.0985, m_exponent=0.0116),
            "hold-out residual 1.2 % at 2.4 B",
        ),
    )
}

COMPUTE_WORTH: Mapping[str, Published[PowerRule]] = {
    "replicas": _rule(
        f"the loss laws of {_CHARLES} through a loss law of compute",
        Confidence.MEASURED,
        "C_eff / C",
        PowerRule(coefficient=1.0, m_exponent=-0.17),
        note="nearly independent of N from 0.1 to 10 B; beyond M = 8 extrapolated",
    ),
}

NUMBERS: Mapping[str, Published[float]] = {
    name: Published(
        law=value, unit=unit, source=source, confidence=confidence, counting="", note=note
    )
    for name, value, unit, source, confidence, note in (
        ("memorised-bits-per-parameter", 3.6, "bits", "Morris et al. 2025", Confidence.QUOTED,
         "3.51 in bf16, 3.83 in fp32"),
        ("kaplan-critical-batch", 2e8, "tokens", _KAPLAN, Confidence.QUOTED,
         "B_crit = 2e8 / L^(1/0.21); tokens cost 1 + B / B_crit"),
        ("kaplan-critical-batch-exponent", 0.21, "alpha_B", _KAPLAN, Confidence.QUOTED, ""),
        ("minicpm-batch", 1.21e9, "tokens x nats^6.24", "MiniCPM 2024, arXiv 2404.06395",
         Confidence.READ, "batch = 1.21e9 / L^6.24"),
        ("cooldown-ratio", 0.2, "share of the run", "Haegele et al. 2024, arXiv 2405.18392",
         Confidence.QUOTED, "shape 1 - sqrt"),
        ("outer-lr-1", 0.4, _LR, _CHARLES, Confidence.READ, "read off a garbled map, +- 0.2"),
        ("outer-lr-2", 0.6, _LR, _CHARLES, Confidence.READ, "read off a garbled map, +- 0.2"),
        ("outer-lr-4", 0.6, _LR, _CHARLES, Confidence.READ, "read off a garbled map, +- 0.2"),
        ("outer-lr-8", 0.8, _LR, _CHARLES, Confidence.READ, "read off a garbled map, +- 0.2"),
    )
}  # fmt: skip

NINE_ROWS: tuple[tuple[float, float, float], ...] = (
    (400e6, 1.92e19, 8.0e9),
    (1e9, 1.21e20, 20.2e9),
    (10e9, 1.23e22, 205.1e9),
    (67e9, 5.76e23, 1.5e12),
    (175e9, 3.85e24, 3.7e12),
    (280e9, 9.90e24, 5.9e12),
    (520e9, 3.43e25, 11.0e12),
    (1e12, 1.27e26, 21.2e12),
    (10e12, 1.30e28, 216.2e12),
)
"""(N, C in FLOP, D in tokens): Hoffmann 2022, table 3, compute-optimal by approach 1."""

GROUPS: Mapping[str, Mapping[str, Published[Any]]] = {
    "loss laws": LOSS_LAWS,
    "allocations": ALLOCATIONS,
    "exponents of N_opt": ALLOCATION_EXPONENTS,
    "repetition": REPETITIONS,
    "replica penalty": REPLICAS,
    "worth of compute": COMPUTE_WORTH,
    "learning rates": LEARNING_RATES,
    "batches": BATCHES,
    "losses of DiLoCo": DILOCO_LOSSES,
    "numbers": NUMBERS,
}
"""Everything above, by group."""
