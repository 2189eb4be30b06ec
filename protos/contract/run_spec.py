"""What a run *is*: one frozen tree of plain values, the same for everybody, hashed.

Two forms: TOML for people, canonical JSON for the wire; `run_digest` is the SHA-256 of the latter.
Reading is strict: unknown keys are refused with the nearest match, missing ones by name, values by
type and range; integers serve as floats. A field that is added later has a default and is marked
ADDED_LATER: it is left out of the wire form while it has that default, so specs that are stored
keep their digest. What may change during a run (budget, roster, pause) is in
directives; `budget_tokens` here is what the run began with.
"""

import dataclasses
import difflib
import hashlib
import json
import math
import tomllib
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypeVar

from protos.contract.digest import canonical_json
from protos.contract.errors import UsageError
from protos.contract.model_shape import ModelShape, NormKind
from protos.contract.strategy_spec import ADDED_LATER, check_setting
from protos.contract.strategy_spec import STRATEGIES as STRATEGIES
from protos.contract.strategy_spec import StrategySpec as StrategySpec


class Objective(StrEnum):
    """What is predicted; see peer/model/objectives.py."""

    CAUSAL = "causal"
    PREFIX = "prefix"
    SPAN = "span"
    MASKED = "masked"
    ANSWERS = "answers"


NEXT_TOKEN_OBJECTIVES: tuple[str, ...] = (Objective.CAUSAL, Objective.ANSWERS)
"""Their models attend causally and predict the next token, so they generate and are exported."""
OBJECTIVES: tuple[str, ...] = tuple(Objective)
OPTIMIZERS: tuple[str, ...] = ("adamw", "muon", "adamw8bit")
MUON_MOMENTUM = 0.95
"""The default; Jordan et al. 2024."""
_DIGEST_TAG = b"muster run spec 1\n"
MIN_SPAN_SEQ_LEN = 16

_ALLOWED_BY_TYPE = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "text",
}

