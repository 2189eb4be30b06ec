"""What was measured: (N, D, C, loss) of trained models, with where each number comes from.

Two ways of counting parameters move the exponent of N_opt more than anything else does (0.50
against 0.84 on the same runs, Porian 2024), so every observation says which one it uses, a table
holds one only, and a table can be converted when it knows its head. Text in, text out; no files.
"""

import csv
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coordinator.scaling.columns import ALL, COLUMNS, Read, Selection, read_rows
from coordinator.scaling.laws import PLAIN_FLOP_PER_PARAM_TOKEN
from protos.contract.errors import UsageError

Array = NDArray[np.float64]


class Convention(StrEnum):
    """What N counts; C counts the same weights."""

    MATMUL = "matmul"
    """Every weight that a token is multiplied with: the head is in, the input embedding is not.
    What `ModelShape.num_matmul_parameters` counts, and what Muster uses."""
    NON_EMBEDDING = "non-embedding"
    """Kaplan 2020: neither embedding nor head."""
    UNSTATED = "unstated"
    """A table from outside that does not say; cannot be converted or mixed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """One trained model, or one point of a training curve."""

    params_n: float
    tokens_d: float
    compute_flop: float
    loss_nats: float
    convention: Convention = Convention.UNSTATED
    head_params: float = 0.0
    """Parameters of the output head, 0 if unknown: what a conversion adds or takes away."""
    seed: int | None = None
    run_digest: str = ""
    source: str = ""

    def converted(self, convention: Convention) -> "Observation":
        """The same model counted the other way. Raises UsageError if its head is not known."""
        if convention is self.convention:
            return self
        if Convention.UNSTATED in (convention, self.convention) or self.head_params <= 0:
            raise UsageError(
                f"an observation of {self.params_n:.4g} parameters counted as "
                f"{self.convention.value!r} with head_params {self.head_params:g}",
                allowed="conversion between matmul and non-embedding of rows that know their head",
                remedy="add the columns convention and head_params (vocabulary x width)",
            )
        sign = 1.0 if convention is Convention.MATMUL else -1.0
        head_flop = PLAIN_FLOP_PER_PARAM_TOKEN * self.head_params * self.tokens_d
        return replace(
            self,
            params_n=self.params_n + sign * self.head_params,
            compute_flop=self.compute_flop + sign * head_flop,
            convention=convention,
        )


@dataclass(frozen=True, kw_only=True)
class Observations:
    """A table of one convention."""

    rows: tuple[Observation, ...]
    notes: tuple[str, ...] = ()
    """What was filled in, left out or not used when it was read."""
    warnings: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        rows: Iterable[Observation],
        *,
        notes: Iterable[str] = (),
        warnings: Iterable[str] = (),
    ) -> "Observations":
        """Checked. Raises UsageError for numbers that cannot be and for mixed conventions."""
        listed = tuple(rows)
        for number, row in enumerate(listed, start=1):
            _check(row, number)
        found = sorted({row.convention.value for row in listed})
        if len(found) > 1:
            raise UsageError(
                f"a table that mixes the counting conventions {', '.join(found)}",
                allowed="one convention in one fit: counting the head or not moves the exponent "
                "of N by up to 0.13",
                remedy="convert the rows (they need head_params), or fit them apart",
            )
        return cls(rows=listed, notes=tuple(notes), warnings=tuple(warnings))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def convention(self) -> Convention:
        """Of all rows."""
        return self.rows[0].convention if self.rows else Convention.UNSTATED

    @cached_property
    def params_n(self) -> Array:
        """N of every row, (n,)."""
        return np.array([row.params_n for row in self.rows])

    @cached_property
    def tokens_d(self) -> Array:
        """D of every row, (n,)."""
        return np.array([row.tokens_d for row in self.rows])

    @cached_property
    def compute_flop(self) -> Array:
        """C of every row, (n,)."""
        return np.array([row.compute_flop for row in self.rows])

    @cached_property
    def loss_nats(self) -> Array:
        """Loss of every row, (n,)."""
        return np.array([row.loss_nats for row in self.rows])

    def where(self, mask: NDArray[np.bool_]) -> "Observations":
        """The rows of a mask."""
        kept = tuple(row for row, is_in in zip(self.rows, mask, strict=True) if is_in)
        return replace(self, rows=kept)

    def converted(self, convention: Convention) -> "Observations":
        """Every row counted that way. Raises UsageError."""
        return Observations.of(
            (row.converted(convention) for row in self.rows),
            notes=self.notes,
            warnings=self.warnings,
        )

    def flop_per_param_token(self) -> float:
        """k of C = k N D, the median over the rows: 6, or more where attention is counted."""
        return float(np.median(self.compute_flop / (self.params_n * self.tokens_d)))


_LEAST_PRODUCT_RATIO, _MOST_PRODUCT_RATIO = 0.01, 100.0
"""Of C to 6 N D: sparse models have less, tiny ones with long windows or a large head more."""


def observations_from_csv(
    text: str, *, name: str = "the table", selection: Selection = ALL
) -> Observations:
    """A table with columns N,D,C,loss; lines that begin with # are comments. Raises UsageError."""
    titles, rows = _cells(text)
    return _from_read(read_rows(titles, rows, name=name, selection=selection), name)


