"""Duties: which evaluations and checkpoints are due, who does them, and what becomes of a silent
doer.

A duty is OPEN, ASSIGNED to one member under a fence, then DONE or FAILED. The fence rises with
every hand-over, so a late result of an earlier holder is refused. Heartbeats of a holder at work
renew it, as they do leases, so slow work is not lost; a holder that is gone, or silent about it,
loses it, and one that takes longer than the work could on the slowest machine does too. Ids are
made of the run and what the duty is for, so none is created twice. Evaluations are spaced by
credited tokens, checkpoints by time; one of each kind is under way at most. Both end with a final
one of the last certified state, without which a run is not over. Trials of a study need no state:
any live member may do one, the slow ones small ones; a study makes them, many at a time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from coordinator.domain.membership import Member
from coordinator.domain.policy import SwarmPolicy
from protos.contract.telemetry import PeerState

MAX_DUTY_ATTEMPTS = 5
"""Hand-outs of one duty before it is given up."""

LEAST_PATIENCE_SECONDS = 600.0
"""With the smallest work, however often it is renewed."""
SLOWEST_FLOP_PER_SECOND = 1e8

NUM_REMEMBERED_CHECKPOINTS = 8
"""Finished checkpoint duties that are kept, so that the list stays short in a run of weeks."""


class DutyKind(StrEnum):
    """What a duty asks for."""

    EVALUATE = "EVALUATE"
    CHECKPOINT = "CHECKPOINT"
    TRIAL = "TRIAL"


STATE_KINDS = (DutyKind.EVALUATE, DutyKind.CHECKPOINT)
"""Duties on the run's state; without a final one of each a run is not over."""


class DutyState(StrEnum):
    """Life of a duty."""

    OPEN = "OPEN"
    ASSIGNED = "ASSIGNED"
    DONE = "DONE"
    FAILED = "FAILED"


