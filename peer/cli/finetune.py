"""`muster-peer finetune`: train a checkpoint further on this machine, on a file of one's own."""

import math
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peer.checkpoint.target import check_target
from peer.cli.options import AsJson, Checkpoint, DatasetDir, SpecPath, Threads, print_json
from protos.contract.command_line import say
from protos.contract.errors import RunFailedError, UsageError

if TYPE_CHECKING:
    from peer.checkpoint.export import ClassifierHead
    from peer.cli.checkpoints import OpenedCheckpoint
    from peer.train.finetune import Tunable, TuningSettings
    from peer.train.finetune_data import TuningSet
    from protos.contract.digest import Float32Vector


_SAY_SECONDS = 5.0


def finetune(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Argument(help="Folder to write, in transformers' form.")],
    data: Annotated[
        Path,
        typer.Option(
            "--data",
            help="Text, or .jsonl with prompt and answer (text and label with --classify).",
            readable=False,
        ),
    ],
    is_classifier: Annotated[
        bool, typer.Option("--classify", help="Train a classification head on the last token.")
    ] = False,
    lora_rank: Annotated[
        int,
        typer.Option("--lora", help="Rank of adapters; 0 trains everything. Extra `lora`.", min=0),
    ] = 0,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-4,
    passes: Annotated[int, typer.Option(help="Times through the examples.")] = 3,
    batch: Annotated[int, typer.Option(help="Examples of a step.")] = 8,
    weight_decay: Annotated[float, typer.Option(help="Of matrices.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Order of the examples.", min=0)] = 0,
    spec: SpecPath = None,
    dataset: DatasetDir = None,
    threads: Threads = 0,
    is_json: AsJson = False,
) -> None:
    """Go on training: a text, answers to prompts, or classes. Held-out examples say what it
    brought.
    """
    from peer.cli.checkpoints import open_checkpoint, set_up_torch

    set_up_torch(threads)
    from peer.train.finetune import TuningSettings
    from peer.train.finetune_data import load_tuning_set

    settings = TuningSettings(
        peak_lr=lr, num_passes=passes, batch_sequences=batch, weight_decay=weight_decay, seed=seed
    )
    if is_classifier and lora_rank:
        raise UsageError(
            "--classify and --lora",
            allowed="one of them",
            remedy="leave --lora out: the head trains with the whole model",
        )
    check_target(out)
    opened = open_checkpoint(checkpoint, spec_path=spec, dataset=dataset)
    opened.require_next_token(purpose="fine-tuning predicts the next token")
    tokenizer = opened.load_tokenizer()
    found = load_tuning_set(
        data,
        encode=lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids),
        eos_token_id=opened.eos_token_id,
        seq_len=opened.model_spec.seq_len,
        is_labelled=is_classifier,
        seed=seed,
    )
    work = _Work(opened, found, settings, out=out)
    if lora_rank:
        figures = work.train_adapters(lora_rank)
    elif is_classifier:
        figures = work.train_classifier()
    else:
        figures = work.train_everything()
    figures["data_digest"] = found.data_digest
    work.save()
    if is_json:
        print_json(figures | {"folder": str(out)} | work.provenance)
        return
    for name, value in figures.items():
        say(f"{name:22}  {f'{value:.4f}' if isinstance(value, float) else value}")
    say(f"written to {out}")


def _tuned_provenance(base: dict[str, Any], data_digest: str) -> dict[str, Any]:
    """Run, step and digests are the base model's; what this fine-tuning read is its own."""
    tuned = {
        key if key.startswith(("base_", "finetune_", "earlier_")) else f"base_{key}": value
        for key, value in base.items()
    }
    earlier = [base.get("earlier_finetune_data_digests"), base.get("finetune_data_digest")]
    if any(earlier):
        tuned["earlier_finetune_data_digests"] = ", ".join(filter(None, earlier))
    return tuned | {"finetune_data_digest": data_digest}


