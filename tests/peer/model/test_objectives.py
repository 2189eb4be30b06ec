"""Objectives and masks: hand-worked examples, the same everywhere, and losses that fall."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from peer.model.loss import examples_on, summed_loss
from peer.model.masks import attention_mask
from peer.model.objectives import IGNORED, ExampleBuilder, Examples, span_sizes
from protos.contract.chunk_format import Int64Array
from protos.contract.run_spec import Objective, ObjectiveSpec
from tests.peer.model.tiny import BASE, build

NUM_TEXT = 200
EOS = 0
CPU = torch.device("cpu")


def build_examples(spec: ObjectiveSpec, *windows: list[int], seed: int = 1) -> Examples:
    """Examples of windows of T + 1 tokens with the keys (0, 0, 0), (0, 0, 1), ..."""
    builder = ExampleBuilder(spec, seed=seed, num_text_tokens=NUM_TEXT, eos_token_id=EOS)
    tokens = np.array(windows, np.int64)
    keys = [(0, 0, index) for index in range(len(windows))]
    return builder.build(tokens[:, :-1], tokens[:, 1:], keys)


WINDOW = [100, 101, 102, 103, 104, 105, EOS, *range(107, 117)]
"""Seventeen tokens of two documents."""


def test_causal_is_the_window_itself() -> None:
    examples = build_examples(ObjectiveSpec(), WINDOW)
    assert examples.inputs_BT.tolist() == [WINDOW[:-1]]
    assert examples.labels_BT.tolist() == [WINDOW[1:]]
    assert examples.weights_B is None and examples.prefix_B is None
    assert examples.documents_BT is None


def test_prefix_by_hand() -> None:
    """The draw gives 13 of 16 positions to the prefix; position 12 predicts the first token after
    it, and four predicted tokens stand for sixteen.
    """
    examples = build_examples(ObjectiveSpec(name="prefix", has_document_mask=True), WINDOW)
    assert examples.inputs_BT.tolist() == [WINDOW[:-1]]
    assert examples.labels_BT.tolist() == [[IGNORED] * 12 + [113, 114, 115, 116]]
    assert examples.prefix_B is not None and examples.prefix_B.tolist() == [13]
    assert examples.weights_B is not None and examples.weights_B.tolist() == [4.0]
    assert examples.documents_BT is not None
    assert examples.documents_BT.tolist() == [[0] * 7 + [1] * 9]


def test_span_corruption_by_hand() -> None:
    """12 raw tokens, spans `101` and `109 110 111`: `a S0 b S1`, then `S0 x S1 y S2`."""
    spec = ObjectiveSpec(
        name="span", corruption_ratio=0.3, mean_span_tokens=2.0, has_document_mask=True
    )
    assert span_sizes(spec, 16) == (12, 4, 2) and spec.num_extra_tokens(16) == 3
    examples = build_examples(spec, WINDOW)
    seen = [100, 200, 102, 103, 104, 105, EOS, 107, 108, 201]
    predicted = [200, 101, 201, 109, 110, 111, 202]
    assert examples.inputs_BT.tolist() == [[*seen, *predicted[:-1]]]
    assert examples.labels_BT.tolist() == [[IGNORED] * 9 + predicted]
    assert examples.prefix_B is not None and examples.prefix_B.tolist() == [10]
    assert examples.documents_BT is not None
    assert examples.documents_BT.tolist() == [[0] * 7 + [1] * 3 + [0, 0] + [1] * 4]


def test_masked_by_hand() -> None:
    """Half of 16 positions are predicted: 6 of them masked, 1 replaced, 1 shown as it is."""
    examples = build_examples(ObjectiveSpec(name="masked", corruption_ratio=0.5), WINDOW)
    shown = examples.inputs_BT[0]
    chosen = examples.labels_BT[0] != IGNORED
    np.testing.assert_array_equal(examples.labels_BT[0][chosen], np.array(WINDOW[:-1])[chosen])
    np.testing.assert_array_equal(shown[~chosen], np.array(WINDOW[:-1])[~chosen])
    assert chosen.sum() == 8 and (shown == NUM_TEXT).sum() == 6
    assert shown.tolist()[12] == 48 and shown.tolist()[6] == NUM_TEXT
    assert (shown[chosen] == examples.labels_BT[0][chosen]).sum() == 1
    assert examples.prefix_B is not None and examples.prefix_B.tolist() == [16]


def test_answers_by_hand() -> None:
    """Two records and room for two more tokens: the marks before the answers are gone, the answers
    and their ends are predicted, five tokens stand for twelve, and each record sees itself.
    """
    window = [EOS, 100, 101, EOS, 102, EOS, 103, EOS, 104, 105, EOS, EOS, EOS]
    examples = build_examples(ObjectiveSpec(name="answers"), window)
    read = [EOS, 100, 101, 102, EOS, 103, 104, 105, EOS]
    assert examples.inputs_BT.tolist() == [[*read, EOS, EOS, EOS]]
    predicted = [IGNORED, IGNORED, 102, EOS, IGNORED, 104, 105, EOS]
    assert examples.labels_BT.tolist() == [[*predicted, *[IGNORED] * 4]]
    assert examples.documents_BT is not None
    assert examples.documents_BT.tolist()[0][:9] == [0, 0, 0, 0, 1, 1, 1, 1, 2]
    assert examples.prefix_B is None and examples.num_tokens == 12
    assert examples.weights_B is not None and examples.weights_B.tolist() == pytest.approx([2.4])


def test_a_window_without_an_answer_weighs_nothing_and_is_finite() -> None:
    examples = build_examples(ObjectiveSpec(name="answers"), [EOS, *[5] * 12])
    assert examples.num_predicted == 0
    assert examples.weights_B is not None and np.isfinite(examples.weights_B).all()


def test_masking_has_the_ratios_of_bert() -> None:
    """15 % of many positions; of these 80 % masked, 10 % random."""
    rng = np.random.default_rng(0)
    windows = rng.integers(1, NUM_TEXT, (40, 513)).tolist()
    examples = build_examples(ObjectiveSpec(name="masked"), *windows)
    chosen = examples.labels_BT != IGNORED
    assert chosen.mean() == pytest.approx(0.15, abs=0.002)
    assert (examples.inputs_BT[chosen] == NUM_TEXT).mean() == pytest.approx(0.8, abs=0.01)
    is_same = examples.inputs_BT[chosen] == examples.labels_BT[chosen]
    assert is_same.mean() == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize("seq_len", [16, 37, 64, 256])
@pytest.mark.parametrize(("ratio", "mean"), [(0.15, 3.0), (0.5, 1.0), (0.3, 10.0)])
def test_spans_give_the_text_back(seq_len: int, ratio: float, mean: float) -> None:
    """Seen text and predicted spans, put together at the sentinels, are the window's raw tokens."""
    spec = ObjectiveSpec(name="span", corruption_ratio=ratio, mean_span_tokens=mean)
    num_raw, num_noise, num_spans = span_sizes(spec, seq_len)
    rng = np.random.default_rng(seq_len)
    windows = rng.integers(0, NUM_TEXT, (5, seq_len + 1))
    examples = build_examples(spec, *windows.tolist())
    assert examples.inputs_BT.shape == (5, seq_len)
    for window, inputs, labels in zip(windows, examples.inputs_BT, examples.labels_BT, strict=True):
        tokens = [*inputs.tolist(), int(labels[-1])]
        prefix = num_raw - num_noise + num_spans
        spans: dict[int, list[int]] = {}
        for token in tokens[prefix:]:
            if token >= NUM_TEXT:
                spans[token] = []
            else:
                spans[max(spans)].append(token)
        text: list[int] = []
        for token in tokens[:prefix]:
            text += spans[token] if token >= NUM_TEXT else [token]
        assert text == window[:num_raw].tolist()
        assert len(spans) == num_spans + 1 and sum(map(len, spans.values())) == num_noise
        assert (labels != IGNORED).sum() == num_noise + num_spans + 1