@dataclass(frozen=True, slots=True, kw_only=True)
class DutyRecord:
    """One duty."""

    duty_id: str
    kind: DutyKind
    state: DutyState
    fence: int
    """Number of hand-outs so far."""
    min_outer_step: int
    create_unix_seconds: float
    peer_id: str = ""
    assign_unix_seconds: float = 0.0
    finish_unix_seconds: float = 0.0
    reason: str = ""
    renew_unix_seconds: float = 0.0
    """Last time that the holder said that it works on it; first, when it got it."""

    @property
    def is_pending(self) -> bool:
        """True while a result may come."""
        return self.state in (DutyState.OPEN, DutyState.ASSIGNED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where the run stands, as far as duties go."""

    run_id: str
    incarnation: int
    outer_step: int
    """Newest certified."""
    credited_tokens: int
    budget_tokens: int
    begin_unix_seconds: float
    """Start of the current incarnation."""
    newest_checkpoint_outer_step: int
    """-1 if there is none on the chain."""
    newest_checkpoint_unix_seconds: float

    @property
    def is_complete(self) -> bool:
        """True when the whole budget is credited."""
        return self.credited_tokens >= self.budget_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Whether a result counts."""

    is_accepted: bool
    reason: str


def final_duty_id(run_id: str, kind: DutyKind, incarnation: int) -> str:
    """Id of the last duty of a kind; a rollback after it needs another."""
    return f"{run_id}/{kind.lower()}/final-{incarnation}"


def evaluation_part(credited_tokens: int, budget_tokens: int, num_parts: int) -> str:
    """The newest part of the budget, of `num_parts`, after which an evaluation is due.

    The first two parts are looked at more closely, by quarters of a part from the first half on:
    a forecast from the first quarter of the run needs points there.
    """
    quarters = 4 * credited_tokens * num_parts // budget_tokens
    if quarters < 2:
        quarters = 0
    elif quarters > 8:
        quarters -= quarters % 4
    return f"{quarters / 4:g}"


def plan_duties(
    duties: Sequence[DutyRecord],
    *,
    progress: Progress,
    now_unix_seconds: float,
    policy: SwarmPolicy,
) -> list[DutyRecord]:
    """Duties to be created now."""
    if progress.incarnation == 0:
        return []
    known = {duty.duty_id for duty in duties}
    pending_kinds = {duty.kind for duty in duties if duty.is_pending}
    created = []

    def create(kind: DutyKind, duty_id: str, reason: str) -> None:
        if duty_id not in known:
            duty = DutyRecord(
                duty_id=duty_id,
                kind=kind,
                state=DutyState.OPEN,
                fence=0,
                min_outer_step=progress.outer_step,
                create_unix_seconds=now_unix_seconds,
                reason=reason,
            )
            created.append(duty)

    if progress.is_complete:
        reason = f"the budget of {progress.budget_tokens} tokens is credited"
        for kind in STATE_KINDS:
            create(kind, final_duty_id(progress.run_id, kind, progress.incarnation), reason)
        return created
    if DutyKind.EVALUATE not in pending_kinds:
        part = evaluation_part(
            progress.credited_tokens, progress.budget_tokens, policy.num_evaluations
        )
        reason = f"part {part} of {policy.num_evaluations} of the budget is credited"
        create(DutyKind.EVALUATE, f"{progress.run_id}/evaluate/{part}", reason)
    if DutyKind.CHECKPOINT not in pending_kinds:
        ends = [d.finish_unix_seconds for d in duties if d.kind is DutyKind.CHECKPOINT]
        last = max([progress.begin_unix_seconds, progress.newest_checkpoint_unix_seconds, *ends])
        is_news = progress.outer_step > progress.newest_checkpoint_outer_step
        age_seconds = now_unix_seconds - last
        if is_news and age_seconds >= policy.checkpoint_interval_seconds:
            reason = f"the last checkpoint is {age_seconds:.0f} s old"
            create(
                DutyKind.CHECKPOINT,
                f"{progress.run_id}/checkpoint/{progress.incarnation}-{progress.outer_step}",
                reason,
            )
    return created


def forgettable_duties(duties: Sequence[DutyRecord]) -> list[DutyRecord]:
    """Finished duties of which nobody will ask again: all checkpoints but the newest few and the
    final ones.
    """
    ended = [
        duty
        for duty in duties
        if duty.kind is DutyKind.CHECKPOINT
        and not duty.is_pending
        and "/final-" not in duty.duty_id
    ]
    ended.sort(key=lambda duty: duty.finish_unix_seconds)
    return ended[:-NUM_REMEMBERED_CHECKPOINTS]


def withdraw_outdated(
    duties: Sequence[DutyRecord], *, progress: Progress, now_unix_seconds: float
) -> list[DutyRecord]:
    """Pending duties that the end of the budget or a rollback has overtaken, as FAILED."""
    changed = []
    for duty in duties:
        if not duty.is_pending or duty.kind is DutyKind.TRIAL:
            continue
        final_id = final_duty_id(progress.run_id, duty.kind, progress.incarnation)
        is_final = "/final-" in duty.duty_id
        if is_final and (duty.duty_id != final_id or not progress.is_complete):
            reason = "overtaken by a rollback"
        elif progress.is_complete and not is_final:
            reason = "overtaken by the final one"
        elif duty.min_outer_step > progress.outer_step:
            reason = f"asks for outer step {duty.min_outer_step}, which was rolled back"
        else:
            continue
        changed.append(_finished(duty, DutyState.FAILED, reason, now_unix_seconds))
    return changed


def recover_duties(
    duties: Sequence[DutyRecord],
    *,
    members: Sequence[Member],
    now_unix_seconds: float,
    policy: SwarmPolicy,
    patience_seconds_by_duty: Mapping[str, float],
) -> list[DutyRecord]:
    """Assigned duties whose holder is gone, has been silent about them for the TTL, or has had them
    for longer than their work may take, as OPEN again (or given up).
    """
    live = {m.peer_id for m in members if m.is_live}
    changed = []
    for duty in duties:
        if duty.state is not DutyState.ASSIGNED:
            continue
        held_seconds = now_unix_seconds - duty.assign_unix_seconds
        silent_seconds = now_unix_seconds - duty.renew_unix_seconds
        if duty.peer_id not in live:
            changed.append(reopen(duty, f"{duty.peer_id[:8]} is gone", now_unix_seconds))
        elif silent_seconds >= policy.duty_ttl_seconds:
            reason = f"{duty.peer_id[:8]} has not said for {silent_seconds:.0f} s that it works"
            changed.append(reopen(duty, reason, now_unix_seconds))
        elif held_seconds >= (most_seconds := patience_seconds_by_duty[duty.duty_id]):
            reason = (
                f"{duty.peer_id[:8]} gave no result for {held_seconds:.0f} s, though the slowest "
                f"machine would need {most_seconds:.0f} s"
            )
            changed.append(reopen(duty, reason, now_unix_seconds))
    return changed


def patience_seconds(flop: float) -> float:
    """Longest that work may take which is renewed: what the slowest machine would need."""
    return max(LEAST_PATIENCE_SECONDS, flop / SLOWEST_FLOP_PER_SECOND)


def renew(
    duties: Sequence[DutyRecord],
    *,
    duty_id: str,
    peer_id: str,
    fence: int,
    now_unix_seconds: float,
) -> DutyRecord | None:
    """The duty that a member says it works on, kept from being handed on; None if it is not the
    holder under that fence any more.
    """
    for duty in duties:
        if duty.duty_id == duty_id:
            is_holder = check_holder(duty, peer_id=peer_id, fence=fence).is_accepted
            return replace(duty, renew_unix_seconds=now_unix_seconds) if is_holder else None
    return None


def reopen(duty: DutyRecord, reason: str, now_unix_seconds: float) -> DutyRecord:
    """The duty, free for somebody else; given up after too many hand-outs."""
    if duty.fence >= MAX_DUTY_ATTEMPTS:
        why = f"given up after {duty.fence} hand-outs; the last: {reason}"
        return _finished(duty, DutyState.FAILED, why, now_unix_seconds)
    return replace(duty, state=DutyState.OPEN, peer_id="", reason=reason)


def assign(
    duties: Sequence[DutyRecord], member: Member, *, incarnation: int, now_unix_seconds: float
) -> DutyRecord | None:
    """The duty for a member that asks: the one it holds, or an open one that its state serves,
    under a new fence.
    """
    for duty in duties:
        if duty.state is DutyState.ASSIGNED and duty.peer_id == member.peer_id:
            return duty
    if member.state not in (PeerState.SYNCED, PeerState.VOTER) or not member.has_attested(
        incarnation
    ):
        return None
    for duty in duties:
        is_free = duty.state is DutyState.OPEN and duty.kind in STATE_KINDS
        if is_free and member.attested_outer_step >= duty.min_outer_step:
            return hand_out(duty, member.peer_id, now_unix_seconds=now_unix_seconds)
    return None


def parting_duty_id(run_id: str, incarnation: int, outer_step: int) -> str:
    """Id of the checkpoint that the last holder of a state owes when it leaves."""
    return f"{run_id}/checkpoint/{incarnation}-{outer_step}-parting"


def parting_duty(
    duties: Sequence[DutyRecord],
    member: Member,
    *,
    run_id: str,
    incarnation: int,
    outer_step: int,
    stored_outer_step: int,
    num_other_holders: int,
    known: DutyRecord | None,
    now_unix_seconds: float,
) -> DutyRecord | None:
    """The checkpoint that a member owes which is about to leave with the newest state: nobody who
    stays holds one, and the stored one is older. None if it owes nothing, if somebody else who
    leaves is giving it, or if it was given up.

    `duties` are the pending ones; `known` is the one of `parting_duty_id` in whatever state, if
    there is one: its fence goes on to rise.
    """
    for duty in duties:
        if duty.kind is not DutyKind.CHECKPOINT or duty.state is not DutyState.ASSIGNED:
            continue
        if duty.peer_id == member.peer_id:
            return duty
    is_newest = member.has_attested(incarnation) and member.attested_outer_step >= outer_step
    if num_other_holders or not is_newest or stored_outer_step >= outer_step:
        return None
    for duty in duties:
        if duty.kind is DutyKind.CHECKPOINT and duty.state is DutyState.OPEN:
            return hand_out(duty, member.peer_id, now_unix_seconds=now_unix_seconds)
    fence = 0 if known is None else known.fence
    if fence >= MAX_DUTY_ATTEMPTS or (known is not None and known.is_pending):
        return None
    duty = DutyRecord(
        duty_id=parting_duty_id(run_id, incarnation, outer_step),
        kind=DutyKind.CHECKPOINT,
        state=DutyState.OPEN,
        fence=fence,
        min_outer_step=outer_step,
        create_unix_seconds=now_unix_seconds,
        reason="the last member that holds this state leaves",
    )
    return hand_out(duty, member.peer_id, now_unix_seconds=now_unix_seconds)


def hand_out(duty: DutyRecord, peer_id: str, *, now_unix_seconds: float) -> DutyRecord:
    """The open duty with a holder, under a new fence."""
    return replace(
        duty,
        state=DutyState.ASSIGNED,
        peer_id=peer_id,
        fence=duty.fence + 1,
        assign_unix_seconds=now_unix_seconds,
        renew_unix_seconds=now_unix_seconds,
    )


def check_holder(duty: DutyRecord | None, *, peer_id: str, fence: int) -> Report:
    """Accept a message about a duty only from its present holder under its present fence."""
    if duty is None:
        return Report(is_accepted=False, reason="no such duty")
    if duty.state is not DutyState.ASSIGNED:
        return Report(is_accepted=False, reason=f"the duty is {duty.state}: {duty.reason}")
    if duty.fence != fence or duty.peer_id != peer_id:
        reason = (
            f"fence {fence} is stale: the duty is {duty.peer_id[:8]}'s under fence {duty.fence}"
        )
        return Report(is_accepted=False, reason=reason)
    return Report(is_accepted=True, reason="accepted")


def finish(duty: DutyRecord, reason: str, *, now_unix_seconds: float) -> DutyRecord:
    """The duty, done."""
    return _finished(duty, DutyState.DONE, reason, now_unix_seconds)


def give_up(duty: DutyRecord, reason: str, *, now_unix_seconds: float) -> DutyRecord:
    """The duty, which nobody is to do any more."""
    return _finished(duty, DutyState.FAILED, reason, now_unix_seconds)


def _finished(
    duty: DutyRecord, state: DutyState, reason: str, now_unix_seconds: float
) -> DutyRecord:
    return replace(duty, state=state, reason=reason, finish_unix_seconds=now_unix_seconds)
