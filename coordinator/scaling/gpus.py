"""Data-sheet speeds of accelerators, for turning GPU hours into compute when nothing was measured.

Dense bf16 (fp16 where there is no bf16) tensor FLOP/s, fp32 accumulation, without sparsity, from
the makers' data sheets. Training reaches a share of it; ASSUMED_MFU_RATIO is an ordinary one. A
pool is never computed from this: its peers are measured.
"""

from dataclasses import dataclass

from protos.contract.errors import UsageError

ASSUMED_MFU_RATIO = 0.35
ASSUMED_LOG_STD = 0.3
"""s of ln C when the share is assumed instead of measured."""

PEAK_FLOP_PER_SECOND: dict[str, float] = {
    "b200": 2.25e15,
    "h200": 9.89e14,
    "h100": 9.89e14,
    "h100-pcie": 7.56e14,
    "a100": 3.12e14,
    "a10": 1.25e14,
    "l40s": 3.62e14,
    "l4": 1.21e14,
    "v100": 1.25e14,
    "t4": 6.5e13,
    "rtx5090": 2.09e14,
    "rtx4090": 1.65e14,
    "rtx4080": 9.75e13,
    "rtx3090": 7.1e13,
    "rtx3080": 5.95e13,
    "mi300x": 1.307e15,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuCompute:
    """Training compute of GPU hours."""

    compute_flop: float
    compute_log_std: float
    flop_per_second: float
    """Of one GPU, in training."""
    reason: str


def compute_of_gpu_hours(
    hours: float, *, gpu: str = "", flop_per_second: float | None = None
) -> GpuCompute:
    """C of GPU hours, from a measured speed or from a named GPU's data sheet.

    Raises UsageError if neither or both are given, or the name is unknown.
    """
    if (not gpu) == (flop_per_second is None):
        raise UsageError(
            "GPU hours with both a name and a speed" if gpu else "GPU hours of no particular GPU",
            allowed="--gpu NAME or --flops-per-second F",
            remedy="measure the speed (muster-peer doctor), or name the GPU: "
            + ", ".join(PEAK_FLOP_PER_SECOND),
        )
    if flop_per_second is not None:
        return GpuCompute(
            compute_flop=hours * 3600 * flop_per_second,
            compute_log_std=0.0,
            flop_per_second=flop_per_second,
            reason=f"{hours:,g} GPU hours x {flop_per_second:.3g} measured FLOP/s",
        )
    key = gpu.lower().replace(" ", "").replace("_", "-").removeprefix("nvidia")
    if key not in PEAK_FLOP_PER_SECOND:
        raise UsageError(
            f"GPU {gpu!r}",
            allowed=", ".join(PEAK_FLOP_PER_SECOND),
            remedy="measure its training FLOP/s and pass --flops-per-second",
        )
    speed = PEAK_FLOP_PER_SECOND[key] * ASSUMED_MFU_RATIO
    return GpuCompute(
        compute_flop=hours * 3600 * speed,
        compute_log_std=ASSUMED_LOG_STD,
        flop_per_second=speed,
        reason=f"{hours:,g} hours of {key}: {PEAK_FLOP_PER_SECOND[key]:.3g} FLOP/s by data sheet"
        f" x {ASSUMED_MFU_RATIO:.0%} that training reaches (assumed, so s = {ASSUMED_LOG_STD}; "
        "measure it and pass --flops-per-second)",
    )
