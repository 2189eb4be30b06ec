"""How far a law may be drawn beyond what it was measured at: one rule for plans and studies."""

from protos.contract.errors import UsageError

MAX_EXTRAPOLATION_RATIO = 1000.0
"""Times the largest measured compute; beyond, a person must ask for it."""
MAX_SHRINKING_RATIO = 1e5
"""Times below the smallest measured compute. More than upwards, because the best N of published
laws is still of use to a few small machines there; that it is a guess is said at once."""
LEAST_FLOP = 6.0
"""One parameter trained on one token."""


def check_extrapolation(
    compute_flop: float, measured_flop: tuple[float, float], *, law: str, is_forced: bool
) -> str:
    """ "" inside the (smallest, largest) measured compute and up to x1000 above it; a warning below
    the smallest, and beyond x1000 above or x100,000 below it if forced.

    Raises UsageError if not forced.
    """
    smallest, largest = measured_flop
    above, below = compute_flop / largest, smallest / compute_flop
    if above > 1 + 1e-9:
        found = (
            f"{compute_flop:.3g} FLOP are {above:,.3g} times the largest compute that {law} was "
            f"measured at, {largest:.3g}"
        )
        if above <= MAX_EXTRAPOLATION_RATIO * (1 + 1e-9):
            return ""
        limit = largest * MAX_EXTRAPOLATION_RATIO
        allowed = f"up to x{MAX_EXTRAPOLATION_RATIO:,.0f}, {limit:.3g} FLOP: beyond it no law has "
        remedy = "measure larger runs and fit them"
    elif below > 1 + 1e-9:
        found = (
            f"{compute_flop:.3g} FLOP are {below:,.3g} times less than the smallest compute that "
            f"{law} was measured at, {smallest:.3g}"
        )
        if below <= MAX_SHRINKING_RATIO * (1 + 1e-9):
            return f"{found}: a guess; small runs of your own (study create, study fit) say more"
        limit = smallest / MAX_SHRINKING_RATIO
        allowed = f"down to {limit:.3g} FLOP, x{MAX_SHRINKING_RATIO:,.0f} less: below no law has "
        remedy = "measure runs of that size (study create) and fit them"
    else:
        return ""
    if is_forced:
        return f"extrapolated by force: {found}; power laws bend, treat every number as a guess"
    raise UsageError(
        found,
        allowed=allowed + "been tested",
        remedy=f"{remedy}, or say --force-extrapolation and trust the band little",
    )
