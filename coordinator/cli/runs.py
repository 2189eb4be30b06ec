"""`run create|list|pause|resume|stop|evict`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from coordinator.cli.options import (
    DEFAULT_DATA_DIR,
    AsJson,
    DataDir,
    RunId,
    print_json,
    print_table,
    time_text,
)

app = typer.Typer(no_args_is_help=True, help="Runs: what is trained.")
_Reason = Annotated[str, typer.Option("--reason", help="Why; goes into the log and to the peers.")]
_DEFAULT_REASON = "asked by the operator"


@app.command("create")
def create(
    dataset_dir: Annotated[
        Path, typer.Option("--dataset", help="Directory that `corpus build` wrote.", readable=False)
    ],
    spec_path: Annotated[
        Path | None, typer.Option("--spec", help="RunSpec as TOML.", readable=False)
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option("--model", help="PRESET or key=value[,key=value]; may be repeated."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Any key of the spec, e.g. optimizer.peak_lr=0.002; may be repeated."
        ),
    ] = None,
    budget_tokens: Annotated[
        int | None, typer.Option("--budget-tokens", help="Default: one pass over the corpus.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Initial values and order of data.")
    ] = None,
    run_id: Annotated[
        str, typer.Option("--run-id", help="Lower-case name; default: from the spec.")
    ] = "",
    min_peers: Annotated[
        int, typer.Option("--min-peers", min=1, help="Peers that the first step waits for (20 s).")
    ] = 1,
    initial: Annotated[
        Path | None,
        typer.Option(
            "--init", help="Model to go on from: what `muster-peer import` wrote.", readable=False
        ),
    ] = None,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    is_json: AsJson = False,
) -> None:
    """Create a run over a dataset."""
    from coordinator.cli.initial import keep_initial, read_initial
    from coordinator.cli.perform import perform
    from coordinator.cli.spec_options import build_spec
    from coordinator.corpus.build import check_corpus_fits, verify_dataset
    from coordinator.identity import write_whole
    from coordinator.operations.requests_admin import CreateRunRequest
    from protos.contract.answer_records import check_objective
    from protos.contract.model_shape import ModelShape

    manifest = verify_dataset(dataset_dir)
    spec = build_spec(
        manifest,
        spec_path=spec_path,
        model=model or (),
        settings=settings or (),
        budget_tokens=budget_tokens,
        seed=seed,
        initial=None if initial is None else read_initial(initial, manifest),
    )
    check_objective(manifest, objective=spec.objective.name, seq_len=spec.model.seq_len)
    check_corpus_fits(
        manifest, seq_len=spec.model.seq_len, global_batch_tokens=spec.strategy.global_batch_tokens
    )
    request = CreateRunRequest(
        run_id=run_id,
        spec=spec.to_wire(),
        dataset_dir=_stored_path(dataset_dir, data_dir),
        manifest=manifest.to_bytes(),
        min_peers=min_peers,
    )
    if initial is not None:
        keep_initial(initial, spec.initial_digest, data_dir)
    made = perform(data_dir, "create_run", request, may_create=True)
    made["num_parameters"] = ModelShape.from_spec(spec.model).num_parameters
    spec_name = f"run_spec-{made['run_id']}.json"  # `muster-peer eval` and others look for it
    write_whole(data_dir / spec_name, spec.to_wire(), mode=0o644)
    _show(made, is_json=is_json)


@app.command("list")
def list_runs(data_dir: DataDir = DEFAULT_DATA_DIR, is_json: AsJson = False) -> None:
    """All runs, newest first."""
    from coordinator.cli.perform import look
    from coordinator.operations import admin
    from coordinator.operations.plain import plain_from_response
    from coordinator.operations.requests_admin import ListRunsRequest

    response = look(data_dir, admin.list_runs, ListRunsRequest())
    if is_json:
        print_json(plain_from_response(response))
        return
    titles = ["run", "state", "step", "credited", "budget", "peers", "created", "why"]
    rows = [
        [
            run.run_id,
            run.state,
            f"{run.outer_step} (incarnation {run.incarnation})",
            f"{run.credited_tokens:,}",
            f"{run.budget_tokens:,}",
            str(run.num_live_peers),
            time_text(run.create_unix_seconds),
            run.state_reason,
        ]
        for run in response.runs
    ]
    print_table(titles, rows)


@app.command("pause")
def pause(
    run_id: RunId = "",
    reason: _Reason = _DEFAULT_REASON,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    is_json: AsJson = False,
) -> None:
    """Form no more rounds until `run resume`."""
    _change_state("pause_run", run_id=run_id, reason=reason, data_dir=data_dir, is_json=is_json)


@app.command("resume")
def resume(
    run_id: RunId = "",
    reason: _Reason = _DEFAULT_REASON,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    is_json: AsJson = False,
) -> None:
    """Go on after `run pause`."""
    _change_state("resume_run", run_id=run_id, reason=reason, data_dir=data_dir, is_json=is_json)


@app.command("stop")
def stop(
    run_id: RunId = "",
    reason: _Reason = _DEFAULT_REASON,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    is_json: AsJson = False,
) -> None:
    """End a run for good, before its budget is credited."""
    _change_state("stop_run", run_id=run_id, reason=reason, data_dir=data_dir, is_json=is_json)


@app.command("evict")
def evict(
    peer_id: Annotated[
        str, typer.Argument(metavar="PEER", help="Name, id or unmistakable beginning of an id.")
    ],
    run_id: RunId = "",
    reason: _Reason = "evicted by the operator",
    data_dir: DataDir = DEFAULT_DATA_DIR,
    is_json: AsJson = False,
) -> None:
    """End a peer's membership; its key may not join this run again."""
    from coordinator.cli.perform import perform
    from coordinator.operations.requests_admin import EvictPeerRequest

    request = EvictPeerRequest(peer_id=peer_id, run_id=run_id, reason=reason)
    _show(perform(data_dir, "evict_peer", request), is_json=is_json)


def _change_state(
    operation: str, *, run_id: str, reason: str, data_dir: Path, is_json: bool
) -> None:
    from coordinator.cli.perform import perform
    from coordinator.operations.requests_admin import RunRequest

    _show(perform(data_dir, operation, RunRequest(run_id=run_id, reason=reason)), is_json=is_json)


def _show(plain: dict[str, Any], *, is_json: bool) -> None:
    if is_json:
        print_json(plain)
        return
    for name, value in plain.items():
        typer.echo(f"{name:20}  {value}")


def _stored_path(dataset_dir: Path, data_dir: Path) -> str:
    """Relative inside the data directory, so that it can be moved; absolute elsewhere."""
    absolute, root = dataset_dir.resolve(), data_dir.resolve()
    return str(absolute.relative_to(root)) if absolute.is_relative_to(root) else str(absolute)
