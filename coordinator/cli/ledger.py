"""`ledger` and `ledger verify`: the books, and the books recomputed from certificates, lease events
and manifest alone.
"""

from typing import TYPE_CHECKING, Any

import typer

from coordinator.cli.options import (
    DEFAULT_DATA_DIR,
    AsJson,
    DataDir,
    RunId,
    print_json,
    print_table,
)

if TYPE_CHECKING:
    from coordinator.operations.requests_admin import StatusResponse

app = typer.Typer(invoke_without_command=True, help="The books of a run, and their check.")


@app.callback()
def ledger(
    context: typer.Context,
    run_id: RunId = "",
    data_dir: DataDir = DEFAULT_DATA_DIR,
    is_json: AsJson = False,
) -> None:
    """Where every token of the budget is, and who trained what."""
    if context.invoked_subcommand is not None:
        return
    from coordinator.cli.perform import look
    from coordinator.operations.requests_admin import StatusRequest
    from coordinator.operations.status import status

    books = _books(look(data_dir, status, StatusRequest(run_id=run_id)))
    if is_json:
        print_json(books)
        return
    by_peer = books.pop("credited_tokens_by_peer")
    books["state_digests_equal"] = "yes" if books["state_digests_equal"] else "NO"
    for name, value in books.items():
        typer.echo(f"{name:28}  {value:,}" if isinstance(value, int) else f"{name:28}  {value}")
    print_table(
        ["peer", "credited tokens"], [[name, f"{tokens:,}"] for name, tokens in by_peer.items()]
    )


@app.command("verify")
def verify(
    run_id: RunId = "", data_dir: DataDir = DEFAULT_DATA_DIR, is_json: AsJson = False
) -> None:
    """Recompute the books from stored proofs; exit code 5 and a list of what is wrong if they
    differ.
    """
    from coordinator.cli.perform import look
    from coordinator.operations.ledger_verify import verify_ledger
    from coordinator.operations.plain import plain_from_response
    from coordinator.operations.requests_admin import StatusRequest
    from coordinator.operations.requests_ledger import VerifyLedgerRequest
    from coordinator.operations.status import status
    from protos.contract.errors import CorruptDataError

    run_id = run_id or look(data_dir, status, StatusRequest()).run_id
    verdict = look(data_dir, verify_ledger, VerifyLedgerRequest(run_id=run_id))
    if is_json:
        print_json(plain_from_response(verdict))
    else:
        typer.echo(
            f"run {run_id}: {verdict.num_certificates} certificates, {verdict.num_leases} leases, "
            f"{verdict.credited_tokens:,} tokens credited; {len(verdict.violations)} violations; "
            f"state digests {'equal' if verdict.state_digests_equal else 'DIFFER'}"
        )
        for violation in verdict.violations:
            typer.echo(f"  {violation}")
    if verdict.violations or not verdict.state_digests_equal:
        raise CorruptDataError(
            f"the ledger of run {run_id} has {len(verdict.violations)} violations",
            allowed="none",
            remedy="keep the data directory, and restore the store from a backup",
        )


def _books(found: "StatusResponse") -> dict[str, Any]:
    names = (
        "run_id",
        "budget_tokens",
        "granted_tokens",
        "active_tokens",
        "released_tokens",
        "expired_tokens",
        "credited_tokens",
        "uncredited_trained_tokens",
        "rolled_back_tokens",
        "outer_steps_committed",
        "outer_steps_rolled_back",
        "incarnation",
        "schedule_tokens",
        "state_digests_equal",
        "credited_tokens_by_peer",
    )
    return {name: getattr(found, name) for name in names}
