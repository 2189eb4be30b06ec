"""The ticker's operation: everything that happens because time passes, for all runs, in one
transaction about once a second.

In this order: silence makes members LOST; leases expire; a new incarnation begins if the epoch
cannot end by itself; else the next directive, if one is due; duties; the state of the run. While
RECOVERING after a start nobody is lost, nothing expires and nothing is rolled back: peers are still
coming back.
"""

from dataclasses import replace

from coordinator.domain.duties import (
    STATE_KINDS,
    DutyKind,
    DutyRecord,
    DutyState,
    Progress,
    final_duty_id,
    forgettable_duties,
    plan_duties,
    recover_duties,
    withdraw_outdated,
)
from coordinator.domain.incarnations import (
    Holding,
    IncarnationPlan,
    check_need,
    plan_bootstrap,
    plan_rollback,
)
from coordinator.domain.membership import Member, after_refused_attestation, after_silence
from coordinator.domain.run_state import FINAL_STATES, FinalDuty, RunFacts, decide_run_state
from coordinator.operations.common import (
    REQUEST_MEMORY_SECONDS,
    OperationContext,
    is_recovering,
    load_book,
    load_run,
    unix_ms,
)
from coordinator.operations.duties import (
    eval_tokens_of,
    load_duties,
    save_duty,
    state_patience,
)
from coordinator.operations.epochs import (
    begin_incarnation,
    issue_due_directive,
    load_swarm,
    next_incarnation,
    pause_reason,
)
from coordinator.operations.leases import expire_leases
from coordinator.operations.members import load_members, save_member
from coordinator.operations.pool_budget import adapt_budget
from coordinator.operations.requests import TickRequest, TickResponse
from coordinator.operations.requests_ledger import ApplyRollback, ExpireLeasesRequest
from coordinator.operations.rollback import apply_rollback
from coordinator.operations.states import (
    Epoch,
    compare_with_certificates,
    load_epoch,
    load_segments,
    proved_checkpoints,
    proved_digest,
    voters_of_directive,
)
from coordinator.operations.store_age import load_beyond, reason_to_wait, settle_from
from coordinator.operations.studies import trial_patience
from coordinator.operations.study_stages import advance_studies, end_studies
from coordinator.store.base import Transaction
from coordinator.store.rows import RunRow
from protos.contract.telemetry import RunState
from protos.contract.text import counted

_MAX_PRUNED_REQUESTS = 256


def tick(
    tx: Transaction, request: TickRequest, /, *, context: OperationContext, now_unix_seconds: float
) -> TickResponse:
    """Let time pass for every run; returns what changed, one sentence each."""
    recovering = is_recovering(tx, now_unix_seconds=now_unix_seconds)
    changes: list[str] = []
    for run in tx.runs():
        run_tick = _RunTick(tx, context, run, now_unix_seconds, recovering)
        run_tick.pass_time()
        changes.extend(f"{run.run_id}: {change}" for change in run_tick.changes)
    before_unix_ms = unix_ms(now_unix_seconds - REQUEST_MEMORY_SECONDS)
    tx.prune_requests(before_unix_ms=before_unix_ms, num_requests=_MAX_PRUNED_REQUESTS)
    return TickResponse(changes=tuple(changes), is_recovering=recovering)


