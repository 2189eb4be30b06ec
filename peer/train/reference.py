"""The same training in one process: what a swarm's result is compared with at equal tokens.

Data order, windows, global batch, schedule and exact update are those of the run; only averaging is
missing, because one process has the whole batch. `python -m peer.train.reference --spec RUN.toml
--dataset DIR --num-tokens T --json` writes one JSON object as the last line of standard output.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

from peer.checkpoint.initial import initial_params
from peer.eval.evaluate import EvalResult, evaluate, token_byte_lengths
from peer.model.decoder import Decoder, FlatParameters
from peer.model.objectives import ExampleBuilder, Examples
from peer.model.schedule import planned_cooldown_start_tokens
from peer.parallel.devices import keep_freed_memory
from peer.swarm.exact_update import SyncUpdate
from peer.train.probe import AUTO, set_up_step
from peer.train.step import MicroStep, Precision
from protos.contract.answer_records import check_objective
from protos.contract.chunk_format import (
    MANIFEST_FILE,
    TOKENIZER_FILE,
    Int64Array,
    Manifest,
    heldout_chunk_path,
    tokens_from_chunk,
    training_chunk_path,
    windows_from_chunk,
)
from protos.contract.digest import Float32Vector
from protos.contract.errors import MusterError, RunFailedError
from protos.contract.run_spec import RunSpec
from protos.contract.schedule_order import ScheduleOrder


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceResult:
    """What the one-process run reached."""

    num_tokens: int
    outer_steps: int
    heldout_loss_nats: float
    heldout_bits_per_byte: float
    train_seconds: float
    precision: str
    execution: str
    loss_nats_by_step: list[float] = field(default_factory=list)
    """Mean training loss of each update's batch."""


def iterate_windows(
    spec: RunSpec, dataset_dir: Path, manifest: Manifest, builder: ExampleBuilder
) -> Iterator[Examples]:
    """Examples of one window each, in the run's order, for ever. Raises UsageError for a dataset of
    another objective.
    """
    check_objective(manifest, objective=spec.objective.name, seq_len=spec.model.seq_len)
    order = ScheduleOrder(spec.seed, manifest, spec.model.seq_len)
    position = 0
    while True:
        data_pass, chunk_index = order.chunk_at(position)
        chunk = manifest.training_chunks[chunk_index]
        data = (dataset_dir / training_chunk_path(chunk_index)).read_bytes()
        tokens = tokens_from_chunk(data, manifest=manifest, chunk=chunk)
        for index in order.window_order(data_pass, chunk_index):
            window = windows_from_chunk(tokens, spec.model.seq_len, [index])
            yield builder.build(*window, [(data_pass, chunk_index, int(index))])
        position += 1


def evaluate_model(
    step: MicroStep,
    dataset_dir: Path,
    manifest: Manifest,
    *,
    eval_tokens: int = 0,
    byte_lengths: Int64Array,
    builder: ExampleBuilder,
) -> EvalResult:
    """Held-out loss of a model's present parameters."""
    paths = [
        dataset_dir / heldout_chunk_path(index) for index in range(len(manifest.heldout_chunks))
    ]
    return evaluate(
        step.model,
        heldout_paths=paths,
        byte_lengths=byte_lengths,
        eval_tokens=eval_tokens,
        builder=builder,
        autocast=step.autocast(),
    )


