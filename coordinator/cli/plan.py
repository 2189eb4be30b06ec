"""`plan`: what to train with a pool, a number of FLOP or GPU hours, and why."""

import textwrap
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coordinator.cli.options import (
    DEFAULT_DATA_DIR,
    AsJson,
    DataDir,
    RunId,
    parse_duration_seconds,
    print_json,
)
from coordinator.cli.tables import Columns, Where, selection_of
from protos.contract.command_line import say
from protos.contract.errors import ErrorCode, MachineError, UsageError

if TYPE_CHECKING:
    from coordinator.scaling.columns import Selection
    from coordinator.scaling.plan_law import PlanLaw
    from coordinator.scaling.plan_types import Plan, PlanRequest

LIVE = "live"
ASSUMED_DEADLINE = "30d"
_INDENT = " " * 20
_POOL = Annotated[
    str, typer.Option("--pool", help="Pool file (TOML), or `live`: the peers of a running run.")
]
_FLOP = Annotated[float | None, typer.Option("--flop", help="Training compute.")]
_HOURS = Annotated[float | None, typer.Option("--gpu-hours", help="With --gpu or a speed.")]
_GPU = Annotated[str, typer.Option("--gpu", help="Name, e.g. h100, rtx4090.")]
_SPEED = Annotated[
    float | None, typer.Option("--flops-per-second", help="Measured training speed of one GPU.")
]
_PARAMS = Annotated[
    float | None, typer.Option("--params", help="A given N instead of a given compute.")
]
_DEADLINE = Annotated[
    str, typer.Option("--deadline", help="30d, 12h or a date such as 2030-01-31 (UTC).")
]
_SERVE = Annotated[
    float | None, typer.Option("--serve-tokens", help="Tokens that the model will serve.")
]
_UNIQUE = Annotated[
    float | None, typer.Option("--unique-tokens", help="Tokens of different text at hand.")
]
_DATASET = Annotated[
    Path | None,
    typer.Option("--dataset", help="Built dataset: gives text, vocabulary and id.", readable=False),
]
_OBSERVATIONS = Annotated[
    Path | None,
    typer.Option(
        "--observations", help="Table N,D,C,loss of own runs (CSV or JSON).", readable=False
    ),
]
_LAW = Annotated[str, typer.Option("--law", help="A published law. [default: chinchilla]")]
_VOCABULARY = Annotated[
    int | None, typer.Option("--vocab-size", help="Without --dataset; default 32768.")
]
_SEQ_LEN = Annotated[int, typer.Option("--seq-len", help="Context in tokens.")]
_STRATEGY = Annotated[
    str, typer.Option("--strategy", help="auto (what this version runs), sync or diloco.")
]
_UNCERTAINTY = Annotated[
    float | None, typer.Option("--uncertainty", help="Standard deviation of ln C.")
]
_BYTES = Annotated[
    float, typer.Option("--bytes-per-parameter", help="Training memory of one parameter.")
]
_LR_FROM = Annotated[
    str, typer.Option("--lr-from", help="LR@WIDTH: best rate of a trial, transferred (mu-style).")
]
_FORCE = Annotated[
    bool,
    typer.Option(
        "--force-extrapolation",
        help="Beyond x1000 of the law's largest compute, or x100,000 below its smallest.",
    ),
]
_WRITE = Annotated[
    Path | None,
    typer.Option("--write-spec", help="Write the run spec for `run create --spec`."),
]
_SEED = Annotated[int, typer.Option("--seed", help="Of the spec.")]
_EXPLAIN = Annotated[bool, typer.Option("--explain", help="What the laws say, and what not.")]


