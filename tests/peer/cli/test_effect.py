"""Options that would change nothing are refused with what they need; a refused command leaves
nothing behind; output that nobody reads is no traceback.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from peer.checkpoint.hf_import import read_hf_config
from peer.checkpoint.target import check_target
from peer.cli.main import app
from protos.contract.errors import CorruptDataError, MachineError, UsageError
from tests.peer.train.test_finetune import write_model


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (("eval", "x", "text", "--in-context"), "TEXT and --in-context"),
        (("eval", "x", "--memorization", "--tasks", "a"), "--memorization and --tasks"),
        (("eval", "x", "text", "--eval-tokens", "5"), "--eval-tokens with TEXT"),
        (("eval", "x", "--few-shot", "2"), "--few-shot without --tasks"),
        (("eval", "x", "--limit", "2", "--task-folder", "."), "--limit and --task-folder without"),
        (("generate", "x", "a", "--temperature", "0", "--top-k", "4"), "--top-k with --temp"),
        (("finetune", "x", "out", "--data", "d", "--classify", "--lora", "2"), "--classify and"),
    ],
)
def test_options_without_effect_are_refused(arguments: tuple[str, ...], found: str) -> None:
    refusal = CliRunner().invoke(app, arguments).exception
    assert isinstance(refusal, UsageError) and refusal.found.startswith(found)
    assert refusal.allowed and refusal.remedy


def test_a_complete_folder_takes_no_spec_and_no_dataset(tmp_path: Path) -> None:
    folder = str(write_model(tmp_path / "in"))
    for arguments in (
        ("eval", folder, "--spec", "run.toml"),
        ("eval", folder, "--in-context", "--dataset", "d"),
        ("generate", folder, "a", "--dataset", "d"),
        ("export", folder, "out", "--spec", "run.toml"),
    ):
        refusal = CliRunner().invoke(app, arguments).exception
        assert isinstance(refusal, UsageError), arguments
        assert arguments[-2] in refusal.found and "own model and tokenizer" in refusal.found


def test_a_refused_command_leaves_no_folder(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    data = tmp_path / "data.jsonl"
    data.write_text("{}\n")
    model = str(write_model(tmp_path / "in"))
    arguments = ("finetune", model, str(out), "--data", str(data))
    assert isinstance(CliRunner().invoke(app, arguments).exception, UsageError)
    assert not out.parent.exists()
    with pytest.raises(MachineError, match="cannot write"):
        check_target(data / "out")
    with pytest.raises(UsageError, match="config.json, model.safetensors"):
        check_target(Path(model))


@pytest.mark.parametrize("name", ["notes.txt", ".git", "vocab.txt", "sub/deep.bin"])
def test_a_folder_with_anything_in_it_is_not_written_to(tmp_path: Path, name: str) -> None:
    model, out = str(write_model(tmp_path / "in")), tmp_path / "out"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text("mine")
    (tmp_path / "data.txt").write_text("some text")
    for arguments in (
        ("import", model, str(out)),
        ("finetune", model, str(out), "--data", str(tmp_path / "data.txt")),
    ):
        refusal = CliRunner().invoke(app, arguments).exception
        assert isinstance(refusal, UsageError) and name.split("/")[0] in refusal.found
    assert [p.read_text() for p in out.rglob("*") if p.is_file()] == ["mine"]
    check_target(tmp_path / "new")
    (tmp_path / "empty").mkdir()
    check_target(tmp_path / "empty")


def test_a_config_with_a_number_that_no_model_has_is_to_be_corrected_there(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "in")
    path = folder / "config.json"
    whole = path.read_text()
    path.write_text(whole.replace('"rms_norm_eps"', '"rms_norm_eps": 7, "_"'))
    with pytest.raises(CorruptDataError, match="norm_epsilon") as refusal:
        read_hf_config(folder)
    assert "config.json" in refusal.value.remedy and "run spec" not in str(refusal.value)
    path.write_text(whole.replace('"eos_token_id"', '"eos_token_id": [0, 1], "_"'))
    with pytest.raises(UsageError, match="muster-peer import FOLDER DIR --eos-token-id N"):
        read_hf_config(folder)


@pytest.mark.parametrize("redirection", ["2>&-", "2>&1 | head -c 1", ">&- 2>&-", "2>/dev/full"])
def test_output_that_nobody_reads_is_no_traceback(tmp_path: Path, redirection: str) -> None:
    command = f"{sys.executable} -m peer.cli.main status --home {tmp_path}/home {redirection}"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, timeout=60
    )
    assert "Traceback" not in done.stdout + done.stderr
    assert done.returncode in ((4,) if redirection.startswith(">&-") else (6, 141))
