"""When a new incarnation must begin, from which state, and why: bootstrap and rollback.

An epoch ends by a certificate of its own quorum. If that cannot be had (voters gone), or nobody has
the state that the newest certificate proves, the run can only go on by a decision of the
coordinator: a rollback to the newest outer step that somebody still holds. It never guesses: what
is not proved by a certificate, by a quorum of attestations or, for the newest step, by a live
holder, is no base; and a base above the stored certificates waits for them.

Members that were seen to end are certainly gone; silent ones are waited for (grace).
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

from coordinator.domain.membership import Member
from coordinator.domain.policy import SwarmPolicy
from protos.contract.certificate import COORDINATOR_HALF_VOTES, MEMBER_HALF_VOTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """One incarnation's part of the chain of states that is in force."""

    incarnation: int
    from_outer_step: int
    to_outer_step: int | None
    """Last step that the next incarnation builds on; None for the current one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """A state that can be had: a live member's attestation, a stored, proved checkpoint, or the
    initial state.
    """

    peer_id: str
    """Empty for a checkpoint and for the initial state, which every peer can build."""
    incarnation: int
    outer_step: int
    state_digest: bytes
    since_unix_seconds: float
    """When it was attested or stored."""

    @property
    def is_checkpoint(self) -> bool:
        """True if no member is needed to have it."""
        return not self.peer_id


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """State from which an incarnation begins."""

    incarnation: int
    outer_step: int
    state_digest: bytes
    holders: frozenset[str]
    """Live members that hold it; empty if it comes from a checkpoint or is the initial state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IncarnationPlan:
    """Start a new incarnation from `base`, or None and what is waited for."""

    base: Base | None
    reason: str
    refused: Mapping[str, str]
    """Members whose state differs from the base's, with the sentence for them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """Whether a new incarnation is needed now; `is_stalled` says that the run cannot commit
    meanwhile.
    """

    is_needed: bool
    is_stalled: bool
    reason: str


def has_quorum(voters: frozenset[str], present: frozenset[str]) -> bool:
    """True if the present voters and the coordinator's half are more than half of all votes."""
    total_halves = MEMBER_HALF_VOTES * len(voters) + COORDINATOR_HALF_VOTES
    present_halves = MEMBER_HALF_VOTES * len(voters & present) + COORDINATOR_HALF_VOTES
    return bool(voters & present) and 2 * present_halves > total_halves


def is_attested_by_quorum(voters: frozenset[str], attesters: frozenset[str]) -> bool:
    """True if attesters alone, without the coordinator's half, are more than half of all votes."""
    total_halves = MEMBER_HALF_VOTES * len(voters) + COORDINATOR_HALF_VOTES
    return 2 * MEMBER_HALF_VOTES * len(voters & attesters) > total_halves


def is_on_chain(segments: Sequence[Segment], *, incarnation: int, outer_step: int) -> bool:
    """True if the state (incarnation, outer_step) was not rolled back."""
    return any(
        s.incarnation == incarnation
        and s.from_outer_step <= outer_step
        and (s.to_outer_step is None or outer_step <= s.to_outer_step)
        for s in segments
    )


def chain_segments(records: Sequence[tuple[int, int, int]]) -> list[Segment]:
    """Segments in force, newest first, from (incarnation, to_outer_step, base_incarnation) of all
    records, oldest first.
    """
    if not records:
        return []
    by_number = {record[0]: record for record in records}
    segments = []
    number, end = records[-1][0], None
    while number in by_number:
        incarnation, begin, base_incarnation = by_number[number]
        segments.append(Segment(incarnation=incarnation, from_outer_step=begin, to_outer_step=end))
        if base_incarnation == incarnation:
            break
        number, end = base_incarnation, begin
    return segments