def plan(
    pool: _POOL = "",
    flop: _FLOP = None,
    gpu_hours: _HOURS = None,
    gpu: _GPU = "",
    flops_per_second: _SPEED = None,
    params: _PARAMS = None,
    deadline: _DEADLINE = "",
    serve_tokens: _SERVE = None,
    unique_tokens: _UNIQUE = None,
    dataset: _DATASET = None,
    observations: _OBSERVATIONS = None,
    columns: Columns = None,
    where: Where = None,
    law: _LAW = "",
    vocab_size: _VOCABULARY = None,
    seq_len: _SEQ_LEN = 1024,
    strategy: _STRATEGY = "auto",
    uncertainty: _UNCERTAINTY = None,
    bytes_per_parameter: _BYTES = 16.0,
    lr_from: _LR_FROM = "",
    is_forced: _FORCE = False,
    write_spec: _WRITE = None,
    seed: _SEED = 0,
    run_id: RunId = "",
    data_dir: DataDir = DEFAULT_DATA_DIR,
    is_explaining: _EXPLAIN = False,
    is_json: AsJson = False,
) -> None:
    """Model, tokens, batch, strategy and time for a pool or a compute, each with its reason."""
    if is_explaining:
        typer.echo(_explanation(), nl=False)
        return
    from coordinator.scaling.planner import plan as make_plan

    numbers = {
        "--flop": (flop, 1e6, 1e32),
        "--gpu-hours": (gpu_hours, 1e-6, 1e15),
        "--flops-per-second": (flops_per_second, 1e3, 1e18),
        "--params": (params, 1e3, 1e16),
        "--serve-tokens": (serve_tokens, 0.0, 1e20),
        "--unique-tokens": (unique_tokens, 1.0, 1e20),
        "--vocab-size": (vocab_size, 2, 2**24),
        "--seq-len": (seq_len, 2, 2**24),
        "--uncertainty": (uncertainty, 0.0, 5.0),
        "--bytes-per-parameter": (bytes_per_parameter, 2.0, 1000.0),
    }
    _check_numbers(numbers)
    if observations is None and (columns or where):
        raise UsageError(
            "--column or --where without --observations",
            allowed="options that change what the command does",
            remedy="name the table with --observations FILE, or leave them out",
        )
    wishes: dict[str, Any] = {
        "law": _law(law, observations, seed=seed, selection=selection_of(columns, where)),
        "seq_len": seq_len,
        "bytes_per_parameter": bytes_per_parameter,
        "serve_tokens": serve_tokens or 0.0,
        "compute_log_std": uncertainty,
        "is_extrapolation_forced": is_forced,
        "params_n": params,
        **_text(dataset, unique_tokens, vocab_size, seq_len),
        **_strategies(strategy),
        **_tuned(lr_from),
    }
    dataset_id = wishes.pop("dataset_id")
    request = _request(
        wishes,
        sources={"--pool": pool, "--flop": flop, "--gpu-hours": gpu_hours, "--params": params},
        gpu=gpu,
        flops_per_second=flops_per_second,
        deadline=deadline,
        run_id=run_id,
        data_dir=data_dir,
    )
    found = make_plan(request)
    _show(found, dataset_id=dataset_id, seed=seed, write_spec=write_spec, is_json=is_json)


def _check_numbers(numbers: dict[str, tuple[float | None, float, float]]) -> None:
    for name, (value, lowest, highest) in numbers.items():
        if value is not None and not lowest <= value <= highest:  # NaN fails too
            raise UsageError(
                f"{name} {value:g}", allowed=f"{lowest:g} to {highest:g}", remedy="correct it"
            )


def _request(
    wishes: dict[str, Any],
    *,
    sources: dict[str, Any],
    gpu: str,
    flops_per_second: float | None,
    deadline: str,
    run_id: str,
    data_dir: Path,
) -> "PlanRequest":
    """Exactly one source of compute, except that a pool may be given the FLOP to deliver."""
    from coordinator.scaling.plan_types import PlanRequest

    given = [name for name, value in sources.items() if value not in (None, "")]
    if not given:
        found = "neither a pool, nor compute, nor N is given"
        if wishes["serve_tokens"]:
            found = "--serve-tokens with nothing that fixes N"
        raise UsageError(
            found,
            allowed="one of " + ", ".join(sources),
            remedy="e.g. --pool pool.toml --deadline 30d, or --flop 1e20",
        )
    if len(given) > 1 and given != ["--pool", "--flop"]:
        raise UsageError(
            " and ".join(given) + " at once",
            allowed="one of " + ", ".join(sources) + ", or --pool with --flop",
            remedy="leave one out",
        )
    if (gpu or flops_per_second is not None) and sources["--gpu-hours"] is None:
        raise UsageError(
            "a GPU without hours", allowed="--gpu-hours H", remedy="add it, or leave the GPU out"
        )
    seconds = _seconds_until(deadline)
    if sources["--gpu-hours"] is not None:
        from coordinator.scaling.gpus import compute_of_gpu_hours

        hours = compute_of_gpu_hours(
            sources["--gpu-hours"], gpu=gpu, flop_per_second=flops_per_second
        )
        wishes |= {"compute_flop": hours.compute_flop, "compute_reason": hours.reason}
        if wishes["compute_log_std"] is None:
            wishes["compute_log_std"] = hours.compute_log_std
    if sources["--flop"] is not None:
        wishes["compute_flop"] = sources["--flop"]
    if sources["--pool"]:
        wishes["pool"] = _pool(sources["--pool"], run_id=run_id, data_dir=data_dir)
        if seconds is None and sources["--flop"] is None:
            say(f"no --deadline was given: {ASSUMED_DEADLINE} are assumed")
            seconds = parse_duration_seconds(ASSUMED_DEADLINE)
    return PlanRequest(**wishes, seconds=seconds)