def observations_from_json(
    text: str, *, name: str = "the table", selection: Selection = ALL
) -> Observations:
    """A list of objects with the same names, or an object with it as `observations`."""
    try:
        plain = json.loads(text)
    except ValueError as error:
        raise UsageError(
            f"{name} is not JSON: {error}",
            allowed="a list of objects, or a table with commas",
            remedy="check the file",
        ) from error
    listed = plain.get("observations") if isinstance(plain, dict) else plain
    if not isinstance(listed, list) or not all(isinstance(item, dict) for item in listed):
        raise UsageError(
            f"{name} holds no list of objects", allowed=COLUMNS, remedy="check the file"
        )
    titles = list(dict.fromkeys(title for item in listed for title in item))
    rows = [
        ["" if item.get(title) is None else str(item[title]) for title in titles] for item in listed
    ]
    return _from_read(read_rows(titles, rows, name=name, selection=selection), name)


def observations_to_csv(table: Observations) -> str:
    """The table as `observations_from_csv` reads it; numbers survive exactly."""
    head = "N,D,C,loss,convention,head_params,seed,run_digest,source\r\n"
    out = _Lines()
    writer = csv.writer(out)
    for row in table.rows:
        writer.writerow(
            [repr(float(v)) for v in (row.params_n, row.tokens_d, row.compute_flop, row.loss_nats)]
            + [row.convention.value, repr(float(row.head_params))]
            + ["" if row.seed is None else row.seed, row.run_digest, row.source]
        )
    return head + out.text


def observations_to_json(table: Observations) -> str:
    """The table as `observations_from_json` reads it."""
    return json.dumps({"observations": [asdict(row) for row in table.rows]})


def points_from_csv(
    text: str, *, name: str, selection: Selection = ALL
) -> tuple[Observations, Array | None]:
    """Rows to be predicted, whose losses (n,) may be missing: None, and 1 in the table; of
    `selection` what this table knows."""
    titles, cells = _cells(text)
    within = selection.within(titles)
    read = read_rows(titles, cells, name=name, selection=within, needs_loss=False)
    has_loss = all(row.get("loss_nats", "").strip() for row in read.rows)
    filled = [row if has_loss else {**row, "loss_nats": "1"} for row in read.rows]
    table = _from_read(replace(read, rows=filled), name)
    return table, table.loss_nats if has_loss else None


