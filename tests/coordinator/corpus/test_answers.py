"""Datasets of prompts and answers: what is in the windows, and what is refused before a file is
written.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from coordinator.corpus import answers
from coordinator.corpus.build import BuildProgress, BuildStage, build_corpus, verify_dataset
from coordinator.corpus.chunks import load_chunks
from coordinator.corpus.tokenizer import GivenTokenizer, train_tokenizer
from protos.contract.answer_records import Row, parse_rows
from protos.contract.chunk_format import Manifest, token_bytes_table
from protos.contract.errors import UsageError
from tests.coordinator.corpus.texts import made_up_text

SEQ_LEN = 32
TOKENIZER = GivenTokenizer(
    tokenizer_json=train_tokenizer([made_up_text(1, num_words=50)], vocab_size=280), eos_token_id=0
)
ROWS = [{"prompt": f"{n}+{n} =", "answer": f" {2 * n}" * (1 + n % 3)} for n in range(200)]


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def build(path: Path, out_dir: Path, **options: Any) -> Manifest:
    values = {"answer_seq_len": SEQ_LEN, "given_tokenizer": TOKENIZER, "chunk_bytes": 1_024}
    return build_corpus([str(path)], out_dir, **(values | options))


def test_every_record_is_in_one_window_of_one_split(tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = build(write_rows(tmp_path / "d.jsonl", ROWS), out, heldout_ratio=0.1)
    assert verify_dataset(out) == manifest and manifest.answer_seq_len == SEQ_LEN
    table = token_bytes_table(TOKENIZER.tokenizer_json)
    sizes, back = [], []
    for is_heldout in (False, True):
        for chunk in load_chunks(out, manifest, is_heldout=is_heldout):
            assert chunk.size % SEQ_LEN == 1 and chunk[-1] == 0
            for begin in range(0, chunk.size - 1, SEQ_LEN):
                window = chunk[begin : begin + SEQ_LEN + 1].tolist()
                assert window[0] == 0
                text = b"".join(table[token] or b"\0" for token in window[1:])
                parts = text.decode().split("\0")
                back += [pair for pair in zip(parts[::2], parts[1::2], strict=False) if pair[1]]
        sizes.append(len(back))
    assert back == [(row["prompt"], row["answer"]) for row in ROWS]
    assert sizes[0] in (179, 180, 181), "the last tenth of the text is held out"
    assert len(manifest.training_chunks) > 1
    again = build(tmp_path / "d.jsonl", tmp_path / "again", heldout_ratio=0.1)
    assert again.dataset_id == manifest.dataset_id


def test_progress_is_told_while_records_are_encoded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In slices, and none is called training a tokenizer; the windows are those of one slice."""
    path = write_rows(tmp_path / "d.jsonl", ROWS)
    expected = build(path, tmp_path / "whole")
    monkeypatch.setattr(answers, "_ROWS_AT_ONCE", 50)
    texts: list[str] = []
    seen: list[BuildProgress] = []

    def parse_and_count(text: str, *, keys: tuple[str, str], where: object) -> list[Row]:
        texts.append(text)
        return parse_rows(text, keys=keys, where=where)

    monkeypatch.setattr(answers, "parse_rows", parse_and_count)
    assert build(path, tmp_path / "sliced", on_progress=seen.append) == expected
    assert len(texts) == 1
    ratios = [p.done_ratio for p in seen if p.stage is BuildStage.ANSWERS]
    assert ratios == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert all("1 documents" in p.detail for p in seen if p.stage is BuildStage.ANSWERS)
    assert BuildStage.TOKENIZER not in [p.stage for p in seen]


def test_a_bad_line_of_any_file_is_told_before_anything_is_encoded(tmp_path: Path) -> None:
    folder = tmp_path / "records"
    folder.mkdir()
    for number in range(4):
        write_rows(folder / f"{number}.jsonl", [*ROWS, {"prompt": f"file {number}", "answer": "a"}])
    for number in range(4):
        path = folder / f"{number}.jsonl"
        good = path.read_text()
        path.write_text(good + '{"prompt": "cut\n')
        seen: list[BuildProgress] = []
        with pytest.raises(UsageError, match=f"{path.name}, line 202: not JSON"):
            build(folder, tmp_path / "out", on_progress=seen.append)
        assert {p.done_ratio for p in seen} == {0.0}
        path.write_text(good)


def test_a_long_window_gets_a_chunk_that_holds_it(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "d.jsonl", ROWS)
    manifest = build(path, tmp_path / "out", chunk_bytes=None, answer_seq_len=40_000)
    assert [chunk.num_tokens for chunk in manifest.training_chunks] == [40_001]


def test_special_tokens_count_as_in_finetune_but_not_the_end(tmp_path: Path) -> None:
    """A chat layout's tokens are its tokens; the end inside a record would be taken for its end."""
    plain = json.loads(TOKENIZER.tokenizer_json)
    number = 1 + max(plain["model"]["vocab"].values())
    plain["added_tokens"].append(plain["added_tokens"][0] | {"id": number, "content": "<|user|>"})
    given = GivenTokenizer(tokenizer_json=json.dumps(plain).encode(), eos_token_id=0)
    rows = [{"prompt": "<|user|>" + row["prompt"], "answer": row["answer"]} for row in ROWS]
    path = write_rows(tmp_path / "d.jsonl", rows)
    manifest = build(path, tmp_path / "out", given_tokenizer=given)
    chunks = load_chunks(tmp_path / "out", manifest, is_heldout=False)
    assert chunks[0][1] == number == manifest.vocab_size - 1
    write_rows(path, [*rows, {"prompt": "a<|endoftext|>", "answer": "b"}])
    with pytest.raises(UsageError, match="line 201: token 0 inside"):
        build(path, tmp_path / "out", given_tokenizer=given)


@pytest.mark.parametrize(
    ("rows", "options", "said"),
    [
        ([*ROWS, {"prompt": "a"}], {}, "line 201: no key answer"),
        ([*ROWS, {"prompt": "a", "answer": ""}], {}, "line 201.*empty answer"),
        ([*ROWS, "text"], {}, "line 201"),
        ([*ROWS, {"prompt": "ab" * 40, "answer": "c"}], {}, "line 201.*1 of 201 .* too long"),
        (ROWS, {"given_tokenizer": None}, "--tokenizer"),
        (ROWS, {"answer_seq_len": 3}, "--answers 3"),
        (ROWS, {"answer_seq_len": 512}, "--answers 512"),
        ([], {}, "no usable text"),
    ],
)
def test_refused_before_anything_is_built(
    tmp_path: Path, rows: list[Any], options: dict[str, Any], said: str
) -> None:
    out = tmp_path / "out"
    earlier = build(write_rows(tmp_path / "old.jsonl", ROWS), out)
    with pytest.raises(UsageError, match=said) as refused:
        build(write_rows(tmp_path / "d.jsonl", rows), out, **options)
    assert refused.value.allowed and refused.value.remedy
    assert verify_dataset(out) == earlier, "what was built before is still there"
