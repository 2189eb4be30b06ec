"""State of a run, with its reason. FINISHED and STOPPED are final; everything else follows from
what is the case now.
"""

from dataclasses import dataclass

from protos.contract.telemetry import RunState
from protos.contract.text import counted

FINAL_STATES = frozenset({RunState.FINISHED, RunState.STOPPED})
"""States that no event changes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FinalDuty:
    """Where the last evaluation or checkpoint stands."""

    is_done: bool
    is_given_up: bool
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """What the state of a run follows from."""

    previous: RunState
    previous_reason: str
    incarnation: int
    bootstrap_reason: str
    """What the bootstrap waits for."""
    is_paused: bool
    pause_reason: str
    num_live_peers: int
    is_recovering: bool
    stall_reason: str
    """Why no outer step can be committed now; "" if it can."""
    outer_step: int
    credited_tokens: int
    budget_tokens: int
    final_duties: tuple[FinalDuty, ...] = ()
    """Only looked at when the budget is credited."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunVerdict:
    """State and reason."""

    state: RunState
    reason: str


def decide_run_state(facts: RunFacts) -> RunVerdict:
    """The state of the run now. Waiting for final duties is RUNNING: members must not leave before
    them.
    """
    if facts.previous in FINAL_STATES:
        return RunVerdict(state=facts.previous, reason=facts.previous_reason)
    if facts.credited_tokens >= facts.budget_tokens:
        return _decide_end(facts)
    if facts.is_paused:
        return RunVerdict(
            state=RunState.PAUSED, reason=facts.pause_reason or "paused by the operator"
        )
    if facts.incarnation == 0:
        return RunVerdict(state=RunState.WAITING_FOR_PEERS, reason=facts.bootstrap_reason)
    if facts.is_recovering:
        return RunVerdict(state=facts.previous, reason=facts.previous_reason)
    if facts.num_live_peers == 0:
        reason = (
            f"no live peer; {facts.credited_tokens} of {facts.budget_tokens} tokens are credited,"
            f" outer step {facts.outer_step}; goes on when peers join"
        )
        return RunVerdict(state=RunState.STALLED, reason=reason)
    if facts.stall_reason:
        return RunVerdict(state=RunState.STALLED, reason=facts.stall_reason)
    return RunVerdict(
        state=RunState.RUNNING,
        reason=counted(facts.num_live_peers, "live peer")
        + (" trains" if facts.num_live_peers == 1 else " train"),
    )


def _decide_end(facts: RunFacts) -> RunVerdict:
    """The budget is credited: finished, or running until the final duties are done."""
    credited = f"{facts.credited_tokens} of {facts.budget_tokens} tokens are credited"
    waiting = [
        duty.reason for duty in facts.final_duties if not duty.is_done and not duty.is_given_up
    ]
    if not waiting and facts.final_duties:
        details = "; ".join(duty.reason for duty in facts.final_duties)
        return RunVerdict(state=RunState.FINISHED, reason=f"{credited}; {details}")
    if facts.num_live_peers == 0 and not facts.is_recovering:
        reason = f"{credited}; no member is left for the final duties"
        return RunVerdict(state=RunState.FINISHED, reason=reason)
    return RunVerdict(
        state=RunState.RUNNING, reason=f"{credited}; waits: {'; '.join(waiting) or 'final duties'}"
    )
