"""`muster-peer eval`: how well a checkpoint predicts text, uses its context, what it memorised."""

import hashlib
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peer.cli.options import (
    AsJson,
    Checkpoint,
    DatasetDir,
    SpecPath,
    Threads,
    print_json,
    print_line,
    require_effect,
)
from protos.contract.errors import UsageError

if TYPE_CHECKING:
    from peer.cli.checkpoints import OpenedCheckpoint
    from peer.eval.evaluate import EvalResult
    from protos.contract.chunk_format import Int64Array, Manifest

_SAMPLED_WINDOWS = 64


def evaluate(
    checkpoint: Checkpoint,
    text: Annotated[
        Path | None, typer.Argument(metavar="[TEXT]", help="UTF-8 text file to evaluate on.")
    ] = None,
    dataset: DatasetDir = None,
    eval_tokens: Annotated[int, typer.Option(help="Held-out tokens; 0: all.", min=0)] = 0,
    is_in_context: Annotated[
        bool, typer.Option("--in-context", help="Recall from the context; needs no data.")
    ] = False,
    is_memorization: Annotated[
        bool,
        typer.Option(
            "--memorization", help="Bits per parameter memorised; needs --dataset with its chunks."
        ),
    ] = False,
    tasks: Annotated[
        str, typer.Option(help="Tasks of lm-evaluation-harness, with commas; extra `eval`.")
    ] = "",
    few_shot: Annotated[
        int, typer.Option(help="Examples shown before each of --tasks.", min=0)
    ] = 0,
    limit_examples: Annotated[
        int | None, typer.Option("--limit", help="Examples of each of --tasks at most.", min=1)
    ] = None,
    task_folder: Annotated[
        Path | None, typer.Option(help="Folder with task files for --tasks.", readable=False)
    ] = None,
    spec: SpecPath = None,
    threads: Threads = 0,
    is_json: AsJson = False,
) -> None:
    """Loss and bits per byte on a text file, or on the held-out chunks of --dataset; or one of
    --in-context, --memorization and --tasks.
    """
    from peer.cli.checkpoints import open_checkpoint, set_up_torch

    mode = _mode(
        {
            "TEXT": text is not None,
            "--in-context": is_in_context,
            "--memorization": is_memorization,
            "--tasks": bool(tasks),
        }
    )
    _require_effect(
        mode,
        {
            "--few-shot": few_shot > 0,
            "--limit": limit_examples is not None,
            "--task-folder": task_folder is not None,
        },
        has_eval_tokens=eval_tokens > 0,
    )
    set_up_torch(threads)
    opened = open_checkpoint(
        checkpoint,
        spec_path=spec,
        dataset=dataset,
        is_dataset_read=mode in ("", "--memorization"),
    )
    if is_in_context:
        plain = _in_context(opened)
    elif is_memorization:
        plain = _memorization(opened, dataset)
    elif tasks:
        plain = _harness(
            opened, tasks, few_shot=few_shot, limit_examples=limit_examples, task_folder=task_folder
        )
    else:
        plain = _losses(opened, text, dataset=dataset, eval_tokens=eval_tokens)
    if is_json:
        print_json(plain | opened.provenance)
        return
    _print_figures(plain)
    if is_memorization:
        print_line(
            "An average over the corpus against held-out text; not a bound on any document and no "
            "statement about privacy."
        )


def _print_figures(plain: dict[str, Any]) -> None:
    width = max(map(len, plain))
    for name, value in plain.items():
        number = f"{value:,.4f}" if isinstance(value, float) else value
        print_line(f"{name:{width}}  {f'{value:,}' if isinstance(value, int) else number}")


def _mode(is_asked_by_name: dict[str, bool]) -> str:
    """What is evaluated; "" for held-out chunks. Raises UsageError for several at once."""
    asked = [name for name, is_asked in is_asked_by_name.items() if is_asked]
    if len(asked) > 1:
        raise UsageError(
            " and ".join(asked),
            allowed=f"at most one of {', '.join(is_asked_by_name)}; none reads held-out chunks",
            remedy="run the command once for each",
        )
    return asked[0] if asked else ""


def _require_effect(
    mode: str, is_given_for_tasks: dict[str, bool], *, has_eval_tokens: bool
) -> None:
    """Raise UsageError for options that this mode does not read."""
    if mode != "--tasks":
        require_effect(
            is_given_for_tasks,
            without="without --tasks",
            remedy="name tasks with --tasks, or leave them out",
        )
    if mode:
        require_effect(
            {"--eval-tokens": has_eval_tokens},
            without=f"with {mode}",
            remedy="leave it out: it bounds how many of --dataset's held-out tokens are read",
        )


