"""How much of the vector each member reduces: so that the slowest link is done as early as
possible.

Pure. The leader decides it once when the group forms and sends it with the group. A member with
share f of a vector of size 1, among n members of which k bring values, sends its own part to the
others and its reduced share to everybody: a (1 - f) + (n - 1) f, with a = 1 if it brings values; it
receives the others' parts of its share and everybody's reduced shares: (k - a) f + (1 - f).
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

_MAX_ADVANTAGE = 4.0
"""A rate is only a claim: none counts for more than so many times the median."""
_NUM_HALVINGS = 60
_UNKNOWN = float("inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """What is known of one member of a group."""

    is_reducer: bool
    """False for a member that cannot accept connections; it reduces nothing."""
    has_values: bool
    upload_bytes_per_second: float
    """Measured; 0 if not."""
    download_bytes_per_second: float


def slice_ends(links: Sequence[Link], *, num_pieces: int) -> list[int]:
    """End of each member's run of pieces; runs follow one another and cover all pieces.

    Equal shares for those that reduce if nothing was measured. If nobody can be dialled, everybody
    reduces: the streams then need relays.
    """
    if not any(link.is_reducer for link in links):
        able = [True] * len(links)
    else:
        able = [link.is_reducer for link in links]
    ratios = _ratios(links, able)
    ends, total = [], 0.0
    for ratio in ratios:
        total += ratio
        ends.append(round(num_pieces * total))
    last = max(rank for rank, is_able in enumerate(able) if is_able)
    return [num_pieces if rank >= last else min(end, num_pieces) for rank, end in enumerate(ends)]


def expected_seconds(links: Sequence[Link], ends: Sequence[int], *, vector_bytes: int) -> float:
    """What averaging a vector takes a member in the middle, by what the links have shown; members
    without a figure count as quick, so that one slow link does not make everybody patient.
    """
    num_pieces, begin, seconds = max(1, ends[-1]), 0, []
    for link, end in zip(links, ends, strict=True):
        share, begin = (end - begin) / num_pieces, end
        rates = (link.upload_bytes_per_second, link.download_bytes_per_second)
        costs = _costs(link, rates[0] or _UNKNOWN, rates[1] or _UNKNOWN, links)
        seconds.append(vector_bytes * max(fixed + slope * share for fixed, slope in costs))
    return statistics.median_low(seconds)


def _ratios(links: Sequence[Link], able: Sequence[bool]) -> list[float]:
    """Share of each member; their sum is 1."""
    uploads = _usable([link.upload_bytes_per_second for link in links])
    downloads = _usable([link.download_bytes_per_second for link in links])
    if uploads is None or downloads is None:
        return [float(is_able) / sum(able) for is_able in able]
    costs = [
        _costs(link, up, down, links)
        for link, up, down in zip(links, uploads, downloads, strict=True)
    ]
    least = max(fixed for cost in costs for fixed, _ in cost)
    low, high = least, least + max(fixed + slope for cost in costs for fixed, slope in cost)
    for _ in range(_NUM_HALVINGS):
        middle = (low + high) / 2
        if sum(_shares_within(middle, costs, able)) >= 1.0:
            high = middle
        else:
            low = middle
    shares = _shares_within(high, costs, able)
    return [share / sum(shares) for share in shares]


def _usable(rates: Sequence[float]) -> list[float] | None:
    """Rates with the unmeasured at the median and none far above it; None if nothing is
    measured.
    """
    measured = [rate for rate in rates if rate > 0]
    if not measured:
        return None
    median = statistics.median(measured)
    return [min(rate, _MAX_ADVANTAGE * median) if rate > 0 else median for rate in rates]


def _costs(
    link: Link, upload: float, download: float, links: Sequence[Link]
) -> tuple[tuple[float, float], tuple[float, float]]:
    """(fixed, slope) of the seconds per unit of the vector: up and down, as functions of
    the share.
    """
    own, num_bringing = int(link.has_values), sum(other.has_values for other in links)
    others = len(links) - 1
    return (
        (own / upload, max(0.0, others - own) / upload),
        (1.0 / download, max(0.0, num_bringing - own - 1.0) / download),
    )


def _shares_within(
    seconds: float, costs: Sequence[Sequence[tuple[float, float]]], able: Sequence[bool]
) -> list[float]:
    """Largest share with which each member is done in time."""
    return [
        min(1.0, *((seconds - fixed) / slope if slope > 0 else 1.0 for fixed, slope in cost))
        if is_able
        else 0.0
        for cost, is_able in zip(costs, able, strict=True)
    ]
