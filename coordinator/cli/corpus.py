"""`corpus build`: text to a dataset directory."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coordinator.cli.options import AsJson, print_json
from protos.contract.command_line import say

if TYPE_CHECKING:
    from coordinator.corpus.build import BuildProgress

app = typer.Typer(no_args_is_help=True, help="Datasets.")


@app.callback()
def _group() -> None:
    pass


@app.command("build")
def build(
    sources: Annotated[
        list[str], typer.Argument(metavar="SOURCE...", help="Files, folders, or stdlib:.")
    ],
    out_dir: Annotated[
        Path, typer.Option("--out", help="Directory of the dataset.", readable=False)
    ],
    vocab_size: Annotated[
        int | None, typer.Option("--vocab-size", help="Entries of the tokenizer.")
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            "--tokenizer", help="tokenizer.json to use instead of training one.", readable=False
        ),
    ] = None,
    eos_token_id: Annotated[
        int | None, typer.Option("--eos-token-id", help="Its token that ends a document.", min=0)
    ] = None,
    answer_seq_len: Annotated[
        int,
        typer.Option(
            "--answers",
            help="Sources are .jsonl of prompt and answer, for the objective answers of a model "
            "with this seq_len.",
            min=0,
        ),
    ] = 0,
    seed: Annotated[int, typer.Option("--seed", help="Decides which text is held out.", min=0)] = 0,
    heldout_ratio: Annotated[
        float, typer.Option("--heldout-ratio", help="Share that is held out.")
    ] = 0.05,
    is_json: AsJson = False,
) -> None:
    """Build a dataset, or reuse a finished one of the same sources and settings."""
    from coordinator.corpus.build import build_corpus
    from coordinator.corpus.tokenizer import DEFAULT_VOCAB_SIZE, load_given_tokenizer

    given = load_given_tokenizer(tokenizer, vocab_size=vocab_size, eos_token_id=eos_token_id)

    manifest = build_corpus(
        sources,
        out_dir,
        vocab_size=DEFAULT_VOCAB_SIZE if vocab_size is None else vocab_size,
        given_tokenizer=given,
        answer_seq_len=answer_seq_len,
        heldout_ratio=heldout_ratio,
        seed=seed,
        on_progress=_Progress(),
    )
    figures = {
        "dataset_id": manifest.dataset_id,
        "dataset_dir": str(out_dir),
        "vocab_size": manifest.vocab_size,
        "training_tokens": sum(chunk.num_tokens for chunk in manifest.training_chunks),
        "heldout_tokens": sum(chunk.num_tokens for chunk in manifest.heldout_chunks),
        "training_chunks": len(manifest.training_chunks),
        "heldout_chunks": len(manifest.heldout_chunks),
        "sources": [source.name for source in manifest.sources],
    }
    if is_json:
        print_json(figures)
        return
    for name, value in figures.items():
        typer.echo(f"{name:16}  {value if not isinstance(value, list) else ', '.join(value)}")


class _Progress:
    """A line per stage; on a terminal the share of the stage as well."""

    def __init__(self) -> None:
        self._stage = ""

    def __call__(self, progress: "BuildProgress") -> None:
        is_terminal = sys.stderr.isatty()
        if progress.stage != self._stage:
            if self._stage and is_terminal:
                say("")
            self._stage = progress.stage
            if not is_terminal:
                say(f"{progress.stage.value.lower().replace('_', ' ')} {progress.detail}".rstrip())
        if is_terminal:
            name = progress.stage.value.lower().replace("_", " ")
            sys.stderr.write(f"\r{name:16} {progress.done_ratio:4.0%} {progress.detail[:50]:50}")
            sys.stderr.flush()
            if progress.done_ratio >= 1.0 and progress.stage.value == "DONE":
                say("")