def test_examples_depend_on_the_key_alone() -> None:
    """Another company of windows, another order: the same example; another key or seed: another."""
    spec = ObjectiveSpec(name="masked")
    windows = np.random.default_rng(3).integers(1, NUM_TEXT, (4, 65))

    def labels(rows: list[int], seed: int = 1) -> Int64Array:
        builder = ExampleBuilder(spec, seed=seed, num_text_tokens=NUM_TEXT, eos_token_id=EOS)
        keys = [(2, 5, row) for row in rows]
        return builder.build(windows[rows, :-1], windows[rows, 1:], keys).labels_BT

    np.testing.assert_array_equal(labels([0, 1, 2, 3])[2], labels([2])[0])
    np.testing.assert_array_equal(labels([3, 1])[0], labels([3])[0])
    assert not np.array_equal(labels([2]), labels([2], seed=2))


def test_masks_by_hand() -> None:
    prefix_B = torch.tensor([0, 2, 3])
    documents_BT = torch.tensor([[0, 0, 0], [0, 0, 0], [0, 1, 1]])
    mask = attention_mask(3, prefix_B=prefix_B, documents_BT=documents_BT)
    allowed = (mask == 0).int().tolist()
    assert allowed[0] == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert allowed[1] == [[1, 1, 0], [1, 1, 0], [1, 1, 1]]
    assert allowed[2] == [[1, 0, 0], [0, 1, 1], [0, 1, 1]]
    assert (attention_mask(3) == 0).int().tolist() == allowed[0]