class _Work:
    """One fine-tuning: what is trained, and the folder that it ends in."""

    def __init__(
        self,
        opened: "OpenedCheckpoint",
        data: "TuningSet",
        settings: "TuningSettings",
        *,
        out: Path,
    ) -> None:
        self._opened, self._data, self._settings, self._out = opened, data, settings, out
        self._params: Float32Vector = opened.params
        self._head: ClassifierHead | None = None
        self.provenance: dict[str, Any] = _tuned_provenance(opened.provenance, data.data_digest)

    def train_everything(self) -> dict[str, Any]:
        """All parameters, on next tokens."""
        from peer.train.finetune import language_model

        model, flat = self._opened.build_trainable()
        figures = self._run(
            language_model(model, list(model.parameters()), pad_token_id=self._opened.eos_token_id)
        )
        self._params = flat.values.numpy()
        return figures

    def train_classifier(self) -> dict[str, Any]:
        """All parameters but an untied head's, with classes of the last token."""
        from peer.checkpoint.export import ClassifierHead
        from peer.train.finetune import ClassificationHead, classifier

        model, flat = self._opened.build_trainable()
        names = self._data.class_names
        head = ClassificationHead(model.spec.d_model, len(names))
        figures = self._run(classifier(model, head, pad_token_id=self._opened.eos_token_id))
        self._params = flat.values.numpy()
        self._head = ClassifierHead(weight=head.weight.detach().numpy(), class_names=names)
        return figures | {"classes": ", ".join(names)}

    def train_adapters(self, rank: int) -> dict[str, Any]:
        """Low-rank adapters, kept in OUT/adapter and merged into the model."""
        from peer.train.finetune import language_model
        from peer.train.lora import LoraModel

        with tempfile.TemporaryDirectory(prefix="muster-finetune-") as folder:
            self._export(Path(folder))
            adapted = LoraModel(Path(folder), rank=rank)
            tunable = language_model(
                adapted, adapted.parameters, pad_token_id=self._opened.eos_token_id
            )
            figures = self._run(tunable)
            adapted.save_adapter(self._out / "adapter")
            self._params = adapted.merged(self._opened.model_spec)
        return figures | {"lora_rank": rank}

    def save(self) -> None:
        """Write the folder."""
        self._export(self._out, card=True)

    def _run(self, tunable: "Tunable") -> dict[str, Any]:
        from peer.train.finetune import finetune as train
        from peer.train.finetune import score_set

        size = self._settings.batch_sequences
        before = score_set(tunable, self._data.heldout, batch_sequences=size)
        losses = []
        said_seconds = time.monotonic()
        for loss in train(tunable, self._data, self._settings):
            losses.append(loss)
            if time.monotonic() - said_seconds >= _SAY_SECONDS:
                said_seconds = time.monotonic()
                num_steps = self._settings.num_steps(len(self._data.training))
                say(f"step {len(losses)} of {num_steps}, loss {loss:.4f}")
        after = score_set(tunable, self._data.heldout, batch_sequences=size)
        are_finite = all(bool(p.isfinite().all()) for p in tunable.parameters)
        if not (are_finite and math.isfinite(after.loss_nats)):
            raise RunFailedError(
                f"parameters that are {'' if are_finite else 'not '}finite and a held-out loss of "
                f"{after.loss_nats} after the last step",
                allowed="finite values; no model is written",
                remedy="lower --lr",
            )
        figures: dict[str, Any] = {
            "num_parameters_trained": sum(p.numel() for p in tunable.parameters),
            "training_examples": len(self._data.training),
            "heldout_examples": len(self._data.heldout),
            "left_out_too_long": self._data.num_too_long,
            "steps": len(losses),
            "last_loss_nats": losses[-1],
            "heldout_nats_before": before.loss_nats,
            "heldout_nats_after": after.loss_nats,
        }
        if self._data.class_names:
            figures["heldout_accuracy_ratio"] = after.num_right / after.num_predicted
        return figures

    def _export(self, folder: Path, *, card: bool = False) -> None:
        from peer.checkpoint.export import export_model
        from peer.checkpoint.model_card import model_card

        opened = self._opened
        text = model_card(
            opened.model_spec,
            run_spec=opened.run_spec,
            provenance=self.provenance,
            manifest=None,
            is_classifier=self._head is not None,
        )
        export_model(
            opened.model_spec,
            self._params,
            folder=folder,
            tokenizer_path=opened.tokenizer_path,
            eos_token_id=opened.eos_token_id,
            provenance=self.provenance,
            card=text if card else "",
            classifier=self._head,
        )
