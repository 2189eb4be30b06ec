"""The coordinator as a voter of weight one half (architecture section 5, Quorum).

It keeps the promises that members keep (never vote in an attempt lower than promised), and one more
rule: it signs *last*, only when its half completes a quorum with the member votes that it holds, in
the transaction that stores and credits the certificate. So a signature of the coordinator never
exists without a stored certificate: nothing commits by its half without its knowledge, an
incarnation that it starts cannot undo what it helped to commit unknowingly, and its highest vote
for an outer step is always the stored certificate's.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from protos.contract.certificate import is_quorum
from protos.contract.ids import COORDINATOR_VOTER

NO_ATTEMPT = -1
MAX_ATTEMPTS_AHEAD = 4096
"""How far one exchange may go beyond the highest known attempt, so that nobody uses attempts up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AcceptorState:
    """Durable state for one (incarnation, outer_step); this is the one before anything happened."""

    promised_attempt: int = NO_ATTEMPT
    vote_attempt: int = NO_ATTEMPT
    vote_value: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromiseDecision:
    """State to write before answering."""

    state: AcceptorState
    is_promised: bool
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class VoteDecision:
    """What to do with votes that were offered."""

    state: AcceptorState
    is_certificate: bool
    """True if the offered votes, with the own one if `signs`, are a quorum."""
    signs: bool
    """True if the own half is needed and may be given."""
    reason: str


def promise(state: AcceptorState, *, attempt: int) -> PromiseDecision:
    """Answer an exchange: promise not to vote below `attempt`."""
    if attempt < state.promised_attempt:
        return PromiseDecision(
            state=state,
            is_promised=False,
            reason=f"attempt {state.promised_attempt} is promised already",
        )
    most = max(state.promised_attempt, state.vote_attempt) + MAX_ATTEMPTS_AHEAD
    if attempt > most:
        return PromiseDecision(
            state=state,
            is_promised=False,
            reason=f"attempt {attempt} is too far ahead; at most {most} can be promised",
        )
    promised = AcceptorState(
        promised_attempt=attempt, vote_attempt=state.vote_attempt, vote_value=state.vote_value
    )
    return PromiseDecision(state=promised, is_promised=True, reason="")


def decide_vote(
    state: AcceptorState,
    *,
    attempt: int,
    value: bytes,
    voters: set[str],
    half_votes: Mapping[str, int],
) -> VoteDecision:
    """Decide on equal, valid votes of `voters` (members only) for a value in an attempt.

    The caller has checked the signatures and that the value continues the chain; no certificate is
    stored for the outer step.
    """
    if state.vote_attempt != NO_ATTEMPT and state.vote_value != value:
        return VoteDecision(
            state=state,
            is_certificate=is_quorum(voters, half_votes),
            signs=False,
            reason=f"another value was signed in attempt {state.vote_attempt}",
        )
    if is_quorum(voters, half_votes):
        return VoteDecision(state=state, is_certificate=True, signs=False, reason="")
    if not is_quorum(voters | {COORDINATOR_VOTER}, half_votes):
        halves = sum(half_votes.get(voter, 0) for voter in voters)
        return VoteDecision(
            state=state,
            is_certificate=False,
            signs=False,
            reason=(
                f"{halves / 2:g} of {sum(half_votes.values()) / 2:g} votes and the coordinator's "
                "half are no quorum"
            ),
        )
    if attempt < state.promised_attempt:
        return VoteDecision(
            state=state,
            is_certificate=False,
            signs=False,
            reason=f"attempt {state.promised_attempt} is promised; attempt {attempt} is below it",
        )
    voted = AcceptorState(promised_attempt=attempt, vote_attempt=attempt, vote_value=value)
    return VoteDecision(state=voted, is_certificate=True, signs=True, reason="")


def equivocation(*, stored_value: bytes, other_value: bytes, outer_step: int) -> str:
    """Reason to show if two proven values of one outer step differ, else ""."""
    if stored_value == other_value:
        return ""
    return (
        f"two certificates with different values for outer step {outer_step}: "
        "more than half of the votes broke the rules; start a new incarnation from an outer step "
        "before"
    )