class ReferenceRun:
    """State of a one-process run; `advance` makes one update."""

    def __init__(
        self,
        spec: RunSpec,
        dataset_dir: Path,
        *,
        num_tokens: int = 0,
        imported: Path | None = None,
    ) -> None:
        """Prepare training for `num_tokens` (0 = the spec's budget), whose schedule ends there.

        `imported`: the model that the spec starts from, if it names one.
        """
        self.spec = spec
        self.dataset_dir = dataset_dir
        self.budget_tokens = num_tokens or spec.budget_tokens
        self.schedule_tokens = 0
        self.outer_step = 0
        self.manifest = Manifest.from_bytes((dataset_dir / MANIFEST_FILE).read_bytes())
        self.model = Decoder(spec.model)
        self.parameters = FlatParameters(self.model)
        self.params: Float32Vector = self.parameters.values.numpy()
        self.params[:] = initial_params(spec, imported)
        self.exp_avg: Float32Vector = np.zeros_like(self.params)
        self.exp_avg_sq: Float32Vector = np.zeros_like(self.params)
        self.averaged: Float32Vector = np.zeros_like(self.params)
        self.step = MicroStep(self.model, self.parameters)
        self.micro_batch_sequences = 8
        self._update = SyncUpdate(spec, num_threads=torch.get_num_threads())
        self._byte_lengths = token_byte_lengths(dataset_dir / TOKENIZER_FILE)
        self._builder = ExampleBuilder.for_run(spec, self._byte_lengths)
        self._windows = iterate_windows(spec, dataset_dir, self.manifest, self._builder)

    @property
    def is_finished(self) -> bool:
        """True once no whole window is left of the budget."""
        return self.budget_tokens - self.schedule_tokens < self.spec.model.seq_len

    def advance(self) -> float:
        """Train one global batch and update; returns its mean loss in nats.

        Raises RunFailedError if not finite.
        """
        seq_len = self.spec.model.seq_len
        left_tokens = self.budget_tokens - self.schedule_tokens
        batch_tokens = min(self.spec.strategy.global_batch_tokens, left_tokens)
        num_windows = batch_tokens // seq_len
        self.averaged[:] = 0.0
        total_nats, num_tokens = 0.0, num_windows * seq_len
        for begin in range(0, num_windows, self.micro_batch_sequences):
            size = min(self.micro_batch_sequences, num_windows - begin)
            parts = [next(self._windows) for _ in range(size)]
            result = self.step.run(Examples.concatenate(parts))
            if not result.is_finite:
                raise RunFailedError(
                    f"loss or gradient not finite in update {self.outer_step + 1}",
                    allowed="finite values",
                    remedy="lower optimizer.peak_lr",
                )
            self.averaged += self.parameters.grads.numpy()
            total_nats += result.total_nats
        self.averaged /= np.float32(num_tokens)
        self.outer_step += 1
        self._update.apply(
            self.params,
            self.exp_avg,
            self.exp_avg_sq,
            self.averaged,
            update_number=self.outer_step,
            schedule_tokens=self.schedule_tokens,
            cooldown_start_tokens=planned_cooldown_start_tokens(
                self.spec, budget_tokens=self.budget_tokens
            ),
            budget_tokens=self.budget_tokens,
        )
        self.schedule_tokens += num_tokens
        return total_nats / num_tokens

    def evaluate(self, *, eval_tokens: int = 0) -> EvalResult:
        """Held-out loss of the present parameters."""
        return evaluate_model(
            self.step,
            self.dataset_dir,
            self.manifest,
            eval_tokens=eval_tokens,
            byte_lengths=self._byte_lengths,
            builder=self._builder,
        )


def run_reference(
    spec: RunSpec,
    dataset_dir: Path,
    *,
    num_tokens: int = 0,
    precision: Precision | None = None,
    execution: str = AUTO,
    step_cache: Path | None = None,
    imported: Path | None = None,
) -> ReferenceResult:
    """Train for `num_tokens` (0 = the budget) and evaluate. A given precision is run eager; else
    the step is chosen as a trainer chooses it, which is that of the peers whose `step_cache` it is.
    """
    run = ReferenceRun(spec, dataset_dir, num_tokens=num_tokens, imported=imported)
    if precision is None:
        set_up_step(run.step, wanted=execution, cache_dir=step_cache)
    else:
        run.step.precision = precision
    losses_nats: list[float] = []
    begin = time.monotonic()
    while not run.is_finished:
        losses_nats.append(run.advance())
    train_seconds = time.monotonic() - begin
    result = run.evaluate(eval_tokens=spec.data.eval_tokens)
    return ReferenceResult(
        num_tokens=run.schedule_tokens,
        outer_steps=run.outer_step,
        heldout_loss_nats=result.loss_nats,
        heldout_bits_per_byte=result.bits_per_byte,
        train_seconds=train_seconds,
        precision=run.step.precision.value,
        execution=run.step.execution.value,
        loss_nats_by_step=losses_nats,
    )


def main(arguments: list[str]) -> int:
    """Command line; 0, or the error's exit code with its message on standard error."""
    parser = argparse.ArgumentParser(prog="python -m peer.train.reference", description=__doc__)
    parser.add_argument("--spec", type=Path, required=True, help="RunSpec as TOML or wire JSON")
    parser.add_argument("--dataset", type=Path, required=True, help="dataset directory")
    parser.add_argument("--num-tokens", type=int, default=0, help="0 = the spec's budget")
    parser.add_argument("--initial", type=Path, help="imported model that the spec starts from")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", choices=[p.value for p in Precision], default=None)
    parser.add_argument("--with-steps", action="store_true", help="include the loss of each step")
    parser.add_argument("--json", action="store_true", help="accepted for symmetry; always JSON")
    options = parser.parse_args(arguments)
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    try:
        text = options.spec.read_bytes()
        is_wire = text.lstrip().startswith(b"{")
        spec = RunSpec.from_wire(text) if is_wire else RunSpec.from_toml(text.decode())
        precision = Precision(options.precision) if options.precision else None
        result = run_reference(
            spec,
            options.dataset,
            num_tokens=options.num_tokens,
            precision=precision,
            imported=options.initial,
        )
    except MusterError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    plain = asdict(result)
    if not options.with_steps:
        del plain["loss_nats_by_step"]
    sys.stdout.write(json.dumps(plain) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
