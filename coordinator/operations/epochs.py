"""Issuing what the coordinator signs about rosters: directives and incarnation records, each in one
transaction.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from coordinator.domain.directives import (
    Contact,
    DirectiveContent,
    RosterLine,
    RunTerms,
    build_content,
    plan_directive,
)
from coordinator.domain.incarnations import Base, voters_of_base
from coordinator.domain.membership import Member, after_directive, after_incarnation
from coordinator.operations.common import (
    OperationContext,
    load_book,
    load_directive,
    load_run_data,
    unix_ms,
)
from coordinator.operations.members import (
    contact_from_row,
    member_from_row,
    save_member,
    speed_from_row,
)
from coordinator.operations.pool_budget import cooldown_start_tokens
from coordinator.operations.store_age import load_beyond
from coordinator.store.base import Transaction
from coordinator.store.rows import DirectiveRow, IncarnationRow, RunRow
from protos.contract.certificate import Tag
from protos.contract.text import counted
from protos.muster.v1 import common_pb2


@dataclass(frozen=True, slots=True, kw_only=True)
class SwarmView:
    """Members of a run with what rosters say of them."""

    members: tuple[Member, ...]
    contact_by_peer: dict[str, Contact]
    speed_by_peer: dict[str, float]


def load_swarm(tx: Transaction, run_id: str) -> SwarmView:
    """All members of a run; contacts and speeds of the live ones."""
    rows = tx.peers(run_id)
    members = tuple(member_from_row(row) for row in rows)
    live = [row for row, member in zip(rows, members, strict=True) if member.is_live]
    return SwarmView(
        members=members,
        contact_by_peer={row.peer_id: contact_from_row(row) for row in live},
        speed_by_peer={row.peer_id: speed_from_row(row) for row in live},
    )


def pause_reason(tx: Transaction, run_id: str) -> str:
    """Why the operator has paused the run, "" if it is not paused."""
    return tx.meta(f"pause/{run_id}")


def set_pause(tx: Transaction, run_id: str, reason: str) -> None:
    """Pause with a reason, or go on with ""; the next directive carries it."""
    tx.set_meta(f"pause/{run_id}", reason)


def load_terms(tx: Transaction, context: OperationContext, run_id: str) -> RunTerms:
    """What every directive of the run carries."""
    spec = load_run_data(tx, context, run_id).spec
    budget_tokens = load_book(tx, run_id).budget_tokens
    return RunTerms(
        budget_tokens=budget_tokens,
        cooldown_start_tokens=cooldown_start_tokens(
            tx, run_id, budget_tokens, cooldown_ratio=spec.schedule.cooldown_ratio
        ),
        is_paused=bool(pause_reason(tx, run_id)),
        strategy=spec.strategy,
        seq_len=spec.model.seq_len,
    )


def content_from_directive(directive: common_pb2.Directive) -> DirectiveContent:
    """A stored directive as decisions see it."""
    return DirectiveContent(
        roster=tuple(
            RosterLine(
                peer_id=entry.peer_id,
                contact=Contact(
                    p2p_peer_id=entry.p2p_peer_id,
                    public_key=entry.public_key,
                    can_accept_connections=entry.can_accept_connections,
                    addresses=tuple(entry.addresses),
                    name=entry.name,
                ),
                has_vote=entry.has_vote,
                round_tokens=entry.round_tokens,
                max_round_tokens=entry.max_round_tokens,
            )
            for entry in directive.roster
        ),
        budget_tokens=directive.budget_tokens,
        cooldown_start_tokens=directive.cooldown_start_tokens,
        is_paused=directive.is_paused,
    )


def issue_directive(
    tx: Transaction,
    context: OperationContext,
    run: RunRow,
    content: DirectiveContent,
    *,
    members: Sequence[Member],
    reason: str,
    now_unix_seconds: float,
) -> RunRow:
    """Sign and store the next directive of the current incarnation; members' votes follow. Returns
    the run's new row.
    """
    number = run.directive_number + 1
    _store_directive(
        tx,
        context,
        run,
        content,
        number=number,
        incarnation=run.incarnation,
        reason=reason,
        now_unix_seconds=now_unix_seconds,
    )
    for member in members:
        after = after_directive(
            member, has_vote=member.peer_id in content.voters, directive_number=number
        )
        save_member(tx, run.run_id, member, after, now_unix_seconds=now_unix_seconds)
    run = replace(run, directive_number=number)
    tx.update_run(run)
    return run


def issue_due_directive(
    tx: Transaction, context: OperationContext, run: RunRow, *, now_unix_seconds: float
) -> tuple[RunRow, str]:
    """Issue the next directive of an incarnation if one is due; returns the run's row and why, or
    "".
    """
    row = tx.directive(run.run_id, run.directive_number)
    newest = load_directive(tx, context, run.run_id, run.directive_number)
    assert row is not None and newest is not None, "a run has a directive"
    swarm = load_swarm(tx, run.run_id)
    plan = plan_directive(
        content_from_directive(newest),
        swarm.members,
        issue_unix_seconds=row.issue_unix_ms / 1000,
        now_unix_seconds=now_unix_seconds,
        contact_by_peer=swarm.contact_by_peer,
        speed_by_peer=swarm.speed_by_peer,
        terms=load_terms(tx, context, run.run_id),
        policy=context.policy,
    )
    if plan.content is None:
        return run, ""
    run = issue_directive(
        tx,
        context,
        run,
        plan.content,
        members=swarm.members,
        reason=plan.reason,
        now_unix_seconds=now_unix_seconds,
    )
    return run, plan.reason


def admit_at_once(
    tx: Transaction, context: OperationContext, run: RunRow, *, now_unix_seconds: float
) -> RunRow:
    """A member has come or has said what state it holds: issue the directive that it waits for now,
    not at the next tick, unless the last one is too young. Returns the run's row.
    """
    row = tx.directive(run.run_id, run.directive_number)
    if run.incarnation == 0 or row is None:
        return run
    age_seconds = now_unix_seconds - row.issue_unix_ms / 1000
    if age_seconds < context.policy.directive_interval_seconds:
        return run  # a crowd that comes at once is admitted together, by a tick
    return issue_due_directive(tx, context, run, now_unix_seconds=now_unix_seconds)[0]


def next_incarnation(tx: Transaction, run: RunRow) -> int:
    """Number of the incarnation that would begin now: above all that this coordinator is known to
    have signed, its store's and others.
    """
    beyond = load_beyond(tx, run)
    return max(run.incarnation, 0 if beyond is None else beyond.incarnation) + 1


def begin_incarnation(
    tx: Transaction,
    context: OperationContext,
    run: RunRow,
    base: Base,
    *,
    swarm: SwarmView,
    reason: str,
    now_unix_seconds: float,
) -> RunRow:
    """Sign and store the record of the next incarnation with its first directive; returns the run's
    new row.

    The ledger's part (freeing what was credited after the base) is the caller's, in the same
    transaction, before this.
    """
    incarnation = next_incarnation(tx, run)
    beyond = load_beyond(tx, run)
    number = max(run.directive_number, 0 if beyond is None else beyond.directive_number) + 1
    voters = voters_of_base(base, swarm.members)
    members = [
        after_incarnation(m, incarnation=incarnation, has_vote=m.peer_id in voters)
        for m in swarm.members
    ]
    content = build_content(
        members,
        contact_by_peer=swarm.contact_by_peer,
        speed_by_peer=swarm.speed_by_peer,
        voters=voters,
        terms=load_terms(tx, context, run.run_id),
    )
    signed = _store_directive(
        tx,
        context,
        run,
        content,
        number=number,
        incarnation=incarnation,
        reason=reason,
        now_unix_seconds=now_unix_seconds,
    )
    store_record(
        tx,
        context,
        common_pb2.IncarnationRecord(
            run_id=run.run_id,
            incarnation=incarnation,
            to_outer_step=base.outer_step,
            base_incarnation=base.incarnation,
            base_state_digest=base.state_digest,
            directive=signed,
            reason=reason,
        ),
        now_unix_seconds=now_unix_seconds,
    )
    for before, after in zip(swarm.members, members, strict=True):
        save_member(tx, run.run_id, before, after, now_unix_seconds=now_unix_seconds)
    start_unix_ms = run.start_unix_ms or unix_ms(now_unix_seconds)
    run = replace(
        run, incarnation=incarnation, directive_number=number, start_unix_ms=start_unix_ms
    )
    tx.update_run(run)
    return run


def store_record(
    tx: Transaction,
    context: OperationContext,
    record: common_pb2.IncarnationRecord,
    *,
    now_unix_seconds: float,
) -> None:
    """Sign and store an incarnation's record, and say so in the event log."""
    record.decide_time.FromMilliseconds(unix_ms(now_unix_seconds))
    signed = context.signing_key.signed(Tag.INCARNATION, record.SerializeToString())
    tx.insert_incarnation(
        IncarnationRow(
            run_id=record.run_id,
            incarnation=record.incarnation,
            to_outer_step=record.to_outer_step,
            base_incarnation=record.base_incarnation,
            base_state_digest=record.base_state_digest,
            payload=signed.payload,
            signature=signed.signature,
            decide_unix_ms=unix_ms(now_unix_seconds),
        )
    )
    _note(
        tx,
        record.run_id,
        "incarnation",
        f"incarnation {record.incarnation} begins at outer step {record.to_outer_step}: "
        f"{record.reason}",
        now_unix_seconds=now_unix_seconds,
    )


