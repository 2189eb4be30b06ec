"""`ledger verify`: the books recomputed from certificates, lease events and manifest alone.

ledger_replay replays the journal line by line, window by window; ledger_compare holds the result
against every row and total in the store. Nothing is shared with domain/ledger or domain/lease_book,
which work on intervals: two programs that agree on every run are hard to get wrong in the same way.
Each violation is one sentence.

Cost: about 1 us per window and journal line; a run of 4 M tokens (16,000 windows) takes well under
a second.
"""

from coordinator.operations.common import OperationContext, load_book
from coordinator.operations.ledger_compare import compare_rows, state_flaws
from coordinator.operations.ledger_replay import Replay
from coordinator.operations.requests_ledger import VerifyLedgerRequest, VerifyLedgerResponse
from coordinator.store.base import Transaction


def verify_ledger(
    tx: Transaction,
    request: VerifyLedgerRequest,
    /,
    *,
    context: OperationContext,
    now_unix_seconds: float,
) -> VerifyLedgerResponse:
    """Recompute a run's books and compare; reads only."""
    replay = Replay(tx, request.run_id, context)
    replay.run()
    compare_rows(tx, request.run_id, replay.books, replay.fail)
    flaws = state_flaws(tx, request.run_id)
    for flaw in flaws:
        replay.fail(flaw)
    return VerifyLedgerResponse(
        violations=tuple(replay.violations),
        state_digests_equal=not flaws,
        num_certificates=len(replay.books.seen_certificates),
        num_leases=len(replay.books.windows_by_lease),
        credited_tokens=replay.books.counts["CREDITED"] * load_book(tx, request.run_id).seq_len,
    )
