"""`study create`, `study status`: sweeps that the joined peers train; `fit --study` reads them."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
    from coordinator.operations.requests_studies import StudyStatus
    from coordinator.scaling.observations import Observations

StudyId = Annotated[str, typer.Option("--study", help="Study id; the newest if not given.")]


def create(
    run_id: RunId = "",
    study_id: Annotated[str, typer.Option("--study", help="Its id; study-1, ... if empty.")] = "",
    sizes: Annotated[int, typer.Option(help="Number of sizes.")] = 8,
    min_params: Annotated[float, typer.Option(help="Smallest N (matrices and head).")] = 8e3,
    max_params: Annotated[float, typer.Option(help="Largest N.")] = 2.5e5,
    flop: Annotated[
        float, typer.Option(help="Compute of each size, where --max-tokens allows it.")
    ] = 1e12,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of one trial.")] = 4_000_000,
    lr: Annotated[
        str, typer.Option(help="Learning rates, e.g. 2e-3,5e-3,1e-2; several are tried first.")
    ] = "5e-3",
    repeats: Annotated[int, typer.Option(help="Trials that another peer runs again.")] = 2,
    seq_len: Annotated[int, typer.Option(help="Tokens of a window.")] = 128,
    batch_tokens: Annotated[int, typer.Option(help="Tokens of an update.")] = 1_024,
    warmup_steps: Annotated[int, typer.Option(help="Updates of the warm-up.")] = 60,
    heldout_tokens: Annotated[
        int | None,
        typer.Option(help="Of each evaluation. [default: 32,768, or all the dataset has]", min=1),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of initial values and data order.", min=0)] = 0,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    is_json: AsJson = False,
) -> None:
    """Design a sweep and hand its trials to the peers of a run that is paused or waits for peers.

    Equal compute for every size that --max-tokens does not end before, constant learning rate,
    held-out loss at computes that all sizes share. The run's dataset is used: for bytes, build
    one with --vocab-size 257.
    """
    from coordinator.cli.perform import perform
    from coordinator.operations.requests_studies import CreateStudyRequest

    request = CreateStudyRequest(
        run_id=run_id,
        study_id=study_id,
        num_sizes=sizes,
        min_params=min_params,
        max_params=max_params,
        flop=flop,
        max_tokens=max_tokens,
        learning_rates=_rates(lr),
        num_repeats=repeats,
        seq_len=seq_len,
        batch_tokens=batch_tokens,
        warmup_steps=warmup_steps,
        heldout_tokens=heldout_tokens or 0,
        seed=seed,
    )
    found = perform(data_dir, "create_study", request)
    if is_json:
        print_json(found)
        return
    for name, value in found.items():
        typer.echo(f"{name:12}  {value}")


def status(
    study_id: StudyId = "", data_dir: DataDir = DEFAULT_DATA_DIR, is_json: AsJson = False
) -> None:
    """Trials of a study: who has which, what came of it, and why open ones wait."""
    from coordinator.operations.plain import plain_from_response

    found = load_study(study_id, data_dir)
    if is_json:
        print_json(plain_from_response(found))
        return
    typer.echo(f"{found.study_id} on run {found.run_id}: {found.stage}: {found.stage_reason}")
    diverged = f", {found.num_diverged} of them diverged" if found.num_diverged else ""
    typer.echo(f"{found.num_done} of {found.num_trials} trials are done{diverged}")
    if found.waiting_reason:
        typer.echo(found.waiting_reason)
    if found.seed_noise_ratio:
        typer.echo(f"noise between seeds: {found.seed_noise_ratio:.2%} of the loss")
    print_table(
        ["trial", "for", "N", "tokens", "lr", "seed", "state", "peer", "loss", "GFLOP/s", "why"],
        [
            [
                str(trial.trial_number), trial.purpose, f"{trial.params_n:,.0f}",
                f"{trial.tokens:,}", f"{trial.learning_rate:g}", str(trial.seed), trial.state,
                trial.peer_name, f"{trial.loss_nats:.4f}" if trial.loss_nats else "-",
                f"{trial.flop_per_second / 1e9:.2f}" if trial.flop_per_second else "-",
                trial.reason,
            ]
            for trial in found.trials
        ],
    )  # fmt: skip


def load_study(study_id: str, data_dir: Path) -> "StudyStatus":
    """A study as it stands. Raises UsageError."""
    from coordinator.cli.perform import look
    from coordinator.operations.requests_studies import StudyRequest
    from coordinator.operations.studies import study_status

    found: StudyStatus = look(data_dir, study_status, StudyRequest(study_id=study_id))
    return found


def load_observations(study_id: str, data_dir: Path) -> "Observations":
    """What a study's size trials have measured. Raises UsageError while that is nothing."""
    from coordinator.cli.perform import look
    from coordinator.operations.requests_studies import StudyRequest
    from coordinator.operations.studies import study_observations

    found: Observations = look(data_dir, study_observations, StudyRequest(study_id=study_id))
    return found


def _rates(text: str) -> tuple[float, ...]:
    from protos.contract.errors import UsageError

    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(
            f"--lr {text!r}", allowed="numbers with commas between", remedy="e.g. --lr 2e-3,5e-3"
        ) from error
