"""Members of a run: who is there, who holds the state, who votes, and why.

JOINED (admitted, state unknown) -> SYNCED (attested a state of the current incarnation) -> VOTER
(has a vote in the newest directive). LOST is silence, LEFT a signed or seen end, EVICTED an order.
Silence is a guess: a LOST peer that speaks again is JOINED again; a seen exit is certain, and
decisions that cannot wait rely on that difference. A restart (rejoin) makes a member JOINED but
leaves its vote in the newest directive: taking votes from those who are about to be back would
change rosters for nothing, and a roster without any voter could never be left.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from protos.contract.telemetry import PeerState

LIVE_STATES = frozenset({PeerState.JOINED, PeerState.SYNCED, PeerState.VOTER})
"""States of peers that take part or are about to."""

MAX_STEPS_BEHIND = 8
"""Certified steps beyond the state that a member attests, with which it may get its vote."""
MAX_CLAIM = 1e18
"""No claimed number is above this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One member as decisions see it."""

    peer_id: str
    state: PeerState
    state_reason: str
    join_unix_seconds: float
    """Start of its present session, or when it lost its state later in it."""
    last_heartbeat_unix_seconds: float
    has_vote: bool
    """In the newest directive."""
    attested_incarnation: int = -1
    """-1 before its first attestation since it joined."""
    attested_outer_step: int = 0
    attested_digest: bytes = b""
    is_gone_for_sure: bool = False
    """Left, evicted, or seen to exit: it will not speak again in this session."""

    @property
    def is_live(self) -> bool:
        """True if it takes part or is about to."""
        return self.state in LIVE_STATES

    def has_attested(self, incarnation: int) -> bool:
        """True if it has attested a state of the incarnation since it joined."""
        return self.attested_incarnation == incarnation and bool(self.attested_digest)


def after_join(member: Member | None, *, peer_id: str, now_unix_seconds: float) -> Member:
    """The member after an admitted Join; an earlier vote stays until the member is lost."""
    has_vote = member.has_vote if member is not None and member.is_live else False
    reason = "joined; has not attested a state yet"
    if member is not None:
        reason = f"joined again after {member.state}; has not attested a state yet"
    return Member(
        peer_id=peer_id,
        state=PeerState.JOINED,
        state_reason=reason,
        join_unix_seconds=now_unix_seconds,
        last_heartbeat_unix_seconds=now_unix_seconds,
        has_vote=has_vote,
    )


def after_heartbeat(member: Member, *, now_unix_seconds: float) -> Member:
    """The member after a heartbeat; a LOST one is back, without state and vote until it attests
    again.
    """
    member = replace(member, last_heartbeat_unix_seconds=now_unix_seconds, is_gone_for_sure=False)
    if member.state is not PeerState.LOST:
        return member
    return replace(
        member,
        state=PeerState.JOINED,
        state_reason="heard again after it was lost; has not attested a state since",
        attested_incarnation=-1,
        attested_digest=b"",
    )


def after_state_loss(member: Member, *, now_unix_seconds: float) -> Member:
    """The member after the process that held its state has ended: as after a Join, until it attests
    what it holds now.
    """
    if not member.is_live:
        return member
    return replace(
        member,
        state=PeerState.JOINED,
        state_reason="the process that held its state ended; has not attested a state since",
        join_unix_seconds=now_unix_seconds,
        attested_incarnation=-1,
        attested_digest=b"",
    )


def after_attestation(
    member: Member,
    *,
    incarnation: int,
    outer_step: int,
    state_digest: bytes,
    current_incarnation: int,
    certified_outer_step: int,
) -> Member:
    """The member after an attestation that was found consistent with what is proved. One without a
    vote gets its part once it is as far as the others: they would wait for it.
    """
    if not member.is_live:
        return member
    newer = (incarnation, outer_step) >= (member.attested_incarnation, member.attested_outer_step)
    if newer:
        member = replace(
            member,
            attested_incarnation=incarnation,
            attested_outer_step=outer_step,
            attested_digest=state_digest,
        )
    if member.state is PeerState.JOINED and incarnation == current_incarnation:
        if not member.has_vote and outer_step + MAX_STEPS_BEHIND < certified_outer_step:
            reason = (
                f"catches up: attested outer step {outer_step}, {certified_outer_step} is certified"
            )
            return replace(member, state_reason=reason)
        state = PeerState.VOTER if member.has_vote else PeerState.SYNCED
        reason = f"attested the state of outer step {outer_step}"
        return replace(member, state=state, state_reason=reason)
    return member


def after_refused_attestation(member: Member, *, reason: str) -> Member:
    """A member that holds another state than the proved one must resynchronise; it keeps an old
    vote until then.
    """
    if not member.is_live:
        return member
    return replace(
        member,
        state=PeerState.JOINED,
        state_reason=reason,
        attested_incarnation=-1,
        attested_digest=b"",
    )


def after_directive(member: Member, *, has_vote: bool, directive_number: int) -> Member:
    """The member after a directive was issued that gives or does not give it a vote."""
    if has_vote and member.state is PeerState.SYNCED:
        reason = f"has a vote from directive {directive_number} on"
        return replace(member, has_vote=True, state=PeerState.VOTER, state_reason=reason)
    if not has_vote and member.state is PeerState.VOTER:
        reason = f"has no vote from directive {directive_number} on"
        return replace(member, has_vote=False, state=PeerState.SYNCED, state_reason=reason)
    return member if member.has_vote == has_vote else replace(member, has_vote=has_vote)


def after_incarnation(member: Member, *, incarnation: int, has_vote: bool) -> Member:
    """The member after a new incarnation began: whoever has a vote is a voter, the others must
    attest in it.
    """
    if not member.is_live:
        return replace(member, has_vote=False)
    if has_vote:
        reason = f"voter of incarnation {incarnation} from its start"
        return replace(member, has_vote=True, state=PeerState.VOTER, state_reason=reason)
    reason = f"has not attested a state of incarnation {incarnation} yet"
    return replace(member, has_vote=False, state=PeerState.JOINED, state_reason=reason)


def after_end(member: Member, *, state: PeerState, reason: str) -> Member:
    """The member after it left, was evicted, or was seen to exit (LOST): certain ends."""
    return replace(member, state=state, state_reason=reason, is_gone_for_sure=True)


def after_silence(member: Member, *, now_unix_seconds: float, ttl_seconds: float) -> Member:
    """The member, LOST if it is live and has been silent for longer than the TTL."""
    silent_seconds = now_unix_seconds - member.last_heartbeat_unix_seconds
    if not member.is_live or silent_seconds < ttl_seconds:
        return member
    reason = f"no heartbeat for {silent_seconds:.0f} s; the limit is {ttl_seconds:.0f} s"
    return replace(member, state=PeerState.LOST, state_reason=reason)


def claim_problem(numbers: Mapping[str, float]) -> str:
    """Sentence about the first claimed number that cannot be true, "" if all can.

    clock_offset_seconds may be negative; every other number is at least 0 and all are finite.
    """
    for name, value in numbers.items():
        if not math.isfinite(value) or abs(value) > MAX_CLAIM:
            return f"{name} = {value}; allowed are finite numbers up to {MAX_CLAIM:g}"
        if value < 0 and name != "clock_offset_seconds":
            return f"{name} = {value}; allowed are numbers from 0"
    return ""


def missing_capability(*, needs: Iterable[tuple[str, str, Iterable[str]]]) -> str:
    """Sentence about the first need that is not among what a peer offers, "" if all are.

    Each need is (what it is, name needed, names offered).
    """
    for kind, needed, offered in needs:
        names = sorted(offered)
        if needed not in names:
            return f"{kind} {needed!r} is needed, this peer offers {', '.join(names) or 'none'}"
    return ""