def store_first_directive(
    tx: Transaction,
    context: OperationContext,
    run: RunRow,
    content: DirectiveContent,
    *,
    reason: str,
    now_unix_seconds: float,
) -> common_pb2.Signed:
    """Sign and store directive 1 of incarnation 0, which has no roster."""
    return _store_directive(
        tx,
        context,
        run,
        content,
        number=1,
        incarnation=0,
        reason=reason,
        now_unix_seconds=now_unix_seconds,
    )


def _store_directive(
    tx: Transaction,
    context: OperationContext,
    run: RunRow,
    content: DirectiveContent,
    *,
    number: int,
    incarnation: int,
    reason: str,
    now_unix_seconds: float,
) -> common_pb2.Signed:
    directive = common_pb2.Directive(
        run_id=run.run_id,
        incarnation=incarnation,
        directive_number=number,
        roster=[_roster_entry(line) for line in content.roster],
        budget_tokens=content.budget_tokens,
        cooldown_start_tokens=content.cooldown_start_tokens,
        is_paused=content.is_paused,
        reason=reason,
    )
    directive.issue_time.FromMilliseconds(unix_ms(now_unix_seconds))
    signed = context.signing_key.signed(Tag.DIRECTIVE, directive.SerializeToString())
    tx.insert_directive(
        DirectiveRow(
            run_id=run.run_id,
            directive_number=number,
            incarnation=incarnation,
            payload=signed.payload,
            signature=signed.signature,
            issue_unix_ms=unix_ms(now_unix_seconds),
        )
    )
    text = (
        f"directive {number}: {counted(len(content.roster), 'member')}, "
        f"{counted(len(content.voters), 'vote')}; {reason}"
    )
    _note(tx, run.run_id, "directive", text, now_unix_seconds=now_unix_seconds)
    return signed


def _roster_entry(line: RosterLine) -> common_pb2.RosterEntry:
    return common_pb2.RosterEntry(
        peer_id=line.peer_id,
        p2p_peer_id=line.contact.p2p_peer_id,
        public_key=line.contact.public_key,
        has_vote=line.has_vote,
        round_tokens=line.round_tokens,
        max_round_tokens=line.max_round_tokens,
        can_accept_connections=line.contact.can_accept_connections,
        addresses=line.contact.addresses,
        name=line.contact.name,
    )


def _note(tx: Transaction, run_id: str, kind: str, text: str, *, now_unix_seconds: float) -> None:
    tx.insert_event(
        run_id=run_id, unix_ms=unix_ms(now_unix_seconds), kind=kind, peer_id="", text=text
    )
