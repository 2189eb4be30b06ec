"""A checkpoint on the command line: the model in it, and where its run spec and tokenizer lie.

CHECKPOINT is a folder that `export` or `import` wrote or any Llama model in transformers' form,
which are complete, or a state file of a coordinator or peer, which names its run only by digest.
The spec is then looked for in --spec, and above the file (run_spec.json of a coordinator's data
directory, membership.json of a peer's home); a spec with another digest is not taken. The tokenizer
comes from --dataset, or from where the spec's dataset lies in that directory.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peer.cli.options import require_effect
from protos.contract.errors import CorruptDataError, MachineError, MusterError, UsageError
from protos.contract.initial_file import INITIAL_FILE, is_initial_file
from protos.contract.run_spec import NEXT_TOKEN_OBJECTIVES, ModelSpec, RunSpec

if TYPE_CHECKING:
    from peer.model.decoder import Decoder, FlatParameters
    from protos.contract.digest import Float32Vector

_MAX_PARENTS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedCheckpoint:
    """What commands need of a checkpoint."""

    model_spec: ModelSpec
    params: "Float32Vector"
    """Canonical vector, read-only."""
    run_spec: RunSpec | None
    """None for an exported folder."""
    tokenizer_path: Path
    eos_token_id: int
    dataset: Path | None
    provenance: dict[str, Any] = field(default_factory=dict)
    """Run, step and digest, as far as known."""

    @property
    def objective_name(self) -> str:
        """What the model was trained to predict; exported folders are causal."""
        return self.run_spec.objective.name if self.run_spec is not None else "causal"

    @property
    def predicts_next_token(self) -> bool:
        """True if the model attends causally and says what comes next."""
        return self.objective_name in NEXT_TOKEN_OBJECTIVES

    def require_next_token(self, *others: str, purpose: str) -> None:
        """Raises UsageError unless the model predicts the next token, or has one of the other
        objectives.
        """
        self.require_objective(*NEXT_TOKEN_OBJECTIVES, *others, purpose=purpose)

    def require_objective(self, *names: str, purpose: str) -> None:
        """Raises UsageError if the model was trained on another objective than these."""
        if self.objective_name not in names:
            raise UsageError(
                f"a model trained on the objective {self.objective_name}: {purpose}",
                allowed="models of the objective " + " or ".join(names),
                remedy="`muster-peer eval` works with every objective",
            )

    def load_tokenizer(self) -> Any:
        """tokenizers.Tokenizer of the run."""
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(self.tokenizer_path))

    def prompt_tokens(self, tokenizer: Any, text: str) -> list[int]:
        """A prompt as a document begins: with what the tokenizer itself puts before a text, such as
        Llama's BOS, or with the end of the document before.
        """
        ids: list[int] = tokenizer.encode(text).ids
        has_own_beginning = ids != tokenizer.encode(text, add_special_tokens=False).ids
        return ids if has_own_beginning else [self.eos_token_id, *ids]

    def build_trainable(self) -> "tuple[Decoder, FlatParameters]":
        """The model with a copy of these parameters, and with gradients."""
        import torch

        from peer.model.decoder import Decoder, FlatParameters

        model = Decoder(self.model_spec)
        flat = FlatParameters(model)
        flat.values.copy_(torch.tensor(self.params))
        return model, flat

    def build_model(self) -> "Decoder":
        """The model with these parameters, for inference."""
        import torch

        from peer.model.decoder import Decoder, FlatParameters

        model = Decoder(self.model_spec)
        flat = FlatParameters(model, has_grads=False)
        flat.values.copy_(torch.tensor(self.params))
        return model.eval()


def set_up_torch(threads: int) -> None:
    """Before anything else that imports torch."""
    from peer.config import quiet_libraries

    quiet_libraries()
    import torch

    from peer.parallel.devices import keep_freed_memory

    keep_freed_memory()
    if threads:
        torch.set_num_threads(threads)


def load_spec(path: Path) -> RunSpec:
    """A run spec in either form. Raises UsageError, MachineError."""
    try:
        data = path.read_bytes()
        is_wire = data.lstrip().startswith(b"{")
        return RunSpec.from_wire(data) if is_wire else RunSpec.from_toml(data.decode())
    except (OSError, UnicodeDecodeError) as error:
        raise MachineError(
            f"cannot read {path}: {error}",
            allowed="a run spec as TOML or JSON",
            remedy="check the path",
        ) from error


def open_checkpoint(
    path: Path,
    *,
    spec_path: Path | None = None,
    dataset: Path | None = None,
    is_dataset_read: bool = False,
) -> OpenedCheckpoint:
    """Open a state file, an imported file or a folder; `is_dataset_read` is True where the command
    itself reads from --dataset. Raises MusterError.
    """
    if path.is_dir() or (path.is_file() and is_initial_file(path)):
        require_effect(
            {
                "--spec": spec_path is not None,
                "--dataset": dataset is not None and not is_dataset_read,
            },
            without=f"with {path}, which brings its own model and tokenizer",
            remedy="leave them out, or name a state file (*.safetensors) of a run",
        )
    if path.is_dir():
        imported = path / INITIAL_FILE
        return _open_imported(imported) if imported.is_file() else _open_exported(path)
    if not path.is_file():
        raise UsageError(
            f"{path} is not there",
            allowed="a state file (*.safetensors), or a folder that `export` or `import` wrote",
            remedy="check the path",
        )
    if is_initial_file(path):
        return _open_imported(path)
    from peer.checkpoint import store

    header, vectors = store.open_checkpoint(path)
    spec = _find_spec(path, spec_path, run_digest=header.meta.run_digest)
    found_dataset, tokenizer_path, eos_token_id = _find_tokenizer(path, dataset, spec)
    return OpenedCheckpoint(
        model_spec=spec.model,
        params=vectors[0],
        run_spec=spec,
        tokenizer_path=tokenizer_path,
        eos_token_id=eos_token_id,
        dataset=found_dataset,
        provenance={
            "run_digest": header.meta.run_digest,
            "incarnation": header.meta.incarnation,
            "outer_step": header.meta.outer_step,
            "schedule_tokens": header.meta.schedule_tokens,
            "state_digest": header.state_digest.hex(),
        },
    )


def _open_exported(folder: Path) -> OpenedCheckpoint:
    """A folder in transformers' form, ours or another's."""
    from peer.checkpoint.hf_import import load_hf_params, read_hf_config, require_vocabulary
    from peer.checkpoint.safetensors_io import read_metadata

    found = read_hf_config(folder)
    tokenizer_path = folder / "tokenizer.json"
    require_vocabulary(tokenizer_path, vocab_size=found.model.vocab_size)
    own_file = folder / "model.safetensors"
    metadata = read_metadata(own_file) if own_file.is_file() else {}
    return OpenedCheckpoint(
        model_spec=found.model,
        params=load_hf_params(folder, found.model),
        run_spec=None,
        tokenizer_path=tokenizer_path,
        eos_token_id=found.eos_token_id,
        dataset=None,
        provenance={key: value for key, value in metadata.items() if key != "format"},
    )


def _open_imported(path: Path) -> OpenedCheckpoint:
    """What `import` wrote; the tokenizer lies beside it."""
    from peer.checkpoint.hf_import import require_vocabulary
    from peer.checkpoint.initial import load_initial
    from protos.contract.initial_file import file_digest

    header, params = load_initial(path)
    tokenizer_path = path.parent / "tokenizer.json"
    _check_digest(tokenizer_path, header.tokenizer_digest)
    require_vocabulary(tokenizer_path, vocab_size=header.model.vocab_size)
    return OpenedCheckpoint(
        model_spec=header.model,
        params=params,
        run_spec=None,
        tokenizer_path=tokenizer_path,
        eos_token_id=header.eos_token_id,
        dataset=None,
        provenance={"initial_digest": file_digest(path), "origin": header.origin},
    )


def _directories_above(path: Path) -> Iterator[Path]:
    directory = path.absolute().parent
    for _ in range(_MAX_PARENTS):
        yield directory
        if directory == directory.parent:
            return
        directory = directory.parent


def _find_spec(path: Path, spec_path: Path | None, *, run_digest: str) -> RunSpec:
    if spec_path is not None:
        spec = load_spec(spec_path)
        if spec.run_digest != run_digest:
            raise UsageError(
                f"{spec_path} has the digest {spec.run_digest[:16]}...",
                allowed=f"the spec of the checkpoint's run, {run_digest[:16]}...",
                remedy="name the spec of that run with --spec",
            )
        return spec
    for spec in _specs_near(path):
        if spec.run_digest == run_digest:
            return spec
    raise UsageError(
        f"the run spec {run_digest[:16]}... of {path.name} is not in the directories above it",
        allowed="run_spec.json of a coordinator's data directory, membership.json of a peer's home",
        remedy="name it with --spec",
    )


def _specs_near(path: Path) -> Iterator[RunSpec]:
    from peer.daemon.membership import load_membership

    for directory in _directories_above(path):
        for spec_path in (
            *sorted(directory.glob("run_spec*.json")),
            *sorted(directory.glob("run_spec*.toml")),
        ):
            try:
                yield load_spec(spec_path)
            except MusterError:
                continue
        membership = load_membership(directory)
        if membership is not None:
            yield membership.spec


def _find_tokenizer(
    path: Path, dataset: Path | None, spec: RunSpec
) -> tuple[Path | None, Path, int]:
    """Dataset directory, if there is one, tokenizer.json and the EOS id. The manifest must be the
    run's.
    """
    from protos.contract.chunk_format import Manifest

    dataset_id = spec.data.dataset_id
    if dataset is not None:
        candidates = [(dataset, dataset / "manifest.json")]
    else:
        candidates = [
            (d / "datasets" / dataset_id, d / "datasets" / dataset_id / "manifest.json")
            for d in _directories_above(path)
        ]
        candidates += [(d, d / "cache" / dataset_id) for d in _directories_above(path)]
    for directory, manifest_path in candidates:
        if not manifest_path.is_file():
            continue
        manifest = Manifest.from_bytes(manifest_path.read_bytes())
        if manifest.dataset_id != dataset_id:
            raise UsageError(
                f"{directory} holds dataset {manifest.dataset_id[:16]}...",
                allowed=f"the run's dataset {dataset_id[:16]}...",
                remedy="name the dataset directory of that run with --dataset",
            )
        is_cache = manifest_path.name == dataset_id
        tokenizer = (
            directory / "cache" / manifest.tokenizer_digest
            if is_cache
            else directory / "tokenizer.json"
        )
        _check_digest(tokenizer, manifest.tokenizer_digest)
        return (None if is_cache else directory), tokenizer, manifest.eos_token_id
    raise UsageError(
        f"no tokenizer for {path.name}",
        allowed="the dataset directory of the run, with manifest.json and tokenizer.json",
        remedy="name it with --dataset",
    )


def _check_digest(path: Path, digest: str) -> None:
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise MachineError(
            f"cannot read {path}: {error.strerror}",
            allowed="a readable tokenizer",
            remedy="check --dataset",
        ) from error
    if found != digest:
        raise CorruptDataError(
            f"{path} has the digest {found[:16]}...",
            allowed=f"{digest[:16]}..., which the manifest names",
            remedy="build or copy the dataset again",
        )