def plan_bootstrap(
    members: Sequence[Member],
    *,
    attest_unix_seconds_by_peer: Mapping[str, float],
    min_peers: int,
    now_unix_seconds: float,
    policy: SwarmPolicy,
) -> IncarnationPlan:
    """Incarnation 1 as soon as enough live members attest one initial state; the majority's digest
    wins.
    """
    attested = [
        m for m in members if m.is_live and m.has_attested(0) and m.attested_outer_step == 0
    ]
    joined = sum(m.is_live for m in members)
    if not attested:
        reason = f"waits for peers: {joined} joined, none has built the initial state yet"
        return IncarnationPlan(base=None, reason=reason, refused={})
    counts = Counter(m.attested_digest for m in attested)
    first = min(
        attested, key=lambda m: (attest_unix_seconds_by_peer.get(m.peer_id, 0.0), m.peer_id)
    )
    digest = max(counts, key=lambda d: (counts[d], d == first.attested_digest, d))
    refused = {
        m.peer_id: f"its initial state {m.attested_digest.hex()[:12]} differs from "
        f"{digest.hex()[:12]},"
        f" which {counts[digest]} of {len(attested)} built; it takes the state from a member"
        for m in attested
        if m.attested_digest != digest
    }
    begin = attest_unix_seconds_by_peer.get(first.peer_id, now_unix_seconds)
    waited_seconds = now_unix_seconds - begin
    found = f"{counts[digest]} of at least {min_peers} peers attest the initial state"
    if counts[digest] < min_peers and waited_seconds < policy.start_grace_seconds:
        left_seconds = policy.start_grace_seconds - waited_seconds
        reason = f"waits for peers: {found}; starts with them in {left_seconds:.0f} s at the latest"
        return IncarnationPlan(base=None, reason=reason, refused=refused)
    holders = frozenset(m.peer_id for m in attested if m.attested_digest == digest)
    base = Base(incarnation=0, outer_step=0, state_digest=digest, holders=holders)
    reason = f"start: {found}" + (
        "" if counts[digest] >= min_peers else f" after {waited_seconds:.0f} s"
    )
    return IncarnationPlan(base=base, reason=reason, refused=refused)


class _Place(TypedDict):
    """How far the chain is, and how long somebody may lag behind it."""

    current_incarnation: int
    certified_outer_step: int
    certify_unix_seconds: float
    now_unix_seconds: float
    grace_seconds: float


def check_need(
    members: Sequence[Member],
    *,
    voters_in_force: frozenset[str],
    voters_newest: frozenset[str],
    current_incarnation: int,
    certified_outer_step: int,
    certify_unix_seconds: float,
    now_unix_seconds: float,
    policy: SwarmPolicy,
    equivocation_reason: str = "",
) -> Need:
    """Decide whether the present epoch can still end by itself.

    `certify_unix_seconds` is when the newest certificate (or the incarnation) was stored. A rejoin
    after that without the newest state means that this member's process has lost it. Voters that
    are alive but cannot get the newest state for the grace are as good as gone: too few may be left
    to prove that state to them.
    """
    if equivocation_reason:
        return Need(
            is_needed=True, is_stalled=True, reason=f"members equivocated: {equivocation_reason}"
        )
    by_peer = {m.peer_id: m for m in members}
    live = frozenset(m.peer_id for m in members if m.is_live)
    grace_seconds = max(policy.quorum_grace_seconds, policy.peer_ttl_seconds)

    quorum = _need_of_live_quorum(
        by_peer,
        live,
        voters_by_roster={
            "the roster in force": voters_in_force,
            "the newest roster": voters_newest,
        },
        now_unix_seconds=now_unix_seconds,
        grace_seconds=grace_seconds,
    )
    if quorum is not None:
        return quorum
    place: _Place = {
        "current_incarnation": current_incarnation,
        "certified_outer_step": certified_outer_step,
        "certify_unix_seconds": certify_unix_seconds,
        "now_unix_seconds": now_unix_seconds,
        "grace_seconds": grace_seconds,
    }
    candidates = [m for m in members if m.peer_id in voters_in_force | voters_newest | live]
    if not _may_hold_newest(candidates, settle_seconds=policy.settle_seconds, **place):
        reason = (
            f"no member holds the state of the newest certified outer step {certified_outer_step}"
        )
        return Need(is_needed=True, is_stalled=True, reason=reason)

    able = _able_to_go_on(
        [by_peer[peer] for peer in sorted((voters_in_force | voters_newest) & live)], **place
    )
    for voters in (voters_in_force, voters_newest):
        if not has_quorum(voters, able):
            return Need(
                is_needed=True,
                is_stalled=True,
                reason=f"{len(voters & able)} of {len(voters)} voters hold the state of outer step "
                f"{certified_outer_step}, the others have not got it for {grace_seconds:.0f} s: "
                "too few to prove it or to go on",
            )
    return Need(
        is_needed=False, is_stalled=False, reason=f"{len(voters_in_force & live)} voters are live"
    )


