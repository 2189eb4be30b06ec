"""Which run is meant, and a run in one line."""

from coordinator.domain.run_state import FINAL_STATES
from coordinator.operations.common import load_book, load_run
from coordinator.operations.members import load_members
from coordinator.operations.requests_admin import RunSummary
from coordinator.store.base import Transaction
from coordinator.store.rows import RunRow
from protos.contract.errors import ErrorCode, RefusedError, UsageError


def find_run(tx: Transaction, run_id: str) -> RunRow:
    """The named run, or for "" the newest one. Raises RefusedError (UNKNOWN_RUN)."""
    if run_id:
        return load_run(tx, run_id)
    runs = tx.runs()
    if not runs:
        raise RefusedError(
            "there is no run here yet",
            allowed="a run that was created",
            remedy="create one: muster-coordinator run create",
            code=ErrorCode.UNKNOWN_RUN,
        )
    return runs[-1]


def find_run_to_change(tx: Transaction, run_id: str) -> RunRow:
    """The named run, or for "" the only one that is not over, else the newest. Raises RefusedError
    (UNKNOWN_RUN), and UsageError if several are not over.
    """
    active = [run.run_id for run in tx.runs() if run.state not in FINAL_STATES]
    if run_id or not active:
        return find_run(tx, run_id)
    if len(active) > 1:
        raise UsageError(
            f"{len(active)} runs are not over: {', '.join(active[:8])}",
            allowed="one of them, by name",
            remedy="name it with --run",
        )
    return load_run(tx, active[0])


def summarise_run(tx: Transaction, run: RunRow) -> RunSummary:
    """One line of `run list`."""
    book = load_book(tx, run.run_id)
    return RunSummary(
        run_id=run.run_id,
        run_digest=run.run_digest,
        state=run.state,
        state_reason=run.state_reason,
        incarnation=run.incarnation,
        outer_step=book.certified_outer_step,
        credited_tokens=book.credited_tokens,
        budget_tokens=book.budget_tokens,
        num_live_peers=sum(member.is_live for member in load_members(tx, run.run_id)),
        create_unix_seconds=run.create_unix_ms / 1000,
    )
