"""Texts of any length, the in-context task, memorisation, and tasks of the harness."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from peer.checkpoint.store import CheckpointHeader, CheckpointStore
from peer.cli.evaluate import evaluate as evaluate_command
from peer.eval.harness import harness_tasks
from peer.eval.in_context import in_context_task
from peer.eval.memorization import memorization
from peer.eval.text import evaluate_tokens
from peer.eval.trained_text import heldout_windows, trained_windows
from peer.model.decoder import Decoder
from peer.model.init import initial_vector
from peer.model.loss import summed_loss
from protos.contract.chunk_format import MANIFEST_FILE, Manifest
from protos.contract.digest import StateMeta, state_digest
from protos.contract.errors import MachineError, UsageError
from tests.peer.model.tiny import BASE, build
from tests.peer.train.test_finetune import write_model
from tests.peer.train.toy_dataset import build_toy_dataset

LENGTHS = np.array([0] + [1] * 60)


@pytest.mark.parametrize("num_tokens", [2, 12, 13, 14, 131])
def test_every_token_but_the_first_is_predicted_once(num_tokens: int) -> None:
    model, _ = build(BASE)
    tokens = np.arange(num_tokens) * 7 % 61
    result = evaluate_tokens(model, tokens, byte_lengths=LENGTHS)
    expected = 0.0
    with torch.inference_mode():
        for begin in range(0, num_tokens - 1, 12):
            piece = torch.from_numpy(tokens[begin : begin + 13])[None]
            expected += float(summed_loss(model(piece[:, :-1]), piece[:, 1:]))
    assert result.total_nats == pytest.approx(expected, rel=1e-5)
    assert result.num_tokens == num_tokens - 1
    assert result.num_bytes == int((tokens[1:] > 0).sum())


def test_texts_that_cannot_be_evaluated() -> None:
    model, _ = build(BASE)
    for tokens in ([1], [1, 61]):
        with pytest.raises(UsageError) as refused:
            evaluate_tokens(model, tokens, byte_lengths=LENGTHS)
        assert refused.value.remedy


class Oracle(Decoder):
    """Copies: the token that followed the last earlier occurrence of the present one."""

    def forward(self, tokens_BT, cache=None, mask=None, head=None):  # type: ignore[no-untyped-def]
        logits_BTV = torch.zeros(*tokens_BT.shape, self.spec.vocab_size)
        for row, tokens in enumerate(tokens_BT.tolist()):
            for position, token in enumerate(tokens):
                earlier = [p for p in range(position) if tokens[p] == token]
                if earlier:
                    logits_BTV[row, position, tokens[earlier[-1] + 1]] = 20.0
        return logits_BTV if head is None else head(logits_BTV, torch.eye(self.spec.vocab_size))


def test_the_in_context_task_tells_a_copier_from_a_stranger() -> None:
    copier = Oracle(BASE)
    copier.norm.weight = torch.nn.Parameter(torch.ones(BASE.d_model))
    right = in_context_task(copier, byte_lengths=LENGTHS, bos_token_id=0)
    assert right.repeat_accuracy_ratio == right.recall_accuracy_ratio == 1.0
    assert right.repeat_loss_nats < 0.01 and right.first_loss_nats == pytest.approx(math.log(61))
    stranger, _ = build(BASE)
    wrong = in_context_task(stranger, byte_lengths=LENGTHS, bos_token_id=0)
    assert wrong.repeat_accuracy_ratio < 0.3
    with pytest.raises(UsageError, match="window"):
        in_context_task(stranger, byte_lengths=LENGTHS[:5], bos_token_id=0)


def test_memorisation_is_found_where_it_is_and_only_there() -> None:
    """A model fitted to random windows memorises; untrained it has nothing within its error."""
    model, flat = build(BASE)
    generator = np.random.default_rng(0)
    windows = list(generator.integers(1, 61, (40, 13)))
    trained, heldout = windows[:20], windows[20:]

    def estimate():  # type: ignore[no-untyped-def]
        return memorization(
            model, trained_windows=trained, heldout_windows=heldout, trained_bytes=20 * 12,
            byte_lengths=LENGTHS,
        )  # fmt: skip

    before = estimate()
    assert abs(before.bits_per_parameter) <= 4 * before.bits_per_parameter_error
    batch = torch.from_numpy(np.stack(trained))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        flat.grads.zero_()
        (summed_loss(model(batch[:, :-1]), batch[:, 1:]) / 240).backward()
        optimizer.step()
    after = estimate()
    random_bits = 240 * math.log2(60)
    assert 0.5 * random_bits < after.memorized_bits
    assert after.bits_per_parameter == pytest.approx(
        after.memorized_bits / flat.values.numel(), rel=1e-9
    )
    assert after.capacity_ratio == pytest.approx(after.bits_per_parameter / 3.6)
    with pytest.raises(UsageError, match="at least two|windows"):
        memorization(
            model, trained_windows=trained[:1], heldout_windows=heldout, trained_bytes=12,
            byte_lengths=LENGTHS,
        )  # fmt: skip


def test_trained_windows_are_those_of_the_schedule(tmp_path: Path) -> None:
    spec = build_toy_dataset(tmp_path)
    manifest = Manifest.from_bytes((tmp_path / MANIFEST_FILE).read_bytes())
    lengths = np.ones(manifest.vocab_size, dtype=np.int64)

    def found(tokens: int):  # type: ignore[no-untyped-def]
        return trained_windows(
            spec, tmp_path, manifest, schedule_tokens=tokens, max_windows=8, byte_lengths=lengths
        )

    some = found(12 * 5)
    assert some.trained_bytes == 60 and len(some.windows) == 5
    total = sum((chunk.num_tokens - 1) // 12 for chunk in manifest.training_chunks)
    everything = found(12 * total * 3)  # three passes count once
    assert everything.trained_bytes == 12 * total and len(everything.windows) == min(8, total)
    assert all(window.size == 13 for window in everything.windows)
    assert heldout_windows(spec, tmp_path, manifest, max_windows=3)
    with pytest.raises(UsageError, match="0 trained"):
        found(0)


def test_the_command_says_what_a_checkpoint_has_memorised(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = build_toy_dataset(tmp_path)
    (tmp_path / "run_spec.json").write_bytes(spec.to_wire())
    vectors = [np.zeros(np.size(initial_vector(spec)), dtype=np.float32) for _ in range(3)]
    vectors[0][:] = initial_vector(spec)
    meta = StateMeta(
        run_digest=spec.run_digest, incarnation=1, outer_step=9, schedule_tokens=12 * 50,
        directive_number=1,
    )  # fmt: skip
    header = CheckpointHeader(
        meta=meta, state_digest=state_digest(meta, vectors), directive=b"", incarnation_record=b"",
        unreported_certificates=(),
    )  # fmt: skip
    path = CheckpointStore(tmp_path / "state").save(header, vectors)
    evaluate_command(path, dataset=tmp_path, is_memorization=True, threads=1, is_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["trained_bytes"] == 50 * 12 and found["num_windows"] == 40
    assert abs(found["bits_per_parameter"]) <= 4 * found["bits_per_parameter_error"]
    assert found["schedule_tokens"] == 600 and found["capacity_bits_per_parameter"] == 3.6
    evaluate_command(path, dataset=tmp_path, is_memorization=True, threads=1)
    assert "no statement about privacy" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(UsageError, match="without a run"):
        evaluate_command(write_model(tmp_path / "m"), dataset=tmp_path, is_memorization=True)


def test_harness_tasks_or_a_clear_refusal(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        with pytest.raises(MachineError, match="lm-evaluation-harness") as refused:
            harness_tasks(folder, ["x"], num_few_shot=0, limit_examples=None)
        assert "'.[eval]'" in refused.value.remedy
        return
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    rows = [{"question": "a", "choices": ["b", "ab"], "answer": 0} for _ in range(4)]
    (tasks / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    (tasks / "letters.yaml").write_text(
        f"task: letters\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
        f"    test: {tasks}/rows.json\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: question\n"
        "doc_to_choice: choices\ndoc_to_target: answer\nmetric_list:\n  - metric: acc\n"
    )
    found = harness_tasks(
        folder, ["letters"], num_few_shot=0, limit_examples=None, task_folder=tasks
    )
    assert found["letters"]["acc,none"] in (0.0, 1.0)
    with pytest.raises(UsageError, match="nonsense-task"):
        harness_tasks(folder, ["nonsense-task"], num_few_shot=0, limit_examples=None)