def test_no_token_sees_across_documents_or_ahead() -> None:
    """Logits of a document do not change with another's text, nor with later text."""
    model, _ = build(replace(BASE, vocab_size=NUM_TEXT))
    first = [5, 6, 7, EOS, 8, 9, 10, 11, 12, 13, 14, 15, 16]
    other = [1, 2, 3, EOS, *first[4:]]

    def logits(window: list[int], spec: ObjectiveSpec) -> torch.Tensor:
        inputs_BT, _, _, mask = examples_on(build_examples(spec, window), CPU)
        with torch.inference_mode():
            return model(inputs_BT, mask=mask)[0]

    apart, joined = ObjectiveSpec(has_document_mask=True), ObjectiveSpec()
    torch.testing.assert_close(logits(first, apart)[4:], logits(other, apart)[4:])
    assert (logits(first, joined)[4:] - logits(other, joined)[4:]).abs().max() > 1e-3
    later = [*first[:-3], 99, 98, 97]
    torch.testing.assert_close(logits(first, apart)[:9], logits(later, apart)[:9])


def test_batches_add_up_whatever_their_size() -> None:
    """Weighted sums of two windows are those of each alone, and a window counts for T tokens."""
    model, _ = build(replace(BASE, vocab_size=NUM_TEXT + 8))
    spec = ObjectiveSpec(name="prefix")
    windows = np.random.default_rng(5).integers(1, NUM_TEXT, (3, 13)).tolist()

    def nats(examples: Examples) -> float:
        inputs_BT, labels_BT, weights_B, mask = examples_on(examples, CPU)
        with torch.inference_mode():
            return float(summed_loss(model(inputs_BT, mask=mask), labels_BT, weights_B))

    whole = build_examples(spec, *windows)
    rows = [
        Examples(
            inputs_BT=whole.inputs_BT[row : row + 1],
            labels_BT=whole.labels_BT[row : row + 1],
            weights_B=None if whole.weights_B is None else whole.weights_B[row : row + 1],
            prefix_B=None if whole.prefix_B is None else whole.prefix_B[row : row + 1],
        )
        for row in range(3)
    ]
    assert nats(whole) == pytest.approx(sum(map(nats, rows)), rel=1e-5)
    assert nats(Examples.concatenate(rows)) == pytest.approx(nats(whole), rel=1e-6)
    per_token = nats(whole) / whole.num_tokens
    assert 3.0 < per_token < 8.0, "a mean over tokens, near ln 208 for an untrained model"


@pytest.mark.parametrize("name", list(Objective))
def test_every_objective_trains(name: Objective) -> None:
    """Text that repeats itself: each objective's loss falls well below that of guessing."""
    spec = ObjectiveSpec(name=name, has_document_mask=True)
    seq_len = 24
    num_ids = 12 + spec.num_extra_tokens(seq_len)
    model, flat = build(replace(BASE, vocab_size=num_ids, seq_len=seq_len))
    builder = ExampleBuilder(spec, seed=0, num_text_tokens=12, eos_token_id=EOS)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses_nats = []
    for step in range(120):
        starts = np.random.default_rng(step).integers(0, 11, 8)
        windows = 1 + (starts[:, None] + np.arange(seq_len + 1)) % 11
        keys = [(0, step, row) for row in range(8)]
        examples = builder.build(windows[:, :-1], windows[:, 1:], keys)
        inputs_BT, labels_BT, weights_B, mask = examples_on(examples, CPU)
        flat.grads.zero_()
        loss = summed_loss(model(inputs_BT, mask=mask), labels_BT, weights_B)
        loss.backward()
        flat.grads.div_(examples.num_tokens)
        optimizer.step()
        losses_nats.append(float(loss.detach()) / examples.num_tokens)
    assert np.mean(losses_nats[-10:]) < 0.5 * np.mean(losses_nats[:5])