def _need_of_live_quorum(
    by_peer: Mapping[str, Member],
    live: frozenset[str],
    *,
    voters_by_roster: Mapping[str, frozenset[str]],
    now_unix_seconds: float,
    grace_seconds: float,
) -> Need | None:
    """None if every roster has a quorum of live voters."""

    def is_absent(peer: str, *, only_sure: bool) -> bool:
        member = by_peer.get(peer)
        if member is None or member.is_gone_for_sure:
            return True
        silent_seconds = now_unix_seconds - member.last_heartbeat_unix_seconds
        return not only_sure and not member.is_live and silent_seconds >= grace_seconds

    for which, voters in voters_by_roster.items():
        if has_quorum(voters, live):
            continue
        missing = sorted(peer[:8] for peer in voters - live)
        found = (
            f"{len(voters & live)} of {len(voters)} voters of {which} are live, missing "
            f"{', '.join(missing)}"
        )
        for only_sure in (True, False):
            present = frozenset(peer for peer in voters if not is_absent(peer, only_sure=only_sure))
            if not has_quorum(voters, present):
                how = (
                    "seen to be gone"
                    if only_sure
                    else f"silent for more than {grace_seconds:.0f} s"
                )
                return Need(
                    is_needed=True, is_stalled=True, reason=f"{found}, {how}: no quorum can come"
                )
        return Need(is_needed=False, is_stalled=True, reason=f"no quorum: {found}; waits for them")
    return None


def _able_to_go_on(
    voters: Sequence[Member],
    *,
    current_incarnation: int,
    certified_outer_step: int,
    certify_unix_seconds: float,
    now_unix_seconds: float,
    grace_seconds: float,
) -> frozenset[str]:
    """Those that hold the newest certified state, or may still get it within the grace."""
    return frozenset(
        m.peer_id
        for m in voters
        if (m.has_attested(current_incarnation) and m.attested_outer_step >= certified_outer_step)
        or now_unix_seconds - max(certify_unix_seconds, m.join_unix_seconds) < grace_seconds
    )


def _may_hold_newest(
    members: Sequence[Member],
    *,
    current_incarnation: int,
    certified_outer_step: int,
    certify_unix_seconds: float,
    now_unix_seconds: float,
    grace_seconds: float,
    settle_seconds: float,
) -> bool:
    """False if every member is known not to hold the newest certified state, or none has said so
    for the grace.
    """
    is_late = now_unix_seconds - certify_unix_seconds >= grace_seconds
    for member in members:
        if member.is_gone_for_sure:
            continue
        has_attested = member.has_attested(current_incarnation)
        if has_attested and member.attested_outer_step >= certified_outer_step:
            if (
                member.is_live
                or now_unix_seconds - member.last_heartbeat_unix_seconds < grace_seconds
            ):
                return True
            continue
        is_restarted = member.is_live and member.join_unix_seconds > certify_unix_seconds
        if is_restarted:
            has_spoken = member.attested_incarnation >= 0
            if not has_spoken and now_unix_seconds - member.join_unix_seconds < settle_seconds:
                return True  # it may yet attest what it has on disk
            continue
        if not is_late:
            return True  # it took part and may just not have told yet
    return False


