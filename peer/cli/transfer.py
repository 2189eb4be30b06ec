"""`muster-peer export` and `import`: models out of and into transformers' form."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peer.cli.options import AsJson, Checkpoint, DatasetDir, SpecPath, print_json, print_line

if TYPE_CHECKING:
    from peer.checkpoint.model_card import Credit
    from peer.cli.checkpoints import OpenedCheckpoint
    from protos.contract.chunk_format import Manifest


def export(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    licence: Annotated[
        str, typer.Option(help="Licence of the weights, for the model card.")
    ] = "not stated",
    credits_path: Annotated[
        Path | None,
        typer.Option(
            "--credits",
            help="Output of `muster-coordinator status --json`: who trained it.",
            readable=False,
        ),
    ] = None,
    names: Annotated[
        list[str] | None,
        typer.Option(
            "--name", help="PEER=NAME of a volunteer who agreed to be named; may be repeated."
        ),
    ] = None,
    spec: SpecPath = None,
    dataset: DatasetDir = None,
    is_json: AsJson = False,
) -> None:
    """Write a folder that transformers.LlamaForCausalLM loads, with a model card."""
    from peer.checkpoint.export import export_model
    from peer.checkpoint.model_card import model_card
    from peer.checkpoint.target import check_target
    from peer.cli.checkpoints import open_checkpoint
    from protos.contract.errors import UsageError

    opened = open_checkpoint(checkpoint, spec_path=spec, dataset=dataset)
    if opened.run_spec is None and "initial_digest" not in opened.provenance:
        raise UsageError(
            f"{checkpoint} is a folder in transformers' form already",
            allowed="a state file (*.safetensors), or what `muster-peer import` wrote",
            remedy="copy the folder instead",
        )
    opened.require_next_token(purpose="LlamaForCausalLM attends causally")
    card = model_card(
        opened.model_spec,
        run_spec=opened.run_spec,
        provenance=opened.provenance,
        manifest=_manifest(opened),
        credits=_credits(opened, credits_path, names or []),
        licence=licence,
    )
    check_target(out)
    export_model(
        opened.model_spec,
        opened.params,
        folder=out,
        tokenizer_path=opened.tokenizer_path,
        eos_token_id=opened.eos_token_id,
        provenance=opened.provenance,
        card=card,
    )
    if is_json:
        print_json({"folder": str(out)} | opened.provenance)
    else:
        step = opened.provenance.get("outer_step")
        print_line(f"exported {'' if step is None else f'step {step} '}to {out}")


def import_model(
    folder: Annotated[Path, typer.Argument(help="Llama model in transformers' form.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    seq_len: Annotated[
        int | None,
        typer.Option(help="Window to train with. [default: the model's, at most 4096]"),
    ] = None,
    eos_token_id: Annotated[
        int | None, typer.Option(help="Token that ends a document. [default: config.json's]")
    ] = None,
    is_json: AsJson = False,
) -> None:
    """Read a Hugging Face folder of the Llama family, to evaluate it or to train it further."""
    import hashlib

    from peer.checkpoint.hf_import import load_hf_params, read_hf_config, require_vocabulary
    from peer.checkpoint.initial import save_initial
    from peer.checkpoint.target import check_target, filling
    from protos.contract.chunk_format import token_bytes_table
    from protos.contract.errors import CorruptDataError, ErrorCode, MachineError, UsageError
    from protos.contract.initial_file import INITIAL_FILE, InitialHeader
    from protos.contract.model_shape import ModelShape

    found = read_hf_config(folder, seq_len=seq_len, eos_token_id=eos_token_id)
    tokenizer_path = folder / "tokenizer.json"
    require_vocabulary(tokenizer_path, vocab_size=found.model.vocab_size)
    tokenizer_json = tokenizer_path.read_bytes()
    try:
        token_bytes_table(tokenizer_json)
    except CorruptDataError as error:
        raise UsageError(
            f"{tokenizer_path}: {error.found}",
            allowed="byte-level BPE, as GPT-2 and Llama 3 have",
            remedy="bits per byte and corpora need it; import a model with such a tokenizer",
        ) from error
    header = InitialHeader(
        model=found.model,
        tokenizer_digest=hashlib.sha256(tokenizer_json).hexdigest(),
        eos_token_id=found.eos_token_id,
        origin=folder.absolute().name,
    )
    params = load_hf_params(folder, found.model)
    check_target(out)
    try:
        with filling(out):
            (out / "tokenizer.json").write_bytes(tokenizer_json)
            digest = save_initial(out / INITIAL_FILE, header, params)
    except OSError as error:
        raise MachineError(
            f"cannot write {out}: {error.strerror or error}",
            allowed="a writable folder",
            remedy="choose another folder or free space",
            code=ErrorCode.PERMISSION_DENIED,
        ) from error
    figures: dict[str, Any] = {
        "initial_file": str(out / INITIAL_FILE),
        "initial_digest": digest,
        "num_parameters": ModelShape.from_spec(found.model).num_parameters,
        "seq_len": found.model.seq_len,
        "eos_token_id": found.eos_token_id,
    }
    if is_json:
        print_json(figures)
        return
    for name, value in figures.items():
        print_line(f"{name:16}  {value}")
    print_line("to train it further in a swarm:")
    print_line(
        f"  muster-coordinator corpus build SOURCE... --out DATASET --tokenizer "
        f"{out}/tokenizer.json --eos-token-id {found.eos_token_id}"
    )
    print_line(f"  muster-coordinator run create --dataset DATASET --init {out}")


def _manifest(opened: "OpenedCheckpoint") -> "Manifest | None":
    """Contents of the run's dataset, where its directory is known; its id was checked."""
    from protos.contract.chunk_format import MANIFEST_FILE, Manifest

    if opened.dataset is None:
        return None
    return Manifest.from_bytes((opened.dataset / MANIFEST_FILE).read_bytes())


def _credits(
    opened: "OpenedCheckpoint", path: Path | None, names: list[str]
) -> "tuple[Credit, ...]":
    from peer.checkpoint.model_card import credits_from_status
    from protos.contract.errors import UsageError

    parted = [name.partition("=") for name in names]
    if path is None and not names:
        return ()
    if path is None or opened.run_spec is None or not all(p and n for p, _, n in parted):
        raise UsageError(
            f"--credits {path}, --name {', '.join(names) or 'none'}",
            allowed="--credits FILE with a run's state file, and --name PEER=NAME",
            remedy="write the file with `muster-coordinator status --json`",
        )
    try:
        plain = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(
            f"cannot read {path}: {error}",
            allowed="what `muster-coordinator status --json` prints",
            remedy="write it again",
        ) from error
    return credits_from_status(
        plain,
        run_digest=opened.run_spec.run_digest,
        consenting={prefix: name for prefix, _, name in parted},
    )
