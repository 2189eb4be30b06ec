"""Which run `up` works on: a new one, an unfinished one to resume, or a finished one that it
refuses to touch.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coordinator.cli.spec_options import build_spec
from coordinator.corpus.build import (
    BuildProgress,
    BuildStage,
    build_corpus,
    check_corpus_fits,
    verify_dataset,
)
from coordinator.corpus.tokenizer import DEFAULT_VOCAB_SIZE
from coordinator.operations.admin import create_run
from coordinator.operations.requests_admin import CreateRunRequest
from coordinator.store.sqlite import SqliteStore, has_store
from protos.contract.chunk_format import MANIFEST_FILE, Manifest, token_dtype_for
from protos.contract.digest import canonical_json
from protos.contract.errors import UsageError
from protos.contract.run_spec import (
    Objective,
    RunSpec,
    ScheduleSpec,
    StrategySpec,
    floor_to_windows,
)
from protos.contract.telemetry import RunState

if TYPE_CHECKING:
    from coordinator.app import Coordinator

DEFAULT_CORPUS = ("stdlib:",)
DEFAULT_BUDGET_TOKENS = 1_250_000
"""Reaches about 1.8 bits per byte on the embedded corpus in about two minutes of two cores."""
EVAL_TOKENS = 32_768
"""Held-out tokens of an evaluation during the run; the final one takes all."""
MIN_OUTER_STEPS = 24
"""A smaller budget gets a smaller batch, so that even a short run makes some updates."""
STORE_FILE = "store.sqlite3"
SPEC_FILE = "run_spec.json"
FLAGS_FILE = "up_flags.json"
SUMMARY_FILE = "summary.json"
_FRESH_REMOVES = (
    STORE_FILE, f"{STORE_FILE}-wal", f"{STORE_FILE}-shm", "coordinator.json", SUMMARY_FILE,
    SPEC_FILE,
    FLAGS_FILE, "checkpoints", "export", "credits.json", "peers",
)  # fmt: skip
"""What --fresh removes; datasets, keys and step plans stay: nothing is built or measured again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunChoice:
    """run_id "" means: create one."""

    run_id: str
    dataset_dir: str
    reason: str
    spec: bytes = b""
    """Of the run that is resumed."""
    is_trained: bool = False
    """True if only the results are missing: the budget is credited, the summary was not written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedRun:
    """A dataset on disk, and the spec of the run to create (None when one is resumed)."""

    dataset_dir: Path
    relative_dataset_dir: str
    spec: RunSpec | None
    num_peers: int
    say: Callable[[str], None]

    async def create(self, coordinator: "Coordinator") -> str:
        """Create the run and return its id."""
        assert self.spec is not None
        request = CreateRunRequest(
            run_id="",
            spec=self.spec.to_wire(),
            dataset_dir=self.relative_dataset_dir,
            manifest=(self.dataset_dir / MANIFEST_FILE).read_bytes(),
            min_peers=self.num_peers,
        )
        response = await coordinator.perform(create_run, request)
        self.say(f"run {response.run_id}: {response.reason}")
        return response.run_id


def clear_data_dir(data_dir: Path) -> None:
    """Remove the run in a data directory that nobody uses. Raises MachineError if it is in use,
    UsageError if it is none.
    """
    if not data_dir.exists():
        return
    if not has_store(data_dir) and any(data_dir.iterdir()):
        raise UsageError(
            f"--fresh: {data_dir} is no data directory of Muster (no {STORE_FILE} in it)",
            allowed="a directory that `up` or `serve` made, or an empty one",
            remedy="name another --data-dir",
        )
    SqliteStore.open(data_dir).close()  # raises if a coordinator holds the lock
    for name in _FRESH_REMOVES:
        path = data_dir / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def choose_run(data_dir: Path, given_by_flag: Mapping[str, Any]) -> RunChoice:
    """Look at the newest run in the data directory.

    `given_by_flag` holds the flags of this call that say what is trained. Raises UsageError for a
    finished run, and for flags that differ from those that the run was created with.
    """
    if not has_store(data_dir):
        return RunChoice(run_id="", dataset_dir="", reason="a new data directory")
    store = SqliteStore.open(data_dir)
    try:
        with store.read() as tx:
            runs = sorted(tx.runs(), key=lambda run: run.create_unix_ms)
    finally:
        store.close()
    if not runs:
        return RunChoice(run_id="", dataset_dir="", reason="no run yet")
    run = runs[-1]
    has_summary = (data_dir / SUMMARY_FILE).exists()
    is_trained = run.state == RunState.FINISHED and not has_summary
    if run.state in (RunState.FINISHED, RunState.STOPPED) and not is_trained:
        raise UsageError(
            f"run {run.run_id} in {data_dir} is {run.state}",
            allowed="`up` starts a new run or resumes an unfinished one",
            remedy="name another --data-dir, or start over in this one with --fresh",
        )
    created_by_flag = _load_flags(data_dir)
    other = [flag for flag, value in given_by_flag.items() if created_by_flag.get(flag) != value]
    if other:
        raise UsageError(
            f"run {run.run_id} in {data_dir} is unfinished and was created with other values of "
            f"{', '.join(other)}",
            allowed="resuming with the same values, or without these flags",
            remedy="leave them out, name another --data-dir, or start over with --fresh",
        )
    return RunChoice(
        run_id=run.run_id,
        dataset_dir=run.dataset_dir,
        spec=run.spec,
        reason="only its summary is missing" if is_trained else f"it is {run.state}",
        is_trained=is_trained,
    )


def save_flags(data_dir: Path, given_by_flag: Mapping[str, Any]) -> None:
    """Remember with which flags a run is created, so that the same command resumes it."""
    (data_dir / FLAGS_FILE).write_bytes(canonical_json(dict(given_by_flag)))


def _load_flags(data_dir: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((data_dir / FLAGS_FILE).read_bytes()))
    except (OSError, ValueError):
        return {}


def prepare_run(
    choice: RunChoice,
    *,
    data_dir: Path,
    sources: Sequence[str],
    model: str | None,
    settings: Sequence[str],
    budget_tokens: int | None,
    seed: int | None,
    num_peers: int,
    say: Callable[[str], None],
) -> PreparedRun:
    """Build or find the dataset and make the spec. Raises what build_corpus and build_spec
    raise.
    """
    if choice.run_id:
        dataset_dir = (data_dir / choice.dataset_dir).absolute()
        verify_dataset(dataset_dir)
        (data_dir / SPEC_FILE).write_bytes(choice.spec)
        return PreparedRun(
            dataset_dir=dataset_dir,
            relative_dataset_dir=choice.dataset_dir,
            spec=None,
            num_peers=num_peers,
            say=say,
        )
    relative_dir = Path("datasets") / "up"
    dataset_dir = (data_dir / relative_dir).absolute()
    manifest = build_corpus(
        tuple(sources) or DEFAULT_CORPUS, dataset_dir, seed=seed or 0, on_progress=_progress(say)
    )
    spec = up_spec(manifest, model=model, settings=settings, budget_tokens=budget_tokens, seed=seed)
    check_corpus_fits(
        manifest,
        seq_len=spec.model.seq_len,
        global_batch_tokens=spec.strategy.global_batch_tokens,
    )
    (data_dir / SPEC_FILE).write_bytes(spec.to_wire())
    return PreparedRun(
        dataset_dir=dataset_dir,
        relative_dataset_dir=str(relative_dir),
        spec=spec,
        num_peers=num_peers,
        say=say,
    )


def check_wishes(
    *, model: str | None, settings: Sequence[str], budget_tokens: int | None, seed: int | None
) -> None:
    """Raise UsageError for what no corpus could make right: told before one is built, not after."""
    corpus = Manifest(
        vocab_size=DEFAULT_VOCAB_SIZE,
        eos_token_id=0,
        token_dtype=token_dtype_for(DEFAULT_VOCAB_SIZE),
        tokenizer_digest="0" * 64,
        chunk_bytes=1,
        seed=0,
        sources=(),
        training_chunks=(),
        heldout_chunks=(),
    )
    of_corpus = ("data.dataset_id=", "model.vocab_size=")
    spec = up_spec(
        corpus,
        model=model,
        settings=[setting for setting in settings if not setting.startswith(of_corpus)],
        budget_tokens=budget_tokens,
        seed=seed,
    )
    if spec.objective.name == Objective.ANSWERS:
        raise UsageError(
            f"objective.name = {Objective.ANSWERS}",
            allowed="objectives over running text, which is what `up` builds its dataset of",
            remedy="build one with `corpus build FILE.jsonl --answers SEQ_LEN --tokenizer FILE "
            "--eos-token-id N --out DIR`, then `run create --dataset DIR "
            f"--set objective.name={Objective.ANSWERS}`",
        )


def up_spec(
    manifest: Manifest,
    *,
    model: str | None,
    settings: Sequence[str] = (),
    budget_tokens: int | None,
    seed: int | None,
) -> RunSpec:
    """Spec of `up`'s run: the defaults, with batch and warm-up scaled down for a small budget;
    `settings` come last and win. Raises UsageError.
    """
    budget = DEFAULT_BUDGET_TOKENS if budget_tokens is None else budget_tokens
    models = () if model is None else (model,)
    scaled = [f"data.eval_tokens={EVAL_TOKENS}"]
    wished = build_spec(manifest, model=models, settings=settings, budget_tokens=budget, seed=seed)
    seq_len = wished.model.seq_len
    batch_tokens = floor_to_windows(budget // MIN_OUTER_STEPS, seq_len)
    if batch_tokens < StrategySpec().global_batch_tokens:
        scaled.append(f"strategy.global_batch_tokens={max(seq_len, batch_tokens)}")
    if budget < 10 * ScheduleSpec().lr_warmup_tokens:
        scaled.append(f"schedule.lr_warmup_tokens={budget // 10}")
    return build_spec(
        manifest, model=models, settings=(*scaled, *settings), budget_tokens=budget, seed=seed
    )


def _progress(say: Callable[[str], None]) -> Callable[[BuildProgress], None]:
    shown: set[BuildStage] = set()

    def on_progress(progress: BuildProgress) -> None:
        if progress.stage not in shown:
            shown.add(progress.stage)
            say(f"corpus: {progress.stage.lower().replace('_', ' ')} {progress.detail}".rstrip())

    return on_progress