class _RunTick:
    """One run in one tick: the pieces share the transaction, the instant and the list of
    changes.
    """

    def __init__(
        self,
        tx: Transaction,
        context: OperationContext,
        run: RunRow,
        now_unix_seconds: float,
        recovering: bool,
    ) -> None:
        self._tx = tx
        self._context = context
        self._run = run
        self._now = now_unix_seconds
        self._recovering = recovering
        self.changes: list[str] = []

    def pass_time(self) -> None:
        """Everything for this run, in the module's order."""
        if not self._recovering:
            self._lose_silent()
        if self._run.state in FINAL_STATES:
            return
        expired = expire_leases(
            self._tx,
            ExpireLeasesRequest(run_id=self._run.run_id),
            context=self._context,
            now_unix_seconds=self._now,
        )
        if expired.num_expired_leases:
            self.changes.append(
                f"{counted(expired.num_expired_leases, 'lease')} expired: {expired.reason}"
            )
        bootstrap_reason = stall_reason = ""
        if self._run.incarnation == 0:
            bootstrap_reason = self._bootstrap()
        elif not self._recovering:
            stall_reason = self._check_epoch()
        if self._run.incarnation > 0:
            self._adapt_budget()
            self._issue_directive()
        self._handle_duties()
        self.changes += advance_studies(self._tx, self._run, now_unix_seconds=self._now)
        compare_with_certificates(self._tx, self._run, now_unix_seconds=self._now)
        self._decide_state(bootstrap_reason=bootstrap_reason, stall_reason=stall_reason)

    def _is_complete(self) -> bool:
        book = load_book(self._tx, self._run.run_id)
        return book.credited_tokens >= book.budget_tokens

    def _lose_silent(self) -> None:
        ttl_seconds = self._context.policy.peer_ttl_seconds
        for member in load_members(self._tx, self._run.run_id):
            after = after_silence(member, now_unix_seconds=self._now, ttl_seconds=ttl_seconds)
            if after is not member:
                save_member(self._tx, self._run.run_id, member, after, now_unix_seconds=self._now)
                self.changes.append(f"{member.peer_id[:8]} is LOST: {after.state_reason}")

    def _bootstrap(self) -> str:
        """Start incarnation 1 if enough peers attest the initial state; returns what is waited
        for.
        """
        attested = self._tx.attestations(self._run.run_id, 0, 0)
        plan = plan_bootstrap(
            load_members(self._tx, self._run.run_id),
            attest_unix_seconds_by_peer={
                row.peer_id: row.receive_unix_ms / 1000 for row in attested
            },
            min_peers=self._run.min_peers,
            now_unix_seconds=self._now,
            policy=self._context.policy,
        )
        if plan.base is not None:
            self._begin(plan)
        return plan.reason

    def _check_epoch(self) -> str:
        """Begin a new incarnation if the present epoch cannot end by itself; returns why the run is
        stalled, if it is.
        """
        run_id, policy = self._run.run_id, self._context.policy
        epoch = load_epoch(self._tx, self._run)
        members = load_members(self._tx, run_id)
        accepted = self._tx.acceptor(run_id, self._run.incarnation, epoch.certified_outer_step + 1)
        need = check_need(
            members,
            voters_in_force=self._voters(epoch.directive_number_in_force),
            voters_newest=self._voters(self._run.directive_number),
            current_incarnation=self._run.incarnation,
            certified_outer_step=epoch.certified_outer_step,
            certify_unix_seconds=epoch.certify_unix_seconds,
            now_unix_seconds=self._now,
            policy=policy,
            equivocation_reason="" if accepted is None else accepted.equivocation_reason,
        )
        beyond = load_beyond(self._tx, self._run)
        if not need.is_needed and beyond is None:
            return need.reason if need.is_stalled else ""
        holdings = self._holdings(members, epoch)
        if beyond is not None:
            holdings = settle_from(beyond, holdings)
        need_reason = need.reason if beyond is None or need.is_needed else beyond.reason
        plan = plan_rollback(
            holdings,
            members,
            segments=load_segments(self._tx, run_id),
            certified_outer_step=epoch.certified_outer_step,
            digest_proved=lambda incarnation, outer_step: proved_digest(
                self._tx, self._context, run_id, incarnation=incarnation, outer_step=outer_step
            ),
            need_reason=need_reason,
            now_unix_seconds=self._now,
            policy=policy,
        )
        if plan.base is None:
            return plan.reason
        if beyond is not None:
            reason = reason_to_wait(
                beyond,
                holdings,
                incarnation=self._run.incarnation,
                base_outer_step=plan.base.outer_step,
                certified_outer_step=epoch.certified_outer_step,
                is_needed=need.is_needed,
            )
            if reason:
                return reason
        self._begin(plan)
        return ""

    def _voters(self, directive_number: int) -> frozenset[str]:
        return voters_of_directive(self._tx, self._context, self._run.run_id, directive_number)

    def _holdings(self, members: list[Member], epoch: Epoch) -> list[Holding]:
        """What live members attest, what is stored, and the initial state, which every peer can
        build from the spec.
        """
        found = [
            Holding(
                peer_id="",
                incarnation=record.base_incarnation,
                outer_step=record.to_outer_step,
                state_digest=record.base_state_digest,
                since_unix_seconds=record.decide_unix_ms / 1000,
            )
            for record in self._tx.incarnations(self._run.run_id)
            if record.incarnation > 0 and (record.base_incarnation, record.to_outer_step) == (0, 0)
        ][:1]
        found += [
            Holding(
                peer_id="",
                incarnation=row.incarnation,
                outer_step=row.outer_step,
                state_digest=row.state_digest,
                since_unix_seconds=row.store_unix_ms / 1000,
            )
            for row in proved_checkpoints(self._tx, self._context, self._run.run_id)
        ]
        for member in members:
            if not member.is_live or member.attested_incarnation < 0:
                continue
            since_unix_ms = 0
            if member.attested_outer_step > epoch.certified_outer_step:
                rows = self._tx.attestations(
                    self._run.run_id, member.attested_incarnation, member.attested_outer_step
                )
                since_unix_ms = max(
                    (row.receive_unix_ms for row in rows if row.peer_id == member.peer_id),
                    default=0,
                )
            found.append(
                Holding(
                    peer_id=member.peer_id,
                    incarnation=member.attested_incarnation,
                    outer_step=member.attested_outer_step,
                    state_digest=member.attested_digest,
                    since_unix_seconds=since_unix_ms / 1000,
                )
            )
        return found

    def _begin(self, plan: IncarnationPlan) -> None:
        """Carry a plan out: the ledger first, then record, directive, members."""
        assert plan.base is not None
        incarnation = next_incarnation(self._tx, self._run)
        rollback = ApplyRollback(
            run_id=self._run.run_id,
            incarnation=incarnation,
            to_outer_step=plan.base.outer_step,
        )
        rolled_back_tokens = apply_rollback(
            self._tx, rollback, context=self._context, now_unix_seconds=self._now
        )
        for member in load_members(self._tx, self._run.run_id):
            if member.peer_id in plan.refused:
                after = after_refused_attestation(member, reason=plan.refused[member.peer_id])
                save_member(self._tx, self._run.run_id, member, after, now_unix_seconds=self._now)
        self._run = begin_incarnation(
            self._tx,
            self._context,
            self._run,
            plan.base,
            swarm=load_swarm(self._tx, self._run.run_id),
            reason=plan.reason,
            now_unix_seconds=self._now,
        )
        lost = f", {rolled_back_tokens} tokens rolled back" if rolled_back_tokens else ""
        self.changes.append(f"incarnation {incarnation} begins: {plan.reason}{lost}")

    def _adapt_budget(self) -> None:
        if self._recovering or self._is_complete():
            return
        change = adapt_budget(self._tx, self._context, self._run, now_unix_seconds=self._now)
        if change:
            self.changes.append(change)

    def _issue_directive(self) -> None:
        self._run, reason = issue_due_directive(
            self._tx, self._context, self._run, now_unix_seconds=self._now
        )
        if reason:
            self.changes.append(f"directive {self._run.directive_number}: {reason}")

    def _handle_duties(self) -> None:
        run_id = self._run.run_id
        progress = self._progress()
        duties = load_duties(self._tx, run_id)
        withdrawn = withdraw_outdated(duties, progress=progress, now_unix_seconds=self._now)
        over = {one.duty_id for one in withdrawn}
        recovered = recover_duties(
            [] if self._recovering else [duty for duty in duties if duty.duty_id not in over],
            members=load_members(self._tx, run_id),
            now_unix_seconds=self._now,
            policy=self._context.policy,
            patience_seconds_by_duty=state_patience(self._tx, self._context, run_id, duties)
            | trial_patience(self._tx, duties),
        )
        for duty in (*withdrawn, *recovered):
            save_duty(self._tx, run_id, duty)
            self.changes.append(f"duty {duty.duty_id} is {duty.state}: {duty.reason}")
        for duty in forgettable_duties(duties):
            self._tx.delete_duty(duty.duty_id)
        created = plan_duties(
            load_duties(self._tx, run_id),
            progress=progress,
            now_unix_seconds=self._now,
            policy=self._context.policy,
        )
        for duty in created:
            is_evaluation = duty.kind is DutyKind.EVALUATE
            eval_tokens = eval_tokens_of(self._tx, self._context, run_id) if is_evaluation else 0
            save_duty(self._tx, run_id, duty, eval_tokens=eval_tokens)
            self.changes.append(f"duty {duty.duty_id} is due: {duty.reason}")

    def _progress(self) -> Progress:
        run_id = self._run.run_id
        book = load_book(self._tx, run_id)
        record = self._tx.incarnation(run_id, self._run.incarnation)
        assert record is not None, "a run has a record"
        stored = self._tx.checkpoints(run_id)
        proved = proved_checkpoints(self._tx, self._context, run_id)
        return Progress(
            run_id=run_id,
            incarnation=self._run.incarnation,
            outer_step=book.certified_outer_step,
            credited_tokens=book.credited_tokens,
            budget_tokens=book.budget_tokens,
            begin_unix_seconds=record.decide_unix_ms / 1000,
            newest_checkpoint_outer_step=proved[0].outer_step if proved else -1,
            newest_checkpoint_unix_seconds=max(
                (row.store_unix_ms / 1000 for row in stored), default=0.0
            ),
        )

    def _decide_state(self, *, bootstrap_reason: str, stall_reason: str) -> None:
        run_id = self._run.run_id
        book = load_book(self._tx, run_id)
        paused = pause_reason(self._tx, run_id)
        facts = RunFacts(
            previous=RunState(self._run.state),
            previous_reason=self._run.state_reason,
            incarnation=self._run.incarnation,
            bootstrap_reason=bootstrap_reason,
            is_paused=bool(paused),
            pause_reason=paused,
            num_live_peers=sum(member.is_live for member in load_members(self._tx, run_id)),
            is_recovering=self._recovering,
            stall_reason=stall_reason,
            outer_step=book.certified_outer_step,
            credited_tokens=book.credited_tokens,
            budget_tokens=book.budget_tokens,
            final_duties=self._final_duties(),
        )
        verdict = decide_run_state(facts)
        run = load_run(self._tx, run_id)
        if (verdict.state, verdict.reason) == (run.state, run.state_reason):
            return
        is_over = verdict.state in FINAL_STATES
        finish_unix_ms = unix_ms(self._now) if is_over else run.finish_unix_ms
        self._tx.update_run(
            replace(
                run,
                state=verdict.state,
                state_reason=verdict.reason,
                finish_unix_ms=finish_unix_ms,
            )
        )
        if verdict.state != run.state:
            text = f"{verdict.state}: {verdict.reason}"
            self.changes.append(text)
            self._tx.insert_event(
                run_id=run_id, unix_ms=unix_ms(self._now), kind="run", peer_id="", text=text
            )
        if is_over:
            ended = load_run(self._tx, run_id)
            self.changes += end_studies(self._tx, ended, now_unix_seconds=self._now)

    def _final_duties(self) -> tuple[FinalDuty, ...]:
        """Where the last evaluation and the last checkpoint stand; empty before the budget is
        credited.
        """
        if not self._is_complete():
            return ()
        run_id, incarnation = self._run.run_id, self._run.incarnation
        duties = {duty.duty_id: duty for duty in load_duties(self._tx, run_id)}
        outer_step = load_book(self._tx, run_id).certified_outer_step
        proved = proved_checkpoints(self._tx, self._context, run_id)
        has_checkpoint = bool(proved) and proved[0].outer_step >= outer_step
        found = []
        for kind in STATE_KINDS:
            duty = duties.get(final_duty_id(run_id, kind, incarnation))
            found.append(_final_duty(kind, duty, has_checkpoint=has_checkpoint))
        return tuple(found)


def _final_duty(kind: DutyKind, duty: DutyRecord | None, *, has_checkpoint: bool) -> FinalDuty:
    """Done means for a checkpoint that it is proved as well: members must not leave before they
    have attested it.
    """
    name = f"final {'evaluation' if kind is DutyKind.EVALUATE else 'checkpoint'}"
    if duty is None:
        return FinalDuty(
            is_done=False, is_given_up=False, reason=f"{name} is about to be asked for"
        )
    is_done = duty.state is DutyState.DONE
    if is_done and kind is DutyKind.CHECKPOINT and not has_checkpoint:
        reason = f"{name} is stored; its digest is not proved yet"
        return FinalDuty(is_done=False, is_given_up=False, reason=reason)
    who = f" with {duty.peer_id[:8]}" if duty.peer_id else ""
    return FinalDuty(
        is_done=is_done,
        is_given_up=duty.state is DutyState.FAILED,
        reason=f"{name} is {duty.state}{who}" + (f": {duty.reason}" if duty.reason else ""),
    )