def _seconds_until(deadline: str) -> float | None:
    """Seconds from now to a duration or a date; None for "". Raises UsageError."""
    if not deadline:
        return None
    try:
        when = datetime.fromisoformat(deadline)
    except ValueError:
        try:
            seconds = parse_duration_seconds(deadline)
        except UsageError:
            seconds = 0.0
        if seconds <= 0:
            raise UsageError(
                f"--deadline {deadline}",
                allowed="90s, 30m, 12h, 30d or a date such as 2030-01-31",
                remedy="name an end in one of these forms",
            ) from None
        return seconds
    if when.tzinfo is None:
        when = when.replace(tzinfo=UTC)
    now = datetime.now(UTC)
    seconds = (when - now).total_seconds()
    if seconds <= 0:
        raise UsageError(
            f"--deadline {deadline} is in the past (it is {now:%Y-%m-%d %H:%M} UTC)",
            allowed="a date to come, or a duration such as 30d",
            remedy="correct it",
        )
    return seconds


def _pool(text: str, *, run_id: str, data_dir: Path) -> Any:
    from coordinator.scaling.pool import pool_from_toml

    if text != LIVE:
        return pool_from_toml(_read_text(Path(text)), where=f"pool file {text}")
    from coordinator.cli.perform import look
    from coordinator.operations.pool import live_pool
    from coordinator.operations.requests_admin import PoolRequest

    found = look(data_dir, live_pool, PoolRequest(run_id=run_id))
    for sentence in found.notes:
        say(sentence)
    return found.pool


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path} is not UTF-8 text", allowed="a text file", remedy="pass a TOML or CSV file"
        ) from error
    except OSError as error:
        raise UsageError(
            f"cannot read {path}: {error.strerror}",
            allowed="a file that this user may read",
            remedy="check the path",
        ) from error


def _law(name: str, observations: Path | None, *, seed: int, selection: "Selection") -> "PlanLaw":
    if observations is None:
        from coordinator.scaling.plan_law import DEFAULT_LAW, published_law

        return published_law(name or DEFAULT_LAW)
    if name:
        raise UsageError(
            "--law and --observations at once",
            allowed="a published law, or one fitted on your own runs",
            remedy="leave one out",
        )
    from coordinator.cli.tables import read_observations
    from coordinator.scaling.plan_observed import observed_law

    table = read_observations(observations, selection)
    return observed_law(table, name=observations.name, seed=seed)


def _text(
    dataset: Path | None, unique_tokens: float | None, vocab_size: int | None, seq_len: int
) -> dict[str, Any]:
    """Vocabulary, unique tokens and dataset id."""
    if dataset is None:
        found: dict[str, Any] = {"vocab_size": vocab_size or 32_768, "dataset_id": ""}
        return found if unique_tokens is None else found | {"unique_tokens": unique_tokens}
    for name, value in (("--unique-tokens", unique_tokens), ("--vocab-size", vocab_size)):
        if value is not None:
            raise UsageError(
                f"{name} beside --dataset, which says it itself",
                allowed="one of them",
                remedy=f"leave {name} out",
            )
    from coordinator.corpus.build import check_corpus_fits, load_manifest
    from protos.contract.chunk_format import num_windows

    manifest = load_manifest(dataset)
    if manifest.answer_seq_len:
        raise UsageError(
            f"{dataset} holds prompts and answers",
            allowed="datasets of running text: the laws count every token as one to be predicted",
            remedy="plan with --unique-tokens; to go on from a model with answers, `run create "
            "--init`",
        )
    check_corpus_fits(manifest, seq_len=seq_len, global_batch_tokens=seq_len)
    windows = sum(num_windows(chunk.num_tokens, seq_len) for chunk in manifest.training_chunks)
    tokens = windows * seq_len
    return {
        "vocab_size": manifest.vocab_size,
        "unique_tokens": float(tokens),
        "text_reason": f"{tokens:,} training tokens of the dataset in windows of {seq_len}",
        "dataset_id": manifest.dataset_id,
    }


