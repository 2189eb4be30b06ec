"""Held-out loss and generation."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from peer.cli.generate import GrowingText, _read_prompts
from peer.cli.options import print_json
from peer.eval.evaluate import (
    EvalResult,
    Evaluation,
    choose_windows,
    evaluate,
    token_byte_lengths,
)
from peer.eval.generate import (
    Context,
    Sampling,
    generate_batch,
    generate_tokens,
    next_token_ratios,
)
from peer.model.loss import summed_loss
from protos.contract.chunk_format import chunk_from_tokens
from protos.contract.errors import CorruptDataError, UsageError
from tests.peer.model.tiny import BASE, build


def write_chunks(folder: Path, *, num_windows: int) -> tuple[Path, np.ndarray]:
    tokens = np.arange(num_windows * BASE.seq_len + 3) * 11 % BASE.vocab_size
    path = folder / "chunk"
    path.write_bytes(chunk_from_tokens(tokens, vocab_size=BASE.vocab_size))
    return path, tokens


def test_sums_over_all_windows(tmp_path: Path) -> None:
    model, _ = build(BASE)
    path, tokens = write_chunks(tmp_path, num_windows=19)
    lengths = np.arange(BASE.vocab_size)
    result = evaluate(model, heldout_paths=[path, path], byte_lengths=lengths)
    end = 19 * BASE.seq_len
    inputs_BT = torch.from_numpy(tokens[:end].reshape(19, -1).copy())
    labels_BT = torch.from_numpy(tokens[1 : end + 1].reshape(19, -1).copy())
    with torch.inference_mode():
        expected_nats = 2 * float(summed_loss(model(inputs_BT), labels_BT))
    assert result.num_tokens == 2 * 19 * BASE.seq_len
    assert result.num_bytes == 2 * int(tokens[1 : end + 1].sum())
    assert result.total_nats == pytest.approx(expected_nats, rel=1e-5)
    bits_per_byte = expected_nats / math.log(2) / result.num_bytes
    assert result.bits_per_byte == pytest.approx(bits_per_byte, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(result.loss_nats))


def test_an_evaluation_advances_in_slices(tmp_path: Path) -> None:
    model, _ = build(BASE)
    path, _ = write_chunks(tmp_path, num_windows=20)
    evaluation = Evaluation(
        model, heldout_paths=[path], byte_lengths=np.ones(BASE.vocab_size, dtype=np.int64)
    )
    assert evaluation.advance() is None
    assert evaluation.advance() is None
    result = evaluation.advance()
    assert result is not None and result.num_tokens == result.num_bytes == 240


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    model, _ = build(BASE)
    path, _ = write_chunks(tmp_path, num_windows=0)
    with pytest.raises(UsageError, match="without one window"):
        Evaluation(model, heldout_paths=[path], byte_lengths=np.ones(61, dtype=np.int64))


def test_windows_are_spread_evenly() -> None:
    assert choose_windows(10, eval_tokens=0, seq_len=4).tolist() == list(range(10))
    assert choose_windows(10, eval_tokens=20, seq_len=4).tolist() == [0, 2, 4, 6, 8]
    assert choose_windows(10, eval_tokens=1, seq_len=4).tolist() == [0]
    assert choose_windows(3, eval_tokens=10**6, seq_len=4).tolist() == [0, 1, 2]


def test_byte_lengths_are_those_of_the_decoded_text(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "the th\u00e9orem of the thing, \n\tfor the na\u00efve: \u00e9t\u00e9; " * 20
    tokenizer.train_from_iterator([text], trainer)
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    lengths = token_byte_lengths(path)
    assert lengths[tokenizer.encode(text).ids].sum() == len(text.encode())
    assert lengths[tokenizer.token_to_id("<|endoftext|>")] == 0


def test_a_foreign_tokenizer_is_named(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"model": {"type": "Unigram"}}))
    with pytest.raises(CorruptDataError, match="byte-level BPE"):
        token_byte_lengths(path)


def test_generation_is_deterministic_and_outlives_the_context() -> None:
    model, _ = build(BASE)

    def tokens(sampling: Sampling) -> list[int]:
        return list(generate_tokens(model, [1, 2], max_new_tokens=40, sampling=sampling))

    assert tokens(Sampling(seed=3)) == tokens(Sampling(seed=3)) != tokens(Sampling(seed=4))
    assert len(tokens(Sampling())) == 40
    greedy = tokens(Sampling(temperature=0))
    assert (
        next(
            generate_tokens(
                model, [1, 2, *greedy[:3]], max_new_tokens=1, sampling=Sampling(temperature=0)
            )
        )
        == greedy[3]
    )
    stopped = list(
        generate_tokens(
            model,
            [1, 2],
            max_new_tokens=9,
            sampling=Sampling(temperature=0),
            eos_token_id=greedy[0],
        )
    )
    assert stopped == []


PROMPTS = ([1, 2], [3, 4, 5, 6, 7, 8, 9], [10])


@pytest.mark.parametrize("is_prompt_prefix", [False, True])
def test_a_batch_says_what_each_prompt_says_alone(is_prompt_prefix: bool) -> None:
    """30 tokens outlive the window of 12, so rows forget at different steps."""
    model, _ = build(BASE)
    together: list[list[int]] = [[] for _ in PROMPTS]
    for new in generate_batch(
        model,
        PROMPTS,
        max_new_tokens=30,
        sampling=Sampling(seed=5),
        is_prompt_prefix=is_prompt_prefix,
    ):
        together[new.row].append(new.token)
    for row, prompt in enumerate(PROMPTS):
        alone = generate_tokens(
            model,
            prompt,
            max_new_tokens=30,
            sampling=Sampling(seed=5 + row),
            is_prompt_prefix=is_prompt_prefix,
        )
        assert list(alone) == together[row]


@pytest.mark.parametrize("is_prompt_prefix", [False, True])
def test_logits_with_and_without_a_cache_are_the_same(is_prompt_prefix: bool) -> None:
    model, _ = build(BASE)
    contexts = [
        Context(model, PROMPTS, is_prompt_prefix=is_prompt_prefix, has_cache=has_cache)
        for has_cache in (True, False)
    ]
    with torch.inference_mode():
        for step in range(20):
            cached, plain = (context.next_logits() for context in contexts)
            torch.testing.assert_close(cached, plain, rtol=1e-4, atol=1e-5)
            for context in contexts:
                context.append([step, step + 1, step + 2])


def test_prompts_that_cannot_be_are_refused() -> None:
    model, _ = build(BASE)
    for prompts, said in (([[]], "empty"), ([], "empty"), ([[1], [61]], "token 61")):
        with pytest.raises(UsageError, match=said) as refused:
            list(generate_batch(model, prompts, max_new_tokens=1, sampling=Sampling()))
        assert refused.value.allowed and refused.value.remedy


def test_sampling_keeps_the_likeliest() -> None:
    logits_V = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()

    def ratios(**options: float) -> list[float]:
        return next_token_ratios(logits_V, Sampling(temperature=1.0, **options)).tolist()

    assert ratios(top_p=1.0) == pytest.approx([0.5, 0.25, 0.15, 0.1])
    assert ratios(top_p=0.6) == pytest.approx([2 / 3, 1 / 3, 0, 0])
    assert ratios(top_p=1.0, top_k=1) == [1, 0, 0, 0]
    for temperature in (0.0, 1e-40, 5e-324):
        cold = Sampling(temperature=temperature)
        assert next_token_ratios(logits_V, cold).tolist() == [1, 0, 0, 0]
    for seed in (-1, 2**63):
        with pytest.raises(UsageError, match="seed"):
            Sampling(seed=seed)
    with pytest.raises(UsageError):
        Sampling(top_p=0.0)


def test_losses_beyond_a_float_are_no_number_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    result = EvalResult(total_nats=1e6, num_tokens=10, num_bytes=0)
    print_json({"perplexity": result.perplexity, "bits_per_byte": [result.bits_per_byte, 1.5]})
    assert json.loads(capsys.readouterr().out) == {
        "perplexity": None,
        "bits_per_byte": [None, 1.5],
    }


def test_streamed_pieces_are_the_text_of_all_tokens() -> None:
    """As with Metaspace, where the first word loses its space."""

    def decode(tokens: list[int]) -> str:
        return bytes(tokens).decode(errors="replace").removeprefix(" ")

    tokens = list(" ab \u00e9 c".encode())
    for end in (len(tokens), len(tokens) - 3):
        growing = GrowingText(decode)
        pieces = [growing.add(token) for token in tokens[:end]]
        assert "".join(pieces) + growing.end() == decode(tokens[:end])
        assert "\ufffd" not in "".join(pieces)


def test_prompts_that_are_no_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="UTF-8"):
        _read_prompts(["a\udce9"], None)
    (tmp_path / "p").write_bytes("a\u2028b\r\n\nc".encode())
    assert _read_prompts([], tmp_path / "p") == ["a\u2028b", "c"]
