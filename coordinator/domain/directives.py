"""When the next directive is due, with which roster, and why.

A directive is due when membership, votes, addresses, round budgets (off by more than a fifth), the
token budget, the cooldown or the pause change. It takes effect through the certificate that names
it, so issuing one never breaks a round. Not more often than the policy says, unless somebody is
gone for sure or the operator asked. A roster always has a voter and a contributor: without them no
certificate could ever name the next directive. While all have lost their states, the last one
stands until somebody has one again; if nobody comes, an incarnation is due.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from coordinator.domain.budget import MAX_ROUND_FACTOR, are_budgets_off, plan_round_tokens
from coordinator.domain.membership import Member
from coordinator.domain.policy import SwarmPolicy
from protos.contract.run_spec import StrategySpec
from protos.contract.telemetry import PeerState


@dataclass(frozen=True, slots=True, kw_only=True)
class Contact:
    """What a roster says of a member beside its rights."""

    p2p_peer_id: str
    public_key: bytes
    can_accept_connections: bool
    addresses: tuple[str, ...]
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RosterLine:
    """One member of a roster."""

    peer_id: str
    contact: Contact
    has_vote: bool
    round_tokens: int
    max_round_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectiveContent:
    """What a directive says, without number, time and signature."""

    roster: tuple[RosterLine, ...]
    """Ordered by peer_id."""
    budget_tokens: int
    cooldown_start_tokens: int
    is_paused: bool

    @property
    def voters(self) -> frozenset[str]:
        """Members with a vote."""
        return frozenset(line.peer_id for line in self.roster if line.has_vote)

    @property
    def round_tokens_by_peer(self) -> dict[str, int]:
        """Round budgets of members that contribute."""
        return {line.peer_id: line.round_tokens for line in self.roster if line.round_tokens}


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectivePlan:
    """The next directive, or None and why not."""

    content: DirectiveContent | None
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunTerms:
    """What the run's spec and operator ask of every directive."""

    budget_tokens: int
    cooldown_start_tokens: int
    is_paused: bool
    strategy: StrategySpec
    seq_len: int


def cooldown_start(budget_tokens: int, *, cooldown_ratio: float) -> int:
    """schedule_tokens at which the learning rate begins to cool down."""
    return round(budget_tokens * (1 - cooldown_ratio))


def build_content(
    members: Sequence[Member],
    *,
    contact_by_peer: Mapping[str, Contact],
    speed_by_peer: Mapping[str, float],
    voters: frozenset[str],
    terms: RunTerms,
    kept_round_tokens: Mapping[str, int] | None = None,
) -> DirectiveContent:
    """Content with all live members; those in `voters` or SYNCED vote, those that hold the state
    contribute.

    `kept_round_tokens` are used instead of what speeds suggest if given.
    """
    live = sorted((m for m in members if m.is_live), key=lambda m: m.peer_id)
    contributors = [m.peer_id for m in live if m.state is not PeerState.JOINED]
    round_tokens = kept_round_tokens
    if round_tokens is None:
        speeds = {peer: speed_by_peer.get(peer, 0.0) for peer in contributors}
        round_tokens = plan_round_tokens(
            speeds,
            global_batch_tokens=terms.strategy.round_tokens(len(speeds)),
            seq_len=terms.strategy.round_unit_tokens(terms.seq_len),
        )
    lines = tuple(
        RosterLine(
            peer_id=m.peer_id,
            contact=contact_by_peer[m.peer_id],
            has_vote=m.peer_id in voters or m.state in (PeerState.SYNCED, PeerState.VOTER),
            round_tokens=round_tokens.get(m.peer_id, 0),
            max_round_tokens=MAX_ROUND_FACTOR * round_tokens.get(m.peer_id, 0),
        )
        for m in live
    )
    return DirectiveContent(
        roster=lines,
        budget_tokens=terms.budget_tokens,
        cooldown_start_tokens=terms.cooldown_start_tokens,
        is_paused=terms.is_paused,
    )


