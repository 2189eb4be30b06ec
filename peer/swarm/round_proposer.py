"""What the leader of one attempt knows and decides: whom to wait for, whom to average with, what to
propose.

Attempt 0 begins with forming. A later attempt begins with an exchange among a quorum; if anybody
there has voted, the value of the highest attempt is proposed again unchanged, otherwise a group is
formed. Pure; the machine sends.
"""

import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from peer.swarm.reduce_slices import Link, slice_ends
from protos.muster.v1 import common_pb2, rounds_pb2


class Stage(StrEnum):
    """Where the leader is in its attempt."""

    EXCHANGE = "EXCHANGE"
    FORM = "FORM"
    FORMED = "FORMED"
    REPROPOSED = "REPROPOSED"
    STUCK = "STUCK"


@dataclass(slots=True, kw_only=True)
class Proposer:
    """The leader's memory of one attempt; lost in a crash, which the durable led_attempt makes
    harmless.
    """

    attempt: int
    begin_seconds: float
    stage: Stage
    joins: dict[str, rounds_pb2.JoinGroup] = field(default_factory=dict)
    tokens_by_peer: dict[str, int] = field(default_factory=dict)
    answers: dict[str, rounds_pb2.ExchangeAnswer] = field(default_factory=dict)
    group: rounds_pb2.FormGroup | None = None
    repropose: rounds_pb2.Repropose | None = None
    next_ask_seconds: float = 0.0
    """When the coordinator may be asked again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FormDecision:
    """Whether a group can form now."""

    is_formed: bool
    missing: tuple[str, ...]
    """Awaited members that have not joined."""
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangeChoice:
    """What a quorum of answers leaves to propose."""

    vote: rounds_pb2.Vote | None = None
    answer: rounds_pb2.ExchangeAnswer | None = None
    holders: tuple[str, ...] = ()
    equivocation: str = ""
    """Set if two values were voted for in the same highest attempt."""


def possible_leaders(roster: Iterable[common_pb2.RosterEntry]) -> list[common_pb2.RosterEntry]:
    """Voters that accept connections; all voters if none does."""
    voters = [entry for entry in roster if entry.has_vote]
    return [entry for entry in voters if entry.can_accept_connections] or voters


def leader_of(
    roster: Iterable[common_pb2.RosterEntry], *, incarnation: int, outer_step: int, attempt: int
) -> str:
    """Voter with the lowest hash(peer, step, attempt); voters that accept connections go first."""
    able = possible_leaders(roster)

    def rank(entry: common_pb2.RosterEntry) -> bytes:
        text = f"muster leader 1\n{entry.peer_id}\n{incarnation}\n{outer_step}\n{attempt}"
        return hashlib.sha256(text.encode()).digest()

    return min(able, key=rank).peer_id if able else ""


def decide_form(
    proposer: Proposer,
    *,
    roster: Collection[common_pb2.RosterEntry],
    own_peer_id: str,
    unreachable: Collection[str],
    at_step: Collection[str],
    now_seconds: float,
    deadline_seconds: float,
) -> FormDecision:
    """Form when every awaited member is there with at least half of the planned tokens, or at the
    deadline.

    Awaited are reachable voters, and members without a vote that are known to hold the state
    (`at_step`).
    """
    joined = set(proposer.joins)
    tokens = sum(proposer.tokens_by_peer.get(peer, 0) for peer in joined)
    planned = sum(entry.round_tokens for entry in roster)
    missing = tuple(
        entry.peer_id
        for entry in roster
        if entry.peer_id not in joined
        and (entry.peer_id == own_peer_id or entry.peer_id not in unreachable)
        and (entry.has_vote or entry.peer_id in at_step)
    )
    counts = f"{len(joined)} of {len(roster)} joined with {tokens} of {planned} planned tokens"
    if tokens == 0:
        return FormDecision(is_formed=False, missing=missing, reason=f"{counts}; nobody has work")
    if not missing and 2 * tokens >= planned:
        return FormDecision(is_formed=True, missing=(), reason=f"{counts}; everybody is there")
    left_seconds = deadline_seconds - now_seconds
    if left_seconds <= 0:
        return FormDecision(is_formed=True, missing=missing, reason=f"{counts}; deadline reached")
    reason = f"{counts}; waiting another {left_seconds:.1f} s for {len(missing)} missing"
    return FormDecision(is_formed=False, missing=missing, reason=reason)


def build_group(
    proposer: Proposer,
    *,
    entry_by_peer: Mapping[str, common_pb2.RosterEntry],
    num_pieces: int,
    next_directive: common_pb2.Signed,
) -> rounds_pb2.FormGroup:
    """Group of everybody that joined, ordered by peer_id, with slices that suit their links."""
    members = [proposer.joins[peer] for peer in sorted(proposer.joins)]
    links = links_of(members, entry_by_peer)
    return rounds_pb2.FormGroup(
        members=members,
        reducer_piece_ends=slice_ends(links, num_pieces=num_pieces),
        next_directive=next_directive,
    )


def links_of(
    members: Iterable[rounds_pb2.JoinGroup], entry_by_peer: Mapping[str, common_pb2.RosterEntry]
) -> list[Link]:
    """What members of a group say of their links."""
    return [
        Link(
            is_reducer=entry_by_peer[join.contribution.peer_id].can_accept_connections,
            has_values=len(join.contribution.ranges) > 0,
            upload_bytes_per_second=float(join.upload_bytes_per_second),
            download_bytes_per_second=float(join.download_bytes_per_second),
        )
        for join in members
    ]


def members_of(group: rounds_pb2.FormGroup) -> frozenset[str]:
    """Who averages in a group."""
    return frozenset(member.contribution.peer_id for member in group.members)


def contributors_of(group: rounds_pb2.FormGroup) -> frozenset[str]:
    """Members that bring something into a group."""
    contributions = [member.contribution for member in group.members]
    return frozenset(c.peer_id for c in contributions if c.ranges)


def choose_from_answers(answers: Mapping[str, rounds_pb2.ExchangeAnswer]) -> ExchangeChoice:
    """Highest vote among a quorum's answers, or freedom to average anew."""
    voted = {peer: a for peer, a in answers.items() if a.HasField("highest_vote")}
    if not voted:
        return ExchangeChoice()
    highest = max(answer.highest_vote.attempt for answer in voted.values())
    top = {p: a for p, a in voted.items() if a.highest_vote.attempt == highest}
    values = {answer.highest_vote.value for answer in top.values()}
    if len(values) > 1:
        names = ", ".join(sorted(top))
        found = f"{len(values)} values were voted for in attempt {highest} by {names}"
        return ExchangeChoice(equivocation=f"EQUIVOCATION: {found}; a new incarnation resolves it")
    answer = top[min(top)]
    holders = tuple(sorted(p for p, a in voted.items() if a.highest_vote.value in values))
    return ExchangeChoice(vote=answer.highest_vote, answer=answer, holders=holders)