def plan_rollback(
    holdings: Sequence[Holding],
    members: Sequence[Member],
    *,
    segments: Sequence[Segment],
    certified_outer_step: int,
    digest_proved: Callable[[int, int], bytes | None],
    need_reason: str,
    now_unix_seconds: float,
    policy: SwarmPolicy,
) -> IncarnationPlan:
    """Choose the newest state on the chain that a live member or a checkpoint holds.

    `digest_proved(incarnation, outer_step)` is the digest that certificates or a quorum of
    attestations prove, None if there is no proof. Refused, with the reason, while somebody may yet
    come with a newer state or certificate.
    """
    live = [m for m in members if m.is_live]
    if not live:
        return IncarnationPlan(
            base=None, reason=f"{need_reason}; waits for peers: none is live", refused={}
        )
    silent = [
        m
        for m in live
        if m.attested_incarnation < 0
        and now_unix_seconds - m.join_unix_seconds < policy.settle_seconds
    ]
    if silent:
        names = ", ".join(m.peer_id[:8] for m in silent)
        wait = f"waits up to {policy.settle_seconds:.0f} s for what {names} may still hold"
        reason = f"{need_reason}; {wait}"
        return IncarnationPlan(base=None, reason=reason, refused={})

    refused: dict[str, str] = {}
    usable: list[Holding] = []
    for holding in holdings:
        proved = digest_proved(holding.incarnation, holding.outer_step)
        if not is_on_chain(
            segments, incarnation=holding.incarnation, outer_step=holding.outer_step
        ):
            continue
        if proved is not None and proved != holding.state_digest:
            refused[holding.peer_id] = (
                f"its state {holding.state_digest.hex()[:12]} of outer step {holding.outer_step}"
                f" is not the proved {proved.hex()[:12]}; it takes the state from a member"
            )
            continue
        if holding.outer_step > certified_outer_step:
            if now_unix_seconds - holding.since_unix_seconds < policy.settle_seconds:
                reason = (
                    f"{need_reason}; refused for now: the certificates of outer steps"
                    f" {certified_outer_step + 1} to {holding.outer_step} are missing"
                )
                return IncarnationPlan(base=None, reason=reason, refused={})
            continue
        usable.append(holding)
    if not usable:
        reason = f"{need_reason}; no live member and no checkpoint holds a state of the chain"
        return IncarnationPlan(base=None, reason=reason, refused=refused)

    newest = max((h.outer_step, h.incarnation) for h in usable)
    group = [h for h in usable if (h.outer_step, h.incarnation) == newest]
    counts = Counter(h.state_digest for h in group)
    digest = max(
        counts,
        key=lambda d: (counts[d], any(h.is_checkpoint and h.state_digest == d for h in group), d),
    )
    same = [h for h in usable if h.outer_step == newest[0] and h.state_digest == digest]
    holders = frozenset(h.peer_id for h in same if not h.is_checkpoint)
    lost_steps = certified_outer_step - newest[0]
    stored = "a stored checkpoint" if newest != (0, 0) else "every peer (the initial state)"
    source = f"{len(holders)} live members" if holders else stored
    reason = (
        f"{need_reason}; goes back {lost_steps} steps to outer step {newest[0]}, which {source} "
        "hold(s)"
    )
    base = Base(incarnation=newest[1], outer_step=newest[0], state_digest=digest, holders=holders)
    return IncarnationPlan(base=base, reason=reason, refused=refused)


def voters_of_base(base: Base, members: Sequence[Member]) -> frozenset[str]:
    """Voters of an incarnation's first roster: those that hold its base, or all live members if
    only a checkpoint does.
    """
    return base.holders or frozenset(m.peer_id for m in members if m.is_live)
