"""Answers in a swarm: the losses and gradients of `finetune` on the same records, and they fall."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from coordinator.corpus.build import build_corpus
from coordinator.corpus.split import split_at_line
from coordinator.corpus.tokenizer import GivenTokenizer, load_tokenizer, train_tokenizer
from peer.checkpoint.export import export_model
from peer.cli.evaluate import evaluate as evaluate_command
from peer.eval.evaluate import token_byte_lengths
from peer.model.objectives import ExampleBuilder
from peer.train.finetune import language_model, score_set
from peer.train.finetune_data import Example, load_tuning_set
from peer.train.reference import ReferenceRun, iterate_windows
from peer.train.replicas import ReplicaRun
from peer.train.step import MicroStep
from protos.contract.chunk_format import Manifest
from protos.contract.errors import UsageError
from protos.contract.run_spec import DataSpec, ObjectiveSpec, RunSpec, StrategySpec
from tests.peer.model.tiny import SPEC, build

SEQ_LEN = 24
HELDOUT_RATIO = 0.2
LETTERS = "abcdefghij"
LINES = [
    json.dumps({"prompt": f"{a}{b}:", "answer": f"{b}{a}" * (1 + n % 3)})
    for n, (a, b) in enumerate((a, b) for _ in range(3) for a in LETTERS for b in LETTERS)
]
EOS = 0


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunSpec, Path]:
    """300 records of two letters, which the answer turns round once to three times."""
    folder = tmp_path_factory.mktemp("answers")
    (folder / "records.jsonl").write_text("\n".join(LINES) + "\n")
    given = GivenTokenizer(
        tokenizer_json=train_tokenizer([LETTERS], vocab_size=257), eos_token_id=EOS
    )
    manifest = build_corpus(
        [str(folder / "records.jsonl")], folder / "dataset", given_tokenizer=given,
        answer_seq_len=SEQ_LEN, chunk_bytes=1_024, heldout_ratio=HELDOUT_RATIO,
    )  # fmt: skip
    model = replace(SPEC.model, seq_len=SEQ_LEN, vocab_size=manifest.vocab_size)
    spec = replace(
        SPEC,
        budget_tokens=SEQ_LEN * 400,
        model=model,
        objective=ObjectiveSpec(name="answers"),
        strategy=replace(SPEC.strategy, global_batch_tokens=SEQ_LEN * 8),
        data=DataSpec(dataset_id=manifest.dataset_id),
    )
    return spec, folder / "dataset"


def finetune_examples(folder: Path, text: str) -> list[Example]:
    """All of them, in their order."""
    path = folder.parent / "part.jsonl"
    path.write_text(text)
    tokenizer = load_tokenizer((folder / "tokenizer.json").read_bytes())
    found = load_tuning_set(
        path,
        encode=lambda line: list(tokenizer.encode(line, add_special_tokens=False).ids),
        eos_token_id=EOS,
        seq_len=SEQ_LEN,
    )
    return [*found.training, *found.heldout]


def test_heldout_loss_is_that_of_finetune(dataset: tuple[RunSpec, Path]) -> None:
    spec, folder = dataset
    run = ReferenceRun(spec, folder)
    found = run.evaluate()
    text = "\n".join(LINES) + "\n"
    heldout = finetune_examples(folder, text[split_at_line(text, tail_ratio=HELDOUT_RATIO) :])
    assert 55 <= len(heldout) <= 65
    tunable = language_model(run.model, list(run.model.parameters()), pad_token_id=EOS)
    expected = score_set(tunable, heldout, batch_sequences=8)
    assert found.num_tokens == expected.num_predicted
    assert found.loss_nats == pytest.approx(expected.loss_nats, rel=1e-5)


def test_a_window_trains_as_its_records_do_in_finetune(dataset: tuple[RunSpec, Path]) -> None:
    """Records beside each other in a window neither see nor move each other."""
    spec, folder = dataset
    manifest = Manifest.from_bytes((folder / "manifest.json").read_bytes())
    builder = ExampleBuilder.for_run(spec, token_byte_lengths(folder / "tokenizer.json"))
    window = next(iterate_windows(spec, folder, manifest, builder))
    read = "".join(map(chr, window.inputs_BT[0])).split(chr(EOS))
    by_tokens = {
        "".join(map(chr, example.tokens[1:-1])): example
        for example in finetune_examples(folder, "\n".join(LINES))
    }
    examples = [by_tokens[record] for record in read if record]
    assert len(by_tokens) == 300 and len(examples) >= 2
    model, flat = build(spec.model)
    result = MicroStep(model, flat).run(window)
    found = flat.grads.clone() / result.num_tokens
    losses = language_model(model, list(model.parameters()), pad_token_id=EOS).score(examples)
    mean = losses.total / losses.num_predicted
    assert result.total_nats / result.num_tokens == pytest.approx(float(mean.detach()), rel=1e-5)
    flat.grads.zero_()
    mean.backward()
    assert float((found - flat.grads).norm()) < 1e-5 * float(flat.grads.norm())


def test_two_peers_equal_one_process_and_learn_the_answers(dataset: tuple[RunSpec, Path]) -> None:
    spec, folder = dataset
    run = ReplicaRun(spec, folder, round_tokens=[SEQ_LEN * 5, SEQ_LEN * 3])
    reference = ReferenceRun(spec, folder)
    before = reference.evaluate().loss_nats
    while not run.is_finished:
        assert run.advance() == pytest.approx(reference.advance(), abs=5e-5)
    after = run.evaluate().loss_nats
    assert after == pytest.approx(reference.evaluate().loss_nats, abs=5e-5)
    assert run.position.schedule_tokens == spec.budget_tokens
    assert after < 0.3 * before


def test_diloco_peers_learn_the_answers_too(dataset: tuple[RunSpec, Path]) -> None:
    spec, folder = dataset
    strategy = StrategySpec(
        name="diloco", inner_steps=4, inner_batch_tokens=SEQ_LEN * 4, num_fragments=2,
        overlap_inner_steps=1, codec="int8", outer_lr=1.0, outer_momentum=0.0,
    )  # fmt: skip
    spec = replace(spec, strategy=strategy)
    run = ReplicaRun(spec, folder, round_tokens=[SEQ_LEN * 8, SEQ_LEN * 4])
    before = run.evaluate().loss_nats
    while not run.is_finished:
        run.advance()
    assert run.position.schedule_tokens == spec.budget_tokens
    for replica in run.replicas[1:]:
        for vector, other in zip(
            replica.vectors.state_vectors(), run.replicas[0].vectors.state_vectors(), strict=True
        ):
            np.testing.assert_array_equal(vector, other)
    assert run.evaluate().loss_nats < 0.4 * before


def test_other_objectives_are_refused(dataset: tuple[RunSpec, Path]) -> None:
    spec, folder = dataset
    for other in (
        replace(spec, objective=ObjectiveSpec()),
        replace(spec, model=replace(spec.model, seq_len=12)),
    ):
        with pytest.raises(UsageError, match="objective.name|seq_len"):
            ReferenceRun(other, folder).advance()


def test_eval_takes_the_answers_of_a_dataset_of_answers(
    dataset: tuple[RunSpec, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A model without a run, such as the one to go on from."""
    spec, folder = dataset
    run = ReferenceRun(spec, folder)
    for seq_len in (SEQ_LEN, 12):
        export_model(
            replace(spec.model, seq_len=seq_len), run.params, folder=tmp_path / str(seq_len),
            tokenizer_path=folder / "tokenizer.json", eos_token_id=EOS,
        )  # fmt: skip
    evaluate_command(tmp_path / str(SEQ_LEN), dataset=folder, threads=1, is_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["objective"] == "answers"
    assert found["loss_nats"] == pytest.approx(run.evaluate().loss_nats, rel=1e-4)
    with pytest.raises(UsageError, match="seq_len = 12"):
        evaluate_command(tmp_path / "12", dataset=folder, threads=1)
    text = tmp_path / "d.txt"
    text.write_text("".join(LINES))
    evaluate_command(tmp_path / str(SEQ_LEN), text, threads=1, is_json=True)
    assert json.loads(capsys.readouterr().out)["objective"] == "causal"