def _losses(
    opened: "OpenedCheckpoint", text: Path | None, *, dataset: Path | None, eval_tokens: int
) -> dict[str, Any]:
    from peer.eval.evaluate import evaluate as evaluate_windows
    from peer.eval.evaluate import token_byte_lengths
    from peer.eval.text import evaluate_tokens
    from peer.model.objectives import ExampleBuilder
    from protos.contract.run_spec import Objective, ObjectiveSpec

    byte_lengths = token_byte_lengths(opened.tokenizer_path)
    name = _objective_evaluated(opened, text, dataset)
    builder = None
    if opened.run_spec is not None:
        objective = replace(opened.run_spec.objective, name=name)
        builder = ExampleBuilder.for_run(
            replace(opened.run_spec, objective=objective), byte_lengths
        )
    elif name != Objective.CAUSAL:
        builder = ExampleBuilder(
            ObjectiveSpec(name=name), seed=0, num_text_tokens=byte_lengths.size, eos_token_id=-1
        )
    if text is not None and opened.predicts_next_token:
        result = evaluate_tokens(
            opened.build_model(), _text_tokens(opened, text), byte_lengths=byte_lengths
        )
    elif text is not None:
        result = _windows_of_text(opened, text, byte_lengths, builder)
    else:
        result = evaluate_windows(
            opened.build_model(),
            heldout_paths=_heldout_paths(opened, dataset),
            byte_lengths=byte_lengths,
            eval_tokens=eval_tokens,
            builder=builder,
        )
    return {
        "objective": name,
        "loss_nats": result.loss_nats,
        "bits_per_byte": result.bits_per_byte,
        "perplexity": result.perplexity,
        "num_tokens": result.num_tokens,
        "num_bytes": result.num_bytes,
    }


def _objective_evaluated(
    opened: "OpenedCheckpoint", text: Path | None, dataset: Path | None
) -> str:
    """The model's own; of one that predicts the next token, what the data are: text or answers.

    Raises UsageError for answers in windows of another length.
    """
    from protos.contract.answer_records import check_objective
    from protos.contract.run_spec import Objective

    if text is not None:
        return Objective.CAUSAL if opened.predicts_next_token else opened.objective_name
    _, manifest = _dataset_of(opened, dataset)
    name = opened.objective_name
    if opened.predicts_next_token:
        name = Objective.ANSWERS if manifest.answer_seq_len else Objective.CAUSAL
    check_objective(manifest, objective=name, seq_len=opened.model_spec.seq_len)
    return name


def _windows_of_text(
    opened: "OpenedCheckpoint", text: Path, byte_lengths: "Int64Array", builder: Any
) -> "EvalResult":
    """Objectives that corrupt a window need whole windows."""
    import tempfile

    from peer.eval.evaluate import evaluate as evaluate_windows
    from protos.contract.chunk_format import chunk_from_tokens

    ids = _text_tokens(opened, text)
    if len(ids) <= opened.model_spec.seq_len:
        raise UsageError(
            f"{text} has {len(ids)} tokens",
            allowed=f"more than one window of {opened.model_spec.seq_len} tokens for the objective "
            f"{opened.objective_name}",
            remedy="use a longer text",
        )
    with tempfile.TemporaryDirectory(prefix="muster-eval-") as folder:
        path = Path(folder) / "text.bin"
        path.write_bytes(chunk_from_tokens(ids, vocab_size=byte_lengths.size))
        return evaluate_windows(
            opened.build_model(), heldout_paths=[path], byte_lengths=byte_lengths, builder=builder
        )


def _text_tokens(opened: "OpenedCheckpoint", path: Path) -> list[int]:

    try:
        text = path.read_bytes().decode()  # line ends as they are: they count as bytes
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"cannot read {path}: {error}",
            allowed="a UTF-8 text file",
            remedy="check the path",
        ) from error
    if not text:
        raise UsageError(
            f"{path} is empty", allowed="a text of at least one byte", remedy="check the path"
        )
    ids: list[int] = opened.load_tokenizer().encode(text, add_special_tokens=False).ids
    return [opened.eos_token_id, *ids, opened.eos_token_id]


