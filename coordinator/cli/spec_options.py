"""From flags to a RunSpec: TOML file or defaults, then --model, then --set, then plain flags."""

import dataclasses
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coordinator.cli.initial import ImportedModel
from protos.contract.chunk_format import Manifest, num_windows
from protos.contract.errors import ErrorCode, MachineError, UsageError
from protos.contract.run_spec import (
    MODEL_PRESETS,
    ModelSpec,
    ObjectiveSpec,
    RunSpec,
    floor_to_windows,
    parse_fields,
    plain_fields,
    unknown_key_error,
)


def parse_model(texts: Sequence[str], *, vocab_size: int) -> ModelSpec:
    """Model of PRESET and key=value texts (commas separate several); its vocabulary is the corpus'.

    Raises UsageError.
    """
    values = plain_fields(MODEL_PRESETS["tiny"])
    for part in (part.strip() for text in texts for part in text.split(",")):
        name, separator, value = part.partition("=")
        if separator:
            values[name] = parse_value(value)
        elif part in MODEL_PRESETS:
            values = plain_fields(MODEL_PRESETS[part])
        else:
            raise UsageError(
                f"model {part!r}",
                allowed=f"{', '.join(MODEL_PRESETS)} or key=value such as d_model=128",
                remedy="correct --model",
            )
    return parse_fields(ModelSpec, values | {"vocab_size": vocab_size}, where="--model")


def parse_value(text: str) -> bool | int | float | str:
    """A TOML-like value: true, false, an integer, a number, or text."""
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def build_spec(
    manifest: Manifest,
    *,
    spec_path: Path | None = None,
    model: Sequence[str] = (),
    settings: Sequence[str] = (),
    budget_tokens: int | None = None,
    seed: int | None = None,
    initial: ImportedModel | None = None,
) -> RunSpec:
    """RunSpec over a dataset. Without a budget it is one pass over the training windows; `initial`
    brings its own model, of which only seq_len may be set.

    Raises UsageError for what a person can correct, unknown keys with the nearest match included.
    """
    plain = _read_toml(spec_path) if spec_path is not None else {}
    if initial is not None:
        _use_imported(plain, initial, model)
    _check_tables(plain)
    is_vocab_ours = bool(model) or "model" not in plain
    if is_vocab_ours:
        plain["model"] = plain_fields(parse_model(model, vocab_size=manifest.vocab_size))
    for setting in settings:
        _set_value(plain, setting)
    _check_tables(plain)
    if is_vocab_ours and plain["model"]["vocab_size"] == manifest.vocab_size:
        plain["model"]["vocab_size"] += _num_extra_tokens(plain)
    if seed is not None or "seed" not in plain:
        plain["seed"] = seed or 0
    data = plain.setdefault("data", {})
    if data.get("dataset_id", manifest.dataset_id) != manifest.dataset_id:
        raise UsageError(
            f"the spec names dataset {data['dataset_id'][:16]}...",
            allowed=f"{manifest.dataset_id[:16]}..., the dataset given",
            remedy="pass its --dataset, or leave data.dataset_id out",
        )
    data["dataset_id"] = manifest.dataset_id
    seq_len = _checked_seq_len(plain["model"])
    if budget_tokens is not None:
        plain["budget_tokens"] = budget_tokens
    elif "budget_tokens" not in plain:
        windows = sum(num_windows(chunk.num_tokens, seq_len) for chunk in manifest.training_chunks)
        plain["budget_tokens"] = windows * seq_len
    if isinstance(plain["budget_tokens"], int) and plain["budget_tokens"] >= seq_len:
        plain["budget_tokens"] = floor_to_windows(plain["budget_tokens"], seq_len)
    spec = parse_fields(RunSpec, plain, where="run spec")
    if initial is not None:
        initial.header.require_model(spec.model)
    return spec


def _use_imported(plain: dict[str, Any], initial: ImportedModel, model: Sequence[str]) -> None:
    """Model and digest of an imported model."""
    if model or "model" in plain:
        raise UsageError(
            "a model, and --init",
            allowed="one of them: an imported model has its own shape",
            remedy="leave --model and the spec's [model] out; --set model.seq_len=N is possible",
        )
    plain["model"] = plain_fields(initial.header.model)
    plain["initial_digest"] = initial.digest


def _check_tables(plain: dict[str, Any]) -> None:
    """Raise UsageError for a value where the spec has a table."""
    for spec_field in dataclasses.fields(RunSpec):
        value = plain.get(spec_field.name, {})
        if dataclasses.is_dataclass(spec_field.type) and not isinstance(value, dict):
            raise UsageError(
                f"run spec: {spec_field.name} = {value!r}",
                allowed=f"a table of keys, such as --set {spec_field.name}.KEY=VALUE",
                remedy=f"name a key of {spec_field.name}",
            )


def _num_extra_tokens(plain: dict[str, Any]) -> int:
    """Ids that the objective needs beside the tokenizer's."""
    objective = parse_fields(ObjectiveSpec, plain.get("objective", {}), where="run spec: objective")
    return objective.num_extra_tokens(_checked_seq_len(plain["model"]))


def _checked_seq_len(model: Any) -> int:
    return parse_fields(ModelSpec, model, where="run spec: model").seq_len


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MachineError(
            f"cannot read {path}: {error.strerror}",
            allowed="a file that this user may read",
            remedy="check the path",
            code=ErrorCode.PERMISSION_DENIED,
        ) from error
    except ValueError as error:
        raise UsageError(
            f"{path} is not TOML: {error}",
            allowed="key = value lines and [tables]",
            remedy="correct that place",
        ) from error


def _set_value(plain: dict[str, Any], setting: str) -> None:
    path, separator, value = setting.partition("=")
    *tables, name = path.split(".")
    if not separator or not name or len(tables) > 1:
        raise UsageError(
            f"--set {setting!r}",
            allowed="TABLE.KEY=VALUE",
            remedy="e.g. --set optimizer.peak_lr=0.002",
        )
    known = set(RunSpec.__dataclass_fields__)
    if (tables or [name])[0] not in known:
        raise unknown_key_error((tables or [name])[0], known, where="--set")
    table = plain
    for key in tables:
        table = table.setdefault(key, {})
    if not isinstance(table, dict):
        raise UsageError(
            f"--set {setting!r}", allowed="TABLE.KEY=VALUE", remedy="name a key of a table"
        )
    table[name] = parse_value(value)