def _strategies(wanted: str) -> dict[str, Any]:
    from coordinator.scaling.links import Codec
    from protos.contract.codecs_wire import CODEC_NAMES, codec_named
    from protos.contract.run_spec import STRATEGIES

    allowed = {"auto": STRATEGIES, "sync": ("sync",), "diloco": ("diloco",)}
    if wanted not in allowed:
        raise UsageError(
            f"--strategy {wanted}", allowed=", ".join(allowed), remedy="name one of them"
        )
    values = 2**20

    def codec(name: str) -> Codec:
        layout = codec_named(name)
        return Codec(
            name=name,
            bytes_per_value=layout.encoded_bytes(values) / values,
            result_bytes_per_value=lambda num_parts: (
                layout.for_result(num_parts).encoded_bytes(values) / values
            ),
        )

    codecs = tuple(codec(name) for name in CODEC_NAMES)
    return {"strategies": allowed[wanted], "codecs": codecs}


def _tuned(text: str) -> dict[str, Any]:
    if not text:
        return {}
    rate, separator, width = text.partition("@")
    try:
        tuned = {"tuned_lr": float(rate), "tuned_width": int(width)}
    except ValueError:
        tuned = {"tuned_lr": 0.0, "tuned_width": 0}
    if not separator or not 0 < tuned["tuned_lr"] < 10 or tuned["tuned_width"] < 1:
        raise UsageError(
            f"--lr-from {text!r}",
            allowed="LR@WIDTH, a learning rate and the width of the trial it was best in",
            remedy="e.g. --lr-from 5e-3@128",
        )
    return tuned


def _show(
    found: "Plan", *, dataset_id: str, seed: int, write_spec: Path | None, is_json: bool
) -> None:
    from coordinator.scaling.plan_spec import run_spec, spec_toml
    from protos.contract.run_spec import plain_fields

    spec, refusal = None, None
    try:
        spec = run_spec(found, dataset_id=dataset_id, seed=seed)
    except MachineError as error:
        if write_spec is not None:
            raise
        refusal = error
    if write_spec is not None and spec is not None:
        _write_new(write_spec, spec_toml(spec, found))
    if is_json:
        from coordinator.operations.plain import plain_from_response

        extra = {
            "spec": None if spec is None else plain_fields(spec),
            "spec_path": None if write_spec is None else str(write_spec),
            "spec_refusal": None if refusal is None else str(refusal),
        }
        print_json(plain_from_response(found) | extra)
        return
    for choice in found.choices:
        typer.echo(f"{choice.name:18}  {choice.value}")
        typer.echo(
            textwrap.fill(choice.reason, 100, initial_indent=_INDENT, subsequent_indent=_INDENT)
        )
    for warning in found.warnings:
        say(f"warning: {warning}")
    if refusal is not None:
        say(f"warning: no run can be created from this plan: {refusal}")
    if write_spec is not None:
        say(f"wrote {write_spec}: muster-coordinator run create --dataset DIR --spec {write_spec}")


def _write_new(path: Path, text: str) -> None:
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise UsageError(
            f"{path} is there already", allowed="a new file", remedy="name another --write-spec"
        ) from error
    except OSError as error:
        raise MachineError(
            f"cannot write {path}: {error.strerror}",
            allowed="a file in a folder that this user may write to",
            remedy="name another --write-spec",
            code=ErrorCode.PERMISSION_DENIED,
        ) from error


def _explanation() -> str:
    from importlib.resources import files

    return files("coordinator.scaling").joinpath("EXPLAINED.md").read_text(encoding="utf-8")