def plan_directive(
    newest: DirectiveContent,
    members: Sequence[Member],
    *,
    issue_unix_seconds: float,
    now_unix_seconds: float,
    contact_by_peer: Mapping[str, Contact],
    speed_by_peer: Mapping[str, float],
    terms: RunTerms,
    policy: SwarmPolicy,
) -> DirectivePlan:
    """Decide on the directive after `newest`, which was issued at `issue_unix_seconds`, within one
    incarnation.
    """
    voters = frozenset(m.peer_id for m in members if m.is_live and m.has_vote)
    wanted = build_content(
        members,
        contact_by_peer=contact_by_peer,
        speed_by_peer=speed_by_peer,
        voters=voters,
        terms=terms,
    )
    if not wanted.voters:
        return DirectivePlan(
            content=None, reason="no live member could vote; no roster without a voter"
        )
    if not wanted.round_tokens_by_peer:
        return DirectivePlan(
            content=None, reason="no live member holds the state; no roster without a contributor"
        )
    age_seconds = now_unix_seconds - issue_unix_seconds
    changes = _changes(newest, wanted)
    if changes:
        gone = {line.peer_id for line in newest.roster} - {line.peer_id for line in wanted.roster}
        sure = any(m.peer_id in gone and m.is_gone_for_sure for m in members)
        is_urgent = sure or newest.is_paused != wanted.is_paused
        if not is_urgent and age_seconds < policy.directive_interval_seconds:
            return DirectivePlan(
                content=None, reason=f"waits: the last one is {age_seconds:.1f} s old"
            )
        return DirectivePlan(content=wanted, reason="; ".join(changes))
    off = are_budgets_off(newest.round_tokens_by_peer, wanted.round_tokens_by_peer)
    if off and age_seconds >= policy.speed_directive_interval_seconds:
        return DirectivePlan(content=wanted, reason=off)
    return DirectivePlan(content=None, reason="nothing that a directive says has changed")


def _changes(newest: DirectiveContent, wanted: DirectiveContent) -> list[str]:
    """Everything but round budgets that differs, one sentence each. How to reach a member that has
    no part in a round yet can wait for the directive that gives it one.
    """
    old = {line.peer_id: line for line in newest.roster}
    new = {line.peer_id: line for line in wanted.roster}
    changes = [f"{_named(new[peer])} joined" for peer in new if peer not in old]
    changes += [f"{_named(old[peer])} is gone" for peer in old if peer not in new]
    for peer in sorted(old.keys() & new.keys()):
        before, after = old[peer], new[peer]
        if before.has_vote != after.has_vote:
            changes.append(f"{_named(after)} {'gets' if after.has_vote else 'loses'} its vote")
        elif bool(before.round_tokens) != bool(after.round_tokens):
            does = (
                "holds the state and contributes"
                if after.round_tokens
                else "restarted, contributes later"
            )
            changes.append(f"{_named(after)} {does}")
        elif before.contact != after.contact and (after.has_vote or after.round_tokens):
            does = "has other addresses or another name"
            can_accept = after.contact.can_accept_connections
            if can_accept != before.contact.can_accept_connections:
                does = (
                    "can be dialled and reduces"
                    if can_accept
                    else "cannot be dialled and reduces nothing"
                )
            changes.append(f"{_named(after)} {does}")
    for name in ("budget_tokens", "cooldown_start_tokens"):
        if getattr(newest, name) != getattr(wanted, name):
            changes.append(f"{name} {getattr(newest, name)} -> {getattr(wanted, name)}")
    if newest.is_paused != wanted.is_paused:
        changes.append("paused by the operator" if wanted.is_paused else "resumed by the operator")
    return changes


def _named(line: RosterLine) -> str:
    return f"{line.contact.name or 'peer'} ({line.peer_id[:8]})"
