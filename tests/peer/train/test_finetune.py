"""Fine-tuning: what is predicted, that it is learned, and that the result is a usable folder."""

import hashlib
import json
import math
from pathlib import Path

import pytest
import torch

from peer.checkpoint.export import ClassifierHead, export_model
from peer.checkpoint.model_card import model_card
from peer.cli.checkpoints import open_checkpoint
from peer.cli.finetune import _tuned_provenance
from peer.cli.finetune import finetune as finetune_command
from peer.model.objectives import IGNORED
from peer.train.finetune import (
    ClassificationHead,
    TuningSettings,
    classifier,
    final_hidden,
    finetune,
    language_model,
    score_set,
)
from peer.train.finetune_data import Example, TuningSet, batch_of, load_tuning_set
from protos.contract.errors import MachineError, RunFailedError, UsageError
from tests.peer.checkpoint.test_export import TOKENIZER
from tests.peer.model.tiny import BASE, build


def encode(text: str) -> list[int]:
    return [1 + "abcdefgh".index(letter) for letter in text]


def load(path: Path, **options: bool) -> TuningSet:
    return load_tuning_set(path, encode=encode, eos_token_id=0, seq_len=12, **options)


def write_lines(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_only_answers_and_their_end_are_predicted(tmp_path: Path) -> None:
    rows = [
        {"prompt": "ab", "answer": "c"},
        {"prompt": "a", "answer": "bcd"},
        {"prompt": "a" * 12, "answer": "b"},
    ]
    found = load(write_lines(tmp_path / "d.jsonl", rows))
    assert found.num_too_long == 1 and len(found.training) == len(found.heldout) == 1
    inputs_BT, labels_BT = batch_of([*found.training, *found.heldout], pad_token_id=0)
    assert inputs_BT.tolist() == [[0, 1, 2, 3, 0], [0, 1, 2, 3, 4]]
    _ = IGNORED
    assert labels_BT.tolist() == [[_, _, 3, 0, _], [_, 2, 3, 4, 0]]


def test_text_is_cut_into_windows_that_predict_every_token_once(tmp_path: Path) -> None:
    path = tmp_path / "d.txt"
    path.write_text("abcdefgh" * 4)
    found = load(path)
    examples = [*found.training, *found.heldout]
    assert [len(example.tokens) for example in examples] == [13, 13, 10]
    assert sum(len(example.tokens) - 1 for example in examples) == 33


@pytest.mark.parametrize(
    ("name", "text", "is_labelled", "said"),
    [
        ("d.jsonl", '{"prompt": "a"}\n', False, "line 1"),
        ("d.jsonl", '\n{"text": "a", "label": 1}\nno\n', True, "line 3"),
        ("d.jsonl", '{"text": "a", "label": "x"}\n' * 3, True, "1 different labels"),
        ("d.jsonl", '{"prompt": "a", "answer": "b"}\n', False, "gives 1 example; at least two"),
        ("d.txt", "a", True, "jsonl"),
        ("d.txt", "a", False, "gives 1 example; at least two"),
        ("d.txt", "", False, "holds no text"),
        ("d.jsonl", " \n", False, "holds no text"),
        ("d.jsonl", '{"prompt": "a", "answer": "\\ud800"}\n' * 3, False, "line 1"),
        ("d.jsonl", "[" * 100_000, False, "line 1"),
    ],
)
def test_data_that_cannot_be_used(
    tmp_path: Path, name: str, text: str, is_labelled: bool, said: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=said) as refused:
        load(tmp_path / name, is_labelled=is_labelled)
    assert refused.value.allowed and refused.value.remedy


def test_lines_end_at_line_feeds_only_and_sorted_labels_are_shuffled(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    row = '{"prompt": "a\u2028b\x85", "answer": "c"}\r\n'
    path.write_bytes(b"\xef\xbb\xbf" + (row * 2).encode())
    found = load_tuning_set(path, encode=lambda text: [1] * len(text), eos_token_id=0, seq_len=12)
    assert [len(example.tokens) for example in (*found.training, *found.heldout)] == [7, 7]
    assert found.data_digest == hashlib.sha256(path.read_bytes()).hexdigest()
    rows = [{"text": "a", "label": label} for label in ["x"] * 40 + ["y"] * 40]
    labelled = load(write_lines(path, rows), is_labelled=True)
    assert {example.label for example in labelled.heldout} == {0, 1}


def test_settings_that_cannot_end_well_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    for bad in ({"peak_lr": math.inf}, {"weight_decay": math.inf}, {"seed": 2**63}):
        with pytest.raises(UsageError):
            TuningSettings(**bad)
    folder, data = write_model(tmp_path / "in"), tmp_path / "d.txt"
    data.write_text("ab" * 200)
    with pytest.raises(UsageError, match="holds config.json"):
        finetune_command(folder, folder, data=data)
    with pytest.raises(RunFailedError, match="finite"):
        finetune_command(folder, tmp_path / "out", data=data, lr=1e30, weight_decay=1e6, passes=1)
    assert not (tmp_path / "out").exists()


def test_a_model_learns_answers_and_a_bad_rate_is_refused() -> None:
    model, _ = build(BASE)
    examples = tuple(Example(tokens=(0, a, 10 + a, 0), num_unpredicted=2) for a in range(1, 9))
    data = TuningSet(training=examples, heldout=examples, num_too_long=0)
    tunable = language_model(model, list(model.parameters()), pad_token_id=0)
    before = score_set(tunable, examples, batch_sequences=3)
    assert before.num_predicted == 16
    settings = TuningSettings(peak_lr=1e-2, num_passes=15, batch_sequences=4)
    assert len(list(finetune(tunable, data, settings))) == 30
    after = score_set(tunable, examples, batch_sequences=8)
    assert after.loss_nats < 0.2 * before.loss_nats
    with pytest.raises(RunFailedError, match="--lr"):
        list(finetune(tunable, data, TuningSettings(peak_lr=1e30, num_passes=5)))
    with pytest.raises(UsageError):
        TuningSettings(peak_lr=0.0)


def test_a_classifier_learns_and_transformers_computes_its_logits(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model, flat = build(BASE)
    head = ClassificationHead(BASE.d_model, 2)
    examples = tuple(
        Example(tokens=(0, *([3] * (1 + n % 3)), n, 5 + n % 7), label=int(n % 2 == 0))
        for n in range(10, 40)
    )
    data = TuningSet(
        training=examples, heldout=examples, num_too_long=0, class_names=("odd", "even")
    )
    tunable = classifier(model, head, pad_token_id=0)
    list(finetune(tunable, data, TuningSettings(peak_lr=1e-2, num_passes=12)))
    score = score_set(tunable, examples, batch_sequences=8)
    assert score.num_right >= 28 and score.num_predicted == 30
    tokenizer_path = tmp_path / "tokenizer.json"
    tokenizer_path.write_text(json.dumps(TOKENIZER))
    weight = head.weight.detach().numpy()
    export_model(
        BASE, flat.values.numpy(), folder=tmp_path / "out", tokenizer_path=tokenizer_path,
        eos_token_id=0, classifier=ClassifierHead(weight=weight, class_names=("odd", "even")),
    )  # fmt: skip
    theirs = transformers.LlamaForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    tokens_BT = torch.tensor([examples[2].tokens])
    with torch.inference_mode():
        ours = head(final_hidden(model, tokens_BT)[:, -1])
        assert float((theirs(tokens_BT).logits - ours).abs().max()) <= 1e-4
    assert theirs.config.id2label == {0: "odd", 1: "even"}
    padded_BT = torch.tensor([[*examples[2].tokens, 0, 0], [*examples[2].tokens, 5, 6]])
    with torch.inference_mode():
        logits_BC = theirs(padded_BT).logits
    assert float((logits_BC[0] - ours[0]).abs().max()) <= 1e-4
    card = model_card(BASE, run_spec=None, provenance={}, manifest=None, is_classifier=True)
    assert "ForSequenceClassification" in card and "generate" not in card
    with pytest.raises(UsageError, match="licence"):
        model_card(BASE, run_spec=None, provenance={}, manifest=None, licence="a\nb")


def write_model(folder: Path) -> Path:
    _, flat = build(BASE)
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    export_model(
        BASE, flat.values.numpy(), folder=folder, tokenizer_path=folder / "tokenizer.json",
        eos_token_id=0,
    )  # fmt: skip
    return folder


def test_the_command_writes_a_folder_that_predicts_the_data_better(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_model(tmp_path / "in")
    data = tmp_path / "d.txt"
    data.write_text("ab" * 200)
    finetune_command(folder, tmp_path / "out", data=data, lr=1e-2, passes=4, is_json=True)
    figures = json.loads(capsys.readouterr().out)
    assert figures["heldout_nats_after"] < 0.5 * figures["heldout_nats_before"]
    opened = open_checkpoint(tmp_path / "out")
    assert opened.provenance["finetune_data_digest"] == figures["data_digest"]
    assert not torch.equal(
        torch.tensor(opened.params), torch.tensor(open_checkpoint(folder).params)
    )
    assert figures["data_digest"] in (tmp_path / "out" / "README.md").read_text()
    finetune_command(tmp_path / "out", tmp_path / "again", data=data, passes=1, is_json=True)
    assert (
        open_checkpoint(tmp_path / "again").provenance["earlier_finetune_data_digests"]
        == figures["data_digest"]
    )
    tuned = _tuned_provenance({"state_digest": "s", "outer_step": 3}, "d")
    assert tuned == {"base_state_digest": "s", "base_outer_step": 3, "finetune_data_digest": "d"}


def test_low_rank_adapters_or_a_clear_refusal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, data = write_model(tmp_path / "in"), tmp_path / "d.txt"
    data.write_text("ab" * 200)

    def run() -> None:
        finetune_command(
            folder, tmp_path / "out", data=data, lora_rank=4, lr=1e-2, passes=4, is_json=True
        )

    try:
        import peft  # noqa: F401
    except ImportError:
        with pytest.raises(MachineError, match="peft") as refused:
            run()
        assert "'.[lora]'" in refused.value.remedy
        return
    run()
    figures = json.loads(capsys.readouterr().out)
    assert figures["num_parameters_trained"] < 10_000
    assert figures["heldout_nats_after"] < figures["heldout_nats_before"] - 0.3
    assert (tmp_path / "out" / "adapter" / "adapter_config.json").is_file()
    after = open_checkpoint(tmp_path / "out")
    assert after.model_spec == BASE
