"""Credit decisions: which windows of a committed round count.

A window that a certificate lists is credited iff
- it lies in a lease that this coordinator granted to that peer in this incarnation,
- no newer lease covers it (its fence is the newest one: nobody else was given it meanwhile), and
- it was not credited before in the chain of outer steps in force. Whether the lease has expired or
  was released does not matter by itself; only a new grant takes the right away. Everything else is
  booked once in uncredited_trained_tokens with the reason. Decisions are per window, so one range
  may split.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from coordinator.domain.spans import Interval, intersect, subtract


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What a certificate says that one member trained under one lease."""

    peer_id: str
    lease_number: int
    fence: int
    chunk: tuple[int, int]
    """(data_pass, chunk_index) as the signed lease names it."""
    windows: Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class BookedLease:
    """A lease as the book has it."""

    lease_number: int
    peer_id: str
    fence: int
    chunk: tuple[int, int]
    windows: Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Part of a claim with one verdict."""

    windows: Interval
    is_credited: bool
    reason: str
    """Why not; empty if credited."""


def newer_than(lease: BookedLease, others: Sequence[BookedLease]) -> list[BookedLease]:
    """Leases that took windows of this one over."""
    begin, end = lease.windows
    return [
        other
        for other in others
        if other.fence > lease.fence and other.windows[0] < end and begin < other.windows[1]
    ]


def decide_credit(
    claim: Claim,
    *,
    lease: BookedLease | None,
    leases_of_chunk: Sequence[BookedLease],
    credited: Sequence[tuple[Interval, int]],
) -> list[Piece]:
    """Split a claim into credited and uncredited pieces, in window order.

    `credited` are the windows of the chunk that are credited already, with the outer step that did
    it; they do not overlap.
    """
    begin, end = claim.windows
    if begin >= end:
        return []
    if lease is None:
        return [
            _refused(
                claim.windows, f"lease {claim.lease_number} is not in the book of this incarnation"
            )
        ]
    if (claim.fence, claim.chunk) != (lease.fence, lease.chunk):
        return [
            _refused(
                claim.windows, f"lease {claim.lease_number} in the book has another range or fence"
            )
        ]
    pieces = [
        _refused(part, f"outside lease {lease.lease_number}")
        for part in subtract(claim.windows, [lease.windows])
    ]
    inside = (max(begin, lease.windows[0]), min(end, lease.windows[1]))
    if inside[0] < inside[1]:
        pieces += _decide_inside(inside, lease, leases_of_chunk, credited)
    return sorted(pieces, key=lambda piece: piece.windows)


def _decide_inside(
    inside: Interval,
    lease: BookedLease,
    leases_of_chunk: Sequence[BookedLease],
    credited: Sequence[tuple[Interval, int]],
) -> list[Piece]:
    pieces = []
    open_parts = [inside]
    for windows, outer_step in credited:
        for part in intersect(inside, [windows]):
            pieces.append(_refused(part, f"credited before in outer step {outer_step}"))
    open_parts = subtract(inside, [windows for windows, _ in credited])
    newer = newer_than(lease, leases_of_chunk)
    for open_part in open_parts:
        stale = subtract(open_part, subtract(open_part, [other.windows for other in newer]))
        if newer and stale:
            newest = max(newer, key=lambda other: other.fence)
            reason = (
                f"fence {lease.fence} is old: granted again under {newest.fence} to "
                f"{newest.peer_id}"
            )
            pieces += [_refused(part, reason) for part in stale]
        for part in subtract(open_part, [other.windows for other in newer]):
            pieces.append(Piece(windows=part, is_credited=True, reason=""))
    return pieces


def _refused(windows: Interval, reason: str) -> Piece:
    return Piece(windows=windows, is_credited=False, reason=reason)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainHead:
    """Where the chain of outer steps in force ends."""

    incarnation: int
    outer_step: int
    """Newest stored outer step, or the one that the incarnation starts from."""
    directive_number: int
    """Directive whose roster decides the next outer step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainVerdict:
    """Whether a certificate continues the chain."""

    is_next: bool
    is_old: bool
    """At or before the head: compare it with the stored one."""
    reason: str


def decide_chain(
    head: ChainHead, *, incarnation: int, outer_step: int, roster_number: int
) -> ChainVerdict:
    """Certificates are taken in order: each proves the roster of the next."""
    if incarnation != head.incarnation:
        return ChainVerdict(
            is_next=False,
            is_old=False,
            reason=f"names incarnation {incarnation}; {head.incarnation} is in force",
        )
    if outer_step <= head.outer_step:
        return ChainVerdict(
            is_next=False, is_old=True, reason=f"outer step {head.outer_step} is stored"
        )
    if outer_step > head.outer_step + 1:
        return ChainVerdict(
            is_next=False,
            is_old=False,
            reason=f"outer step {head.outer_step + 1} is missing; report it before {outer_step}",
        )
    if roster_number != head.directive_number:
        return ChainVerdict(
            is_next=False,
            is_old=False,
            reason=(
                f"names roster {roster_number}; the outer step before names {head.directive_number}"
            ),
        )
    return ChainVerdict(is_next=True, is_old=False, reason="")
