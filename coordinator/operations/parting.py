"""What a member owes before it leaves: a checkpoint, if nobody who stays holds the newest state.

A member that is about to leave says so in a last heartbeat (state DRAINING). Without this the next
member would begin at the newest stored checkpoint, and the steps since would be rolled back.
"""

from coordinator.domain.duties import DutyRecord, parting_duty, parting_duty_id
from coordinator.domain.membership import Member
from coordinator.operations.common import OperationContext, load_book
from coordinator.operations.duties import duty_from_row, load_pending_duties, save_duty
from coordinator.operations.members import claims_from_json, member_from_row
from coordinator.operations.states import proved_checkpoints
from coordinator.store.base import Transaction
from coordinator.store.rows import RunRow
from protos.contract.telemetry import PeerState, SessionState


def take_parting_duty(
    tx: Transaction,
    context: OperationContext,
    run: RunRow,
    member: Member,
    *,
    now_unix_seconds: float,
) -> DutyRecord | None:
    """Its checkpoint duty, new or held; None if it may leave at once."""
    if run.incarnation == 0:
        return None
    outer_step = load_book(tx, run.run_id).certified_outer_step
    proved = proved_checkpoints(tx, context, run.run_id)
    duties = load_pending_duties(tx, run.run_id)
    known = tx.duty(parting_duty_id(run.run_id, run.incarnation, outer_step))
    duty = parting_duty(
        duties,
        member,
        run_id=run.run_id,
        incarnation=run.incarnation,
        outer_step=outer_step,
        stored_outer_step=proved[0].outer_step if proved else 0,
        num_other_holders=_num_staying(tx, run, member.peer_id),
        known=None if known is None else duty_from_row(known),
        now_unix_seconds=now_unix_seconds,
    )
    if duty is not None and duty not in duties:
        save_duty(tx, run.run_id, duty)
    return duty


def _num_staying(tx: Transaction, run: RunRow, peer_id: str) -> int:
    """Other live members that hold a state of the incarnation and do not leave themselves. A
    heartbeat ago it may have been an older one: they take part in the same rounds.
    """
    others = [row for row in tx.peers(run.run_id) if row.peer_id != peer_id]
    return sum(
        member.state in (PeerState.SYNCED, PeerState.VOTER)
        and member.has_attested(run.incarnation)
        and claims_from_json(row.claims_json).state != SessionState.DRAINING
        for row, member in ((row, member_from_row(row)) for row in others)
    )
