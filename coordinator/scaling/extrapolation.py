"""How far a law may be drawn beyond what it was measured at: one rule for plans and studies."""

from protos.contract.errors import UsageError

MAX_EXTRAPOLATION_RATIO = 1000.0
"""Times the largest measured compute; beyond, a person must ask for it."""


def check_extrapolation(
    compute_flop: float, largest_flop: float, *, law: str, is_forced: bool
) -> str:
    """ "" within x1000 of the largest measured compute; beyond a warning if forced.

    Raises UsageError if not forced.
    """
    ratio = compute_flop / largest_flop
    if ratio <= MAX_EXTRAPOLATION_RATIO * (1 + 1e-9):
        return ""
    found = (
        f"{compute_flop:.3g} FLOP are {ratio:,.3g} times the largest compute that {law} was "
        f"measured at, {largest_flop:.3g}"
    )
    if is_forced:
        return f"extrapolated by force: {found}; power laws bend, treat every number as a guess"
    raise UsageError(
        found,
        allowed=f"up to x{MAX_EXTRAPOLATION_RATIO:,.0f}, "
        f"{largest_flop * MAX_EXTRAPOLATION_RATIO:.3g} FLOP: beyond it no law has been tested",
        remedy="measure larger runs and fit them, or say --force-extrapolation and trust "
        "the band little",
    )
