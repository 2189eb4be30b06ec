"""`muster-peer eval` and `export`: what a checkpoint can do, without any swarm."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from peer.cli.options import (
    AsJson,
    Checkpoint,
    DatasetDir,
    SpecPath,
    Threads,
    print_json,
    print_line,
    say,
)

if TYPE_CHECKING:
    from peer.cli.checkpoints import OpenedCheckpoint


def evaluate(
    checkpoint: Checkpoint,
    text: Annotated[
        Path | None, typer.Argument(metavar="[TEXT]", help="UTF-8 text file to evaluate on.")
    ] = None,
    dataset: DatasetDir = None,
    eval_tokens: Annotated[int, typer.Option(help="Held-out tokens; 0: all.", min=0)] = 0,
    spec: SpecPath = None,
    threads: Threads = 0,
    is_json: AsJson = False,
) -> None:
    """Loss and bits per byte on a text file, or on the held-out chunks of --dataset."""
    import tempfile

    from peer.cli.checkpoints import open_checkpoint, set_up_torch

    set_up_torch(threads)
    from peer.eval.evaluate import evaluate as run_evaluation
    from peer.eval.evaluate import token_byte_lengths
    from peer.model.objectives import ExampleBuilder

    opened = open_checkpoint(checkpoint, spec_path=spec, dataset=dataset)
    byte_lengths = token_byte_lengths(opened.tokenizer_path)
    run_spec = opened.run_spec
    with tempfile.TemporaryDirectory(prefix="muster-eval-") as folder:
        paths = (
            _heldout_paths(opened, dataset)
            if text is None
            else [_chunk_from_text(opened, text, Path(folder) / "text.bin")]
        )
        result = run_evaluation(
            opened.build_model(),
            heldout_paths=paths,
            byte_lengths=byte_lengths,
            eval_tokens=eval_tokens,
            builder=ExampleBuilder.for_run(run_spec, byte_lengths) if run_spec else None,
        )
    plain = {
        "objective": run_spec.objective.name if run_spec else "causal",
        "loss_nats": result.loss_nats,
        "bits_per_byte": result.bits_per_byte,
        "perplexity": result.perplexity,
        "num_tokens": result.num_tokens,
        "num_bytes": result.num_bytes,
    }
    if is_json:
        print_json(plain | opened.provenance)
        return
    what = f"nats per predicted token, objective {plain['objective']}"
    print_line(f"loss           {result.loss_nats:.4f} {what} (perplexity {result.perplexity:.2f})")
    print_line(f"bits per byte  {result.bits_per_byte:.4f}")
    print_line(f"evaluated      {result.num_tokens:,} tokens, {result.num_bytes:,} bytes")


def export(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    spec: SpecPath = None,
    dataset: DatasetDir = None,
) -> None:
    """Write a folder that transformers.LlamaForCausalLM loads."""
    from peer.checkpoint.export import export_model
    from peer.cli.checkpoints import open_checkpoint
    from protos.contract.errors import UsageError

    opened = open_checkpoint(checkpoint, spec_path=spec, dataset=dataset)
    if opened.run_spec is None:
        raise UsageError(
            f"{checkpoint} is an exported folder already",
            allowed="a state file (*.safetensors)",
            remedy="copy the folder instead",
        )
    opened.require_objective("causal", purpose="LlamaForCausalLM attends causally")
    provenance = {
        key: str(value) for key, value in opened.provenance.items() if key != "run_digest"
    }
    export_model(
        opened.run_spec,
        opened.params,
        folder=out,
        tokenizer_path=opened.tokenizer_path,
        eos_token_id=opened.eos_token_id,
        provenance=provenance,
    )
    say(f"exported step {opened.provenance['outer_step']} to {out}")


def _heldout_paths(opened: "OpenedCheckpoint", dataset: Path | None) -> list[Path]:
    """Held-out chunks, each checked against the manifest."""
    from peer.data.reader import load_verified
    from protos.contract.chunk_format import Manifest, heldout_chunk_path
    from protos.contract.errors import UsageError

    folder = dataset or opened.dataset
    if folder is None or not (folder / "manifest.json").is_file():
        raise UsageError(
            "nothing to evaluate on",
            allowed="a text file, or a dataset directory with held-out chunks",
            remedy="name a text file or --dataset DIR",
        )
    manifest = Manifest.from_bytes((folder / "manifest.json").read_bytes())
    paths = []
    for index, chunk in enumerate(manifest.heldout_chunks):
        path = folder / heldout_chunk_path(index)
        load_verified(path, digest=bytes.fromhex(chunk.digest))
        paths.append(path)
    return paths


def _chunk_from_text(opened: "OpenedCheckpoint", text_path: Path, target: Path) -> Path:
    from peer.eval.evaluate import token_byte_lengths
    from protos.contract.chunk_format import chunk_from_tokens
    from protos.contract.errors import UsageError

    try:
        text = text_path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"cannot read {text_path}: {error}",
            allowed="a UTF-8 text file",
            remedy="check the path",
        ) from error
    vocab_size = token_byte_lengths(opened.tokenizer_path).size
    ids = [opened.eos_token_id, *opened.load_tokenizer().encode(text).ids, opened.eos_token_id]
    if len(ids) <= opened.model_spec.seq_len:
        raise UsageError(
            f"{text_path} has {len(ids)} tokens",
            allowed=f"more than one window of {opened.model_spec.seq_len} tokens",
            remedy="use a longer text",
        )
    target.write_bytes(chunk_from_tokens(ids, vocab_size=vocab_size))
    return target