def _in_context(opened: "OpenedCheckpoint") -> dict[str, Any]:
    from peer.eval.evaluate import token_byte_lengths
    from peer.eval.in_context import in_context_task

    opened.require_next_token(purpose="the in-context task predicts the next token")
    result = in_context_task(
        opened.build_model(),
        byte_lengths=token_byte_lengths(opened.tokenizer_path),
        bos_token_id=opened.eos_token_id,
    )
    return asdict(result)


def _memorization(opened: "OpenedCheckpoint", dataset: Path | None) -> dict[str, Any]:
    """Trained windows are those that the run's schedule has dealt by the checkpoint's tokens."""
    from peer.eval.evaluate import token_byte_lengths
    from peer.eval.memorization import CAPACITY_BITS_PER_PARAMETER, memorization
    from peer.eval.trained_text import heldout_windows, trained_windows

    opened.require_objective("causal", purpose="memorisation is measured on the next token")
    if opened.run_spec is None:
        raise UsageError(
            "a checkpoint without a run",
            allowed="a state file of a run, whose schedule says what it was trained on",
            remedy="name the state file, not an exported folder",
        )
    byte_lengths = token_byte_lengths(opened.tokenizer_path)
    folder, manifest = _dataset_of(opened, dataset)
    sample = trained_windows(
        opened.run_spec,
        folder,
        manifest,
        schedule_tokens=int(opened.provenance["schedule_tokens"]),
        max_windows=_SAMPLED_WINDOWS,
        byte_lengths=byte_lengths,
    )
    result = memorization(
        opened.build_model(),
        trained_windows=sample.windows,
        heldout_windows=heldout_windows(
            opened.run_spec, folder, manifest, max_windows=_SAMPLED_WINDOWS
        ),
        trained_bytes=sample.trained_bytes,
        byte_lengths=byte_lengths,
    )
    return asdict(result) | {"capacity_bits_per_parameter": CAPACITY_BITS_PER_PARAMETER}


def _harness(
    opened: "OpenedCheckpoint",
    tasks: str,
    *,
    few_shot: int,
    limit_examples: int | None,
    task_folder: Path | None,
) -> dict[str, Any]:
    """The harness reads a folder in transformers' form."""
    import tempfile

    from peer.checkpoint.export import export_model
    from peer.eval.harness import harness_tasks

    opened.require_next_token(purpose="lm-evaluation-harness scores the next token")
    with tempfile.TemporaryDirectory(prefix="muster-eval-") as folder:
        export_model(
            opened.model_spec,
            opened.params,
            folder=Path(folder),
            tokenizer_path=opened.tokenizer_path,
            eos_token_id=opened.eos_token_id,
        )
        return {
            "tasks": harness_tasks(
                Path(folder),
                [task.strip() for task in tasks.split(",") if task.strip()],
                num_few_shot=few_shot,
                limit_examples=limit_examples,
                task_folder=task_folder,
            )
        }


def _dataset_of(opened: "OpenedCheckpoint", dataset: Path | None) -> "tuple[Path, Manifest]":
    from protos.contract.chunk_format import Manifest

    folder = dataset or opened.dataset
    if folder is None or not (folder / "manifest.json").is_file():
        raise UsageError(
            "nothing to evaluate on" + (f": {folder} holds no dataset" if folder else ""),
            allowed="a text file, or a dataset directory with held-out chunks",
            remedy="name a text file or --dataset DIR",
        )
    manifest = Manifest.from_bytes((folder / "manifest.json").read_bytes())
    found = hashlib.sha256(opened.tokenizer_path.read_bytes()).hexdigest()
    if manifest.tokenizer_digest != found:
        raise UsageError(
            f"{folder} is in tokens of the tokenizer {manifest.tokenizer_digest[:16]}...",
            allowed=f"the model's own, {found[:16]}...",
            remedy="build it with `corpus build --tokenizer`, or evaluate a text file",
        )
    return folder, manifest


def _heldout_paths(opened: "OpenedCheckpoint", dataset: Path | None) -> list[Path]:
    """Held-out chunks, each checked against the manifest."""
    from peer.data.reader import load_verified
    from protos.contract.chunk_format import heldout_chunk_path

    folder, manifest = _dataset_of(opened, dataset)
    paths = []
    for index, chunk in enumerate(manifest.heldout_chunks):
        path = folder / heldout_chunk_path(index)
        load_verified(path, digest=bytes.fromhex(chunk.digest))
        paths.append(path)
    return paths
