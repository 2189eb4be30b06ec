"""The one-process run: learns, repeats itself, and does not depend on the micro-batch."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from peer.train.reference import ReferenceRun, main, run_reference
from peer.train.step import Precision, probe_plan, sequence_bytes
from protos.contract.chunk_format import ChunkEntry, Manifest, Source, chunk_from_tokens
from protos.contract.run_spec import DataSpec, RunSpec
from tests.peer.model.tiny import SPEC, build
from tests.peer.train.harness import CHUNK_WINDOWS


@pytest.fixture
def dataset(tmp_path: Path) -> tuple[RunSpec, Path]:
    """A spec and a dataset of predictable text: three training chunks and one held out."""
    model = SPEC.model
    (tmp_path / "chunks").mkdir()
    entries = []
    for index in range(4):
        tokens = (np.arange(CHUNK_WINDOWS * model.seq_len + 1) * 7 + index) % model.vocab_size
        data = chunk_from_tokens(tokens, vocab_size=model.vocab_size)
        name = f"train-{index:06d}.bin" if index < 3 else "heldout-000000.bin"
        (tmp_path / "chunks" / name).write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        entries.append(
            ChunkEntry(source_index=0, num_tokens=tokens.size, digest=digest, num_bytes=tokens.size)
        )
    vocab = {chr(0x100 + index): index for index in range(model.vocab_size)}
    tokenizer = json.dumps({"model": {"vocab": vocab}, "added_tokens": []}).encode()
    (tmp_path / "tokenizer.json").write_bytes(tokenizer)
    manifest = Manifest(
        vocab_size=model.vocab_size,
        eos_token_id=0,
        token_dtype="<u2",
        tokenizer_digest=hashlib.sha256(tokenizer).hexdigest(),
        chunk_bytes=4096,
        seed=0,
        sources=(
            Source(
                name="s",
                origin="o",
                licence="l",
                weight=1.0,
                num_documents=1,
                num_bytes=1,
                num_tokens=1,
            ),
        ),
        training_chunks=tuple(entries[:3]),
        heldout_chunks=tuple(entries[3:]),
    )
    (tmp_path / "manifest.json").write_bytes(manifest.to_bytes())
    spec = replace(SPEC, budget_tokens=12 * 150, data=DataSpec(dataset_id=manifest.dataset_id))
    return spec, tmp_path


def test_it_learns_and_spends_exactly_its_budget(dataset: tuple[RunSpec, Path]) -> None:
    spec, folder = dataset
    result = run_reference(spec, folder, precision=Precision.FP32)
    assert result.num_tokens == spec.budget_tokens
    assert result.outer_steps == -(-spec.budget_tokens // spec.strategy.global_batch_tokens)
    assert result.loss_nats_by_step[-1] < result.loss_nats_by_step[0] - 0.5
    assert result.heldout_bits_per_byte == pytest.approx(
        result.heldout_loss_nats / np.log(2), rel=1e-6
    )


def test_it_repeats_itself_to_the_bit(dataset: tuple[RunSpec, Path]) -> None:
    spec, folder = dataset
    runs = [ReferenceRun(spec, folder) for _ in range(2)]
    for _ in range(3):
        for run in runs:
            run.advance()
    assert np.array_equal(runs[0].params, runs[1].params)


def test_micro_batches_only_round_differently(dataset: tuple[RunSpec, Path]) -> None:
    spec, folder = dataset
    runs = [ReferenceRun(spec, folder) for _ in range(2)]
    runs[1].micro_batch_sequences = 3
    for run in runs:
        run.advance()
    difference = np.linalg.norm(runs[0].averaged - runs[1].averaged)
    assert difference <= 1e-5 * np.linalg.norm(runs[0].averaged)


def test_command_line(
    dataset: tuple[RunSpec, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    spec, folder = dataset
    path = tmp_path / "run.toml"
    path.write_text(spec.to_toml())
    arguments = ["--spec", str(path), "--dataset", str(folder), "--num-tokens", "240", "--json"]
    assert main([*arguments, "--precision", "fp32"]) == 0
    plain = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert plain["num_tokens"] == 240 and plain["heldout_bits_per_byte"] > 0
    path.write_text(spec.to_toml().replace("seed =", "sead ="))
    assert main(arguments) == 2
    assert "seed" in capsys.readouterr().err


def test_probe_chooses_and_says_why() -> None:
    from peer.train.step import MicroStep

    model, flat = build(SPEC.model)
    step = MicroStep(model, flat)
    plan = probe_plan(step)
    assert plan.precision is step.precision
    assert 1 <= plan.micro_batch_sequences <= 8
    assert "fp32" in plan.reason and "memory" in plan.reason
    assert not flat.grads.any()
    assert sequence_bytes(SPEC.model, is_cpu=True) > sequence_bytes(SPEC.model, is_cpu=False)