_Spec = TypeVar("_Spec")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Llama-family decoder (RMSNorm, RoPE, SwiGLU, GQA)."""

    vocab_size: int
    """Entries of the tokenizer."""
    d_model: int
    num_layers: int
    num_heads: int
    """Query heads."""
    num_kv_heads: int
    """Key/value heads; divides num_heads."""
    head_dim: int
    """Width of a head; even, for RoPE."""
    d_ff: int
    """Width of the gated MLP."""
    seq_len: int
    """Tokens of a window."""
    has_tied_embeddings: bool = True
    """True if the output head is the embedding matrix."""
    rope_theta: float = 10_000.0
    norm_epsilon: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("d_model", "num_layers", "num_heads", "num_kv_heads", "head_dim", "d_ff"):
            check_setting(
                getattr(self, name) >= 1, f"model.{name}", getattr(self, name), "at least 1"
            )
        check_setting(
            2 <= self.vocab_size < 2**32, "model.vocab_size", self.vocab_size, "2 to 4294967295"
        )
        check_setting(self.seq_len >= 2, "model.seq_len", self.seq_len, "at least 2")
        check_setting(self.head_dim % 2 == 0, "model.head_dim", self.head_dim, "an even number")
        divides = self.num_heads % self.num_kv_heads == 0
        check_setting(
            divides,
            "model.num_kv_heads",
            self.num_kv_heads,
            f"a divisor of num_heads = {self.num_heads}",
        )
        check_setting(self.rope_theta > 1, "model.rope_theta", self.rope_theta, "above 1")
        check_setting(
            0 < self.norm_epsilon < 1, "model.norm_epsilon", self.norm_epsilon, "between 0 and 1"
        )

    @classmethod
    def from_shape(cls, shape: ModelShape, **overrides: Any) -> "ModelSpec":
        """Spec of a Llama-family shape. Raises UsageError for other families."""
        is_llama = shape.norm_kind is NormKind.RMS and shape.has_gated_mlp
        if not is_llama or shape.has_biases or shape.has_learned_positions:
            raise UsageError(
                "a GPT-family shape", allowed="Llama-family models", remedy="choose another preset"
            )
        values = {
            f.name: getattr(shape, f.name)
            for f in dataclasses.fields(cls)
            if hasattr(shape, f.name)
        }
        return cls(**(values | overrides))


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSpec:
    """What turns gradients into steps: of the averaged gradient (sync), or of each inner step
    (diloco).
    """

    name: str = field(default="adamw", metadata=ADDED_LATER)
    """adamw; muon: hidden matrices by orthogonalised momentum, the rest by AdamW; adamw8bit: AdamW
    with moments of a byte. The latter two are for the inner steps of diloco only: they have no
    exact form that is the same on every CPU.
    """
    peak_lr: float = 4e-3
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    """Decoupled; applied to matrices only."""
    clip_norm: float = 1.0
    """Largest global norm of the averaged gradient."""
    muon_momentum: float = field(default=MUON_MOMENTUM, metadata=ADDED_LATER)
    """muon: of hidden matrices. Like beta2 it wants to remember the same number of tokens at every
    inner batch, so 0.98 rather than 0.95 at an eighth of the batch (ops/bench/strategies.md).
    """

    def __post_init__(self) -> None:
        check_setting(
            self.name in OPTIMIZERS, "optimizer.name", self.name, "one of " + ", ".join(OPTIMIZERS)
        )
        for name in ("peak_lr", "epsilon", "clip_norm"):
            check_setting(
                getattr(self, name) > 0, f"optimizer.{name}", getattr(self, name), "above 0"
            )
        for name in ("beta1", "beta2", "muon_momentum"):
            check_setting(
                0 <= getattr(self, name) < 1,
                f"optimizer.{name}",
                getattr(self, name),
                "0 <= value < 1",
            )
        check_setting(
            self.name == "muon" or self.muon_momentum == MUON_MOMENTUM,
            "optimizer.muon_momentum",
            self.muon_momentum,
            f"left out with optimizer.name = {self.name!r}; it belongs to muon",
        )
        check_setting(
            self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "at least 0"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleSpec:
    """Shape of the learning rate: linear warm-up, constant, cooldown 1 - sqrt."""

    lr_warmup_tokens: int = 32_768
    cooldown_ratio: float = 0.2
    """Share of the budget that the cooldown takes."""
    deadline_seconds: float = 0.0
    """From the first roster; the budget stretches and shrinks with what the pool can train until
    then, while the rate is constant. 0: the budget is fixed.
    """

    def __post_init__(self) -> None:
        check_setting(
            self.deadline_seconds >= 0,
            "schedule.deadline_seconds",
            self.deadline_seconds,
            "at least 0; 0 fixes the budget",
        )
        check_setting(
            self.lr_warmup_tokens >= 0,
            "schedule.lr_warmup_tokens",
            self.lr_warmup_tokens,
            "at least 0",
        )
        check_setting(
            0 <= self.cooldown_ratio <= 1, "schedule.cooldown_ratio", self.cooldown_ratio, "0 to 1"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSpec:
    """What is trained on."""

    dataset_id: str
    """Hex SHA-256 of the manifest's canonical bytes."""
    max_data_passes: int = 4
    """Most times that a source may be repeated."""
    eval_tokens: int = 0
    """Held-out tokens of an evaluation; 0 = all."""

    def __post_init__(self) -> None:
        is_digest = is_hex_digest(self.dataset_id)
        check_setting(is_digest, "data.dataset_id", self.dataset_id, "64 lower-case hex digits")
        check_setting(
            self.max_data_passes >= 1, "data.max_data_passes", self.max_data_passes, "at least 1"
        )
        check_setting(self.eval_tokens >= 0, "data.eval_tokens", self.eval_tokens, "at least 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveSpec:
    """What is predicted, and what attention may see."""

    name: str = Objective.CAUSAL
    corruption_ratio: float = 0.15
    """Share of a window's tokens that `span` and `masked` corrupt."""
    mean_span_tokens: float = 3.0
    """Mean length of a corrupted span of `span`."""
    has_document_mask: bool = False
    """True if no token attends across the end of a document; records of `answers` never do."""

    def __post_init__(self) -> None:
        allowed = "one of " + ", ".join(OBJECTIVES)
        check_setting(self.name in OBJECTIVES, "objective.name", self.name, allowed)
        check_setting(
            0 < self.corruption_ratio <= 0.5,
            "objective.corruption_ratio",
            self.corruption_ratio,
            "above 0, at most 0.5",
        )
        check_setting(
            self.mean_span_tokens >= 1,
            "objective.mean_span_tokens",
            self.mean_span_tokens,
            "at least 1",
        )

    def num_spans(self, seq_len: int) -> int:
        """Spans of a window of `span`; two positions of it go to each one's sentinels."""
        per_span = self.mean_span_tokens / self.corruption_ratio + 2
        return max(1, round(seq_len / per_span))

    def num_extra_tokens(self, seq_len: int) -> int:
        """Ids after the tokenizer's that the objective needs: sentinels, or the mask."""
        if self.name == Objective.SPAN:
            return self.num_spans(seq_len) + 1
        return 1 if self.name == Objective.MASKED else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SecuritySpec:
    """Defences beyond the protocol's own; none yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSpec:
    """The whole of a run."""

    seed: int
    """Decides initial values and the order of data."""
    budget_tokens: int
    """Tokens to be credited; whole windows."""
    initial_digest: str = field(default="", metadata=ADDED_LATER)
    """Hex SHA-256 of the imported model that the run starts from (contract/initial_file.py); empty:
    the seed gives the initial values.
    """
    model: ModelSpec
    objective: ObjectiveSpec = field(default_factory=ObjectiveSpec)
    optimizer: OptimizerSpec = field(default_factory=OptimizerSpec)
    schedule: ScheduleSpec = field(default_factory=ScheduleSpec)
    strategy: StrategySpec = field(default_factory=StrategySpec)
    data: DataSpec
    security: SecuritySpec = field(default_factory=SecuritySpec)

    def __post_init__(self) -> None:
        check_setting(0 <= self.seed < 2**63, "seed", self.seed, "0 to 2^63 - 1")
        check_setting(
            not self.initial_digest or is_hex_digest(self.initial_digest),
            "initial_digest",
            self.initial_digest,
            "empty, or 64 lower-case hex digits",
        )
        seq_len = self.model.seq_len
        check_setting(
            self.objective.name != Objective.SPAN or seq_len >= MIN_SPAN_SEQ_LEN,
            "model.seq_len",
            seq_len,
            f"at least {MIN_SPAN_SEQ_LEN} for the objective `span`",
        )
        is_whole = self.budget_tokens >= seq_len and self.budget_tokens % seq_len == 0
        check_setting(
            is_whole,
            "budget_tokens",
            self.budget_tokens,
            f"a positive multiple of model.seq_len = {seq_len}",
        )
        batch_tokens = self.strategy.global_batch_tokens
        check_setting(
            batch_tokens >= seq_len,
            "strategy.global_batch_tokens",
            batch_tokens,
            f"at least model.seq_len = {seq_len}",
        )
        check_setting(
            self.optimizer.name == "adamw" or self.strategy.name == "diloco",
            "optimizer.name",
            self.optimizer.name,
            f"adamw with strategy.name = {self.strategy.name!r}: every member repeats its "
            f"update to the bit; {self.optimizer.name} goes with diloco",
        )
        if self.strategy.name == "diloco":
            self._check_diloco()

    def _check_diloco(self) -> None:
        strategy, seq_len = self.strategy, self.model.seq_len
        check_setting(
            strategy.inner_batch_tokens % seq_len == 0,
            "strategy.inner_batch_tokens",
            strategy.inner_batch_tokens,
            f"a multiple of model.seq_len = {seq_len}",
        )
        num_units = self.model.num_layers + (1 if self.model.has_tied_embeddings else 2)
        check_setting(
            strategy.num_fragments <= num_units,
            "strategy.num_fragments",
            strategy.num_fragments,
            f"at most {num_units}: embedding, {self.model.num_layers} layers"
            + ("" if self.model.has_tied_embeddings else ", head"),
        )

    def to_wire(self) -> bytes:
        """Canonical JSON."""
        return canonical_json(wire_fields(self))

    @classmethod
    def from_wire(cls, data: bytes) -> "RunSpec":
        """Parse `to_wire`. Raises UsageError for anything else."""
        try:
            plain = json.loads(data)
        except ValueError as error:
            raise UsageError(
                f"run spec is not JSON ({error})",
                allowed="what RunSpec.to_wire writes",
                remedy="run both sides from the same version",
            ) from error
        return parse_fields(cls, plain, where="run spec")

    def to_toml(self) -> str:
        """TOML document for people; `from_toml` gives the same spec back."""
        plain = plain_fields(self)
        lines = [
            _toml_line(name, value) for name, value in plain.items() if not isinstance(value, dict)
        ]
        for name, table in plain.items():
            if isinstance(table, dict):
                lines += [
                    "",
                    f"[{name}]",
                    *(_toml_line(key, value) for key, value in table.items()),
                ]
        return "\n".join(lines) + "\n"

    @classmethod
    def from_toml(cls, text: str) -> "RunSpec":
        """Parse a TOML document. Raises UsageError, with the nearest match for unknown keys."""
        try:
            plain = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise UsageError(
                f"run spec is not TOML ({error})",
                allowed="key = value lines and [tables]",
                remedy="correct that place",
            ) from error
        return parse_fields(cls, plain, where="run spec")

    @property
    def run_digest(self) -> str:
        """Hex SHA-256 of the spec."""
        return hashlib.sha256(_DIGEST_TAG + self.to_wire()).hexdigest()


def is_hex_digest(text: str) -> bool:
    """True for a SHA-256 in lower-case hex."""
    return len(text) == 64 and set(text) <= set("0123456789abcdef")


def floor_to_windows(num_tokens: int, seq_len: int) -> int:
    """Largest whole number of windows, in tokens, that is not above `num_tokens`."""
    return num_tokens // seq_len * seq_len


def plain_fields(spec: Any) -> dict[str, Any]:
    """Plain data of a (nested) dataclass; float fields are floats even if they were given as
    integers.
    """
    plain: dict[str, Any] = {}
    for spec_field in dataclasses.fields(spec):
        value = getattr(spec, spec_field.name)
        if dataclasses.is_dataclass(value):
            value = plain_fields(value)
        plain[spec_field.name] = float(value) if spec_field.type is float else value
    return plain


def wire_fields(spec: Any) -> dict[str, Any]:
    """`plain_fields` without the fields that were added later and have their default."""
    plain = plain_fields(spec)
    for spec_field in dataclasses.fields(spec):
        value = getattr(spec, spec_field.name)
        if spec_field.metadata == ADDED_LATER and value == spec_field.default:
            del plain[spec_field.name]
        elif dataclasses.is_dataclass(value):
            plain[spec_field.name] = wire_fields(value)
    return plain


def parse_fields(cls: type[_Spec], plain: Any, *, where: str) -> _Spec:
    """Build a (nested) dataclass of int, float, bool and str fields from plain data, strictly.

    Raises UsageError that names the place: unknown key with nearest match, missing key, wrong type,
    bad value.
    """
    if not isinstance(plain, dict):
        raise UsageError(
            f"{where}: found {type(plain).__name__}", allowed="a table of keys", remedy="correct it"
        )
    fields_by_name = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in plain:
        if key not in fields_by_name:
            raise unknown_key_error(key, fields_by_name, where=where)
    values: dict[str, Any] = {}
    for name, spec_field in fields_by_name.items():
        if name in plain:
            values[name] = _parse_value(spec_field.type, plain[name], where=f"{where}: {name}")
        elif (
            spec_field.default is dataclasses.MISSING
            and spec_field.default_factory is dataclasses.MISSING
        ):
            raise UsageError(
                f"{where}: {name} is missing", allowed="it has no default", remedy=f"add {name}"
            )
    return cls(**values)


def unknown_key_error(key: str, known: Any, *, where: str) -> UsageError:
    """The refusal of an unknown key, with the nearest known one."""
    nearest = difflib.get_close_matches(key, list(known), n=1)
    return UsageError(
        f"{where}: unknown key {key!r}",
        allowed="known keys: " + (", ".join(known) or "none"),
        remedy=f"did you mean {nearest[0]!r}?" if nearest else "remove it",
    )


def _parse_value(kind: Any, value: Any, *, where: str) -> Any:
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return parse_fields(kind, value, where=where)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        allowed = _ALLOWED_BY_TYPE[kind]
        raise UsageError(f"{where} = {value!r}", allowed=allowed, remedy=f"give {allowed}")
    return value


def _toml_line(name: str, value: bool | float | str) -> str:
    return f"{name} = {json.dumps(value)}"


TINY_MODEL = ModelSpec(
    vocab_size=4096,
    d_model=192,
    num_layers=2,
    num_heads=6,
    num_kv_heads=3,
    head_dim=32,
    d_ff=512,
    seq_len=256,
    has_tied_embeddings=False,
)
"""Model of the main job: about 2 M parameters, trains on two CPU cores in minutes."""

MODEL_PRESETS: dict[str, ModelSpec] = {"tiny": TINY_MODEL}
"""Models that `--model` knows by name; the vocabulary follows the corpus."""