class _Lines:
    """What csv.writer writes to."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> None:
        """Append."""
        self.text += text


def _cells(text: str) -> tuple[list[str], list[list[str]]]:
    """Titles and rows of as many cells."""
    lines = [line for line in text.lstrip("\ufeff").splitlines() if not line.startswith("#")]
    reader = csv.reader(lines)
    titles = [title.strip() for title in next(reader, [])]
    rows = [[*row, *[""] * len(titles)][: len(titles)] for row in reader if row]
    return titles, rows


def _from_read(read: Read, name: str) -> Observations:
    num_c_filled = num_d_filled = 0
    observations = []
    for number, row in enumerate(read.rows, start=1):
        where = f"row {number} of {name}"
        params_n, loss_nats = (
            _number(row.get(key, ""), where, key) for key in ("params_n", "loss_nats")
        )
        texts = row.get("tokens_d", "").strip(), row.get("compute_flop", "").strip()
        product = PLAIN_FLOP_PER_PARAM_TOKEN * params_n
        if texts[0]:
            tokens_d = _number(texts[0], where, "D")
            compute_flop = _number(texts[1], where, "C") if texts[1] else product * tokens_d
            num_c_filled += not texts[1]
        else:
            compute_flop = _number(texts[1], where, "D or C")
            tokens_d = compute_flop / product if product else math.nan
            num_d_filled += 1
        observation = Observation(
            params_n=params_n,
            tokens_d=tokens_d,
            compute_flop=compute_flop,
            loss_nats=loss_nats,
            convention=_convention(row.get("convention", ""), where),
            head_params=_number(row.get("head_params", "").strip() or "0", where, "head_params"),
            seed=_seed(row.get("seed", ""), where),
            run_digest=row.get("run_digest", ""),
            source=row.get("source", ""),
        )
        observations.append(observation)
    _check_product(observations, name)
    notes = list(read.notes)
    if num_c_filled:
        notes.append(f"C was missing in {num_c_filled} rows and is 6 N D there")
    if num_d_filled:
        notes.append(f"D was missing in {num_d_filled} rows and is C / (6 N) there")
    return Observations.of(observations, notes=notes, warnings=read.warnings)


def _check_product(rows: Sequence[Observation], name: str) -> None:
    """C is about 6 N D; a table where it is not has other things under these names or units."""
    ratios = [row.compute_flop / (row.params_n * row.tokens_d) for row in rows if _is_whole(row)]
    middle = float(np.median(ratios)) / PLAIN_FLOP_PER_PARAM_TOKEN if ratios else 1.0
    if not _LEAST_PRODUCT_RATIO <= middle <= _MOST_PRODUCT_RATIO:
        raise UsageError(
            f"C of {name} is {middle:.3g} times 6 N D (median of its rows)",
            allowed=f"{_LEAST_PRODUCT_RATIO:g} to {_MOST_PRODUCT_RATIO:g} times: N in parameters, "
            "D in tokens, C in FLOP",
            remedy="check units and names of the columns (case does not matter: d is read as D, "
            "unless `tokens` is there), or say which is which: --column D=TITLE",
        )


def _is_whole(row: Observation) -> bool:
    values = (row.params_n, row.tokens_d, row.compute_flop)
    return all(math.isfinite(value) and value > 0 for value in values)


def _number(text: str, where: str, column: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UsageError(
            f"{column} of {where} is {text!r}", allowed="a number", remedy="correct the table"
        ) from None


def _convention(text: str, where: str) -> Convention:
    try:
        return Convention(text.strip() or Convention.UNSTATED)
    except ValueError:
        raise UsageError(
            f"the convention of {where} is {text!r}",
            allowed=", ".join(item.value for item in Convention),
            remedy="correct the table",
        ) from None


def _seed(text: str, where: str) -> int | None:
    if not text.strip():
        return None
    return int(_number(text, where, "seed"))


def _check(row: Observation, number: int) -> None:
    values: dict[str, Any] = {
        "N": row.params_n, "D": row.tokens_d, "C": row.compute_flop, "the loss": row.loss_nats
    }  # fmt: skip
    for title, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise UsageError(
                f"{title} of observation {number} is {value:g}",
                allowed="finite numbers above 0",
                remedy="take that row out, or correct it",
            )
    if row.loss_nats > 100:
        raise UsageError(
            f"the loss of observation {number} is {row.loss_nats:g}",
            allowed="cross-entropy in nats per token, at most 100",
            remedy="give losses, not perplexities",
        )
