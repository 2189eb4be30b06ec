"""From flags to a RunSpec."""

from pathlib import Path
from typing import Any

import pytest

from coordinator.cli.options import parse_duration_seconds
from coordinator.cli.spec_options import build_spec, parse_model, parse_value
from coordinator.cli.up_run import check_wishes, up_spec
from protos.contract.errors import MachineError, UsageError
from protos.contract.run_spec import TINY_MODEL
from tests.coordinator.loopback import NUM_TRAINING_CHUNKS, tiny_spec, write_dataset


def test_model_texts() -> None:
    model = parse_model(["tiny,d_model=64", "num_layers=2"], vocab_size=300)
    assert (model.d_model, model.num_layers, model.vocab_size) == (64, 2, 300)
    assert parse_model([], vocab_size=TINY_MODEL.vocab_size) == TINY_MODEL
    with pytest.raises(UsageError, match="did you mean 'd_model'"):
        parse_model(["d_modle=64"], vocab_size=300)
    with pytest.raises(UsageError, match="model 'huge'"):
        parse_model(["huge"], vocab_size=300)


def test_values() -> None:
    assert [parse_value(text) for text in ("true", "3", "1e-3", "sync")] == [True, 3, 0.001, "sync"]


def test_spec_from_file_and_flags(tmp_path: Path) -> None:
    manifest = write_dataset(tmp_path / "dataset")
    path = tmp_path / "run.toml"
    path.write_text(tiny_spec(manifest).to_toml())
    settings = ("optimizer.peak_lr=0.5", "strategy.global_batch_tokens=16")
    spec = build_spec(manifest, spec_path=path, settings=settings, budget_tokens=99, seed=4)
    assert (spec.budget_tokens, spec.seed, spec.optimizer.peak_lr) == (96, 4, 0.5)
    assert spec.model == tiny_spec(manifest).model
    default = build_spec(
        manifest, model=["seq_len=8"], settings=["strategy.global_batch_tokens=64"]
    )
    assert default.budget_tokens == NUM_TRAINING_CHUNKS * 16 * 8, "one pass"
    assert default.model.vocab_size == manifest.vocab_size


def test_up_takes_settings_and_they_win(tmp_path: Path) -> None:
    manifest = write_dataset(tmp_path / "dataset")
    settings = ("strategy.name=diloco", "strategy.inner_batch_tokens=64", "data.eval_tokens=48")
    spec = up_spec(manifest, model="seq_len=8", settings=settings, budget_tokens=96, seed=None)
    assert (spec.strategy.name, spec.data.eval_tokens) == ("diloco", 48)
    with pytest.raises(UsageError, match="multiple of model.seq_len = 8"):
        settings = ("strategy.name=diloco", "strategy.inner_batch_tokens=63")
        up_spec(manifest, model="seq_len=8", settings=settings, budget_tokens=96, seed=None)


@pytest.mark.parametrize(
    "setting",
    [
        *(
            "peak_lr",
            "optimiser.peak_lr=1",
            "optimizer.peak=1",
            "a.b.c=1",
            "optimizer.peak_lr=fast",
        ),
        *("model=3", "data=3", "strategy=sync", "objective=prefix", "strategy.mix_ratio=nan"),
    ],
)
def test_bad_settings_are_refused(tmp_path: Path, setting: str) -> None:
    with pytest.raises(UsageError) as refusal:
        build_spec(write_dataset(tmp_path / "dataset"), settings=[setting])
    assert refusal.value.allowed and refusal.value.remedy


@pytest.mark.parametrize(
    ("wishes", "found"),
    [
        ({"budget_tokens": 1}, "budget_tokens = 1"),
        ({"settings": ["strategy.mix_ratio=nan"]}, "strategy: mix_ratio = nan"),
        ({"settings": ["strategy.outer_lr=inf"]}, "strategy: outer_lr = inf"),
        ({"settings": ["model=3"]}, "model = 3"),
        ({"model": "d_modle=3"}, "unknown key 'd_modle'"),
        ({"seed": -1}, "seed = -1"),
        ({"settings": ["objective.name=answers"]}, "objective.name = answers"),
        ({"budget_tokens": 512, "model": "seq_len=1024"}, "budget_tokens = 512"),
    ],
)
def test_up_refuses_before_it_builds_a_corpus(wishes: dict[str, Any], found: str) -> None:
    none: dict[str, Any] = {"model": None, "settings": (), "budget_tokens": None, "seed": None}
    with pytest.raises(UsageError) as refusal:
        check_wishes(**none | wishes)
    assert found in refusal.value.found
    assert refusal.value.allowed and refusal.value.remedy


def test_up_builds_a_corpus_for_what_may_fit_one() -> None:
    of_corpus = ["data.dataset_id=" + "ab" * 32, "model.vocab_size=300"]
    for settings in ([], ["objective.name=span"], of_corpus, ["strategy.name=diloco"]):
        check_wishes(model="seq_len=64", settings=settings, budget_tokens=None, seed=None)


def test_bad_files_are_refused(tmp_path: Path) -> None:
    manifest = write_dataset(tmp_path / "dataset")
    path = tmp_path / "run.toml"
    with pytest.raises(MachineError):
        build_spec(manifest, spec_path=path)
    path.write_text("seed = \n")
    with pytest.raises(UsageError, match="not TOML"):
        build_spec(manifest, spec_path=path)
    path.write_text(f'[data]\ndataset_id = "{"0" * 64}"\n')
    with pytest.raises(UsageError, match="names dataset"):
        build_spec(manifest, spec_path=path)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("30m", 1800), ("24h", 86_400), ("7d", 604_800), ("never", 0)],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "h", "0h", "-1h", "1.5h", "24", "1w"])
def test_bad_durations(text: str) -> None:
    with pytest.raises(UsageError):
        parse_duration_seconds(text)
