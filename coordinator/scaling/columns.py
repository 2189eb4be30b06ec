"""Which column of a table is which number, and which rows are meant: nothing is chosen in silence.

A title that could be two things, or two titles that could be one, are refused by name; columns that
are not used are named; a column of words that sorts the rows into kinds is a warning, because
several experiments in one table are not one law.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from protos.contract.errors import UsageError

ALIASES = {
    "n": "params_n",
    "d": "tokens_d",
    "tokens": "tokens_d",
    "c": "compute_flop",
    "loss": "loss_nats",
    "params_n": "params_n",
    "tokens_d": "tokens_d",
    "compute_flop": "compute_flop",
    "compute_c_flop": "compute_flop",
    "loss_nats": "loss_nats",
    "loss_l_nats": "loss_nats",
    "convention": "convention",
    "head_params": "head_params",
    "seed": "seed",
    "run_digest": "run_digest",
    "source": "source",
}
"""Titles in lower case -> field of an Observation. A `d` beside `tokens` is a width, not D."""
COLUMNS = (
    "N,D,C,loss (C may be missing, or D if C is there; `tokens` is D) and optionally convention, "
    "head_params, seed, run_digest, source"
)
_SHORT = {"params_n": "N", "tokens_d": "D", "compute_flop": "C", "loss_nats": "loss"}
_NAME_IT = "name the columns in its first line, or say e.g. --column N=TITLE"
_MOST_KINDS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What a person says of a table's columns."""

    columns: tuple[tuple[str, str], ...] = ()
    """(N, D, C, loss or another known name; the title of its column)."""
    where: tuple[tuple[str, str], ...] = ()
    """(title, value) that every row must have."""

    @classmethod
    def of(cls, columns: Sequence[str] = (), where: Sequence[str] = ()) -> "Selection":
        """From NAME=TITLE and TITLE=VALUE. Raises UsageError."""
        return cls(
            columns=tuple(_pair("--column", text, "N=TITLE") for text in columns),
            where=tuple(_pair("--where", text, "TITLE=VALUE") for text in where),
        )

    def within(self, titles: Sequence[str]) -> "Selection":
        """What of it a table with these titles knows."""
        return Selection(
            columns=tuple(pair for pair in self.columns if pair[1] in titles),
            where=tuple(pair for pair in self.where if pair[0] in titles),
        )


ALL = Selection()
"""Titles as they are, every row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """Rows by field, with what was said of the columns."""

    rows: list[dict[str, str]]
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def read_rows(
    titles: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    name: str,
    selection: Selection,
    needs_loss: bool = True,
) -> Read:
    """Rows (of cells, as many as titles) as text by field. Raises UsageError."""
    field_of = _fields(titles, selection, name)
    known = set(field_of.values())
    if (
        "params_n" not in known
        or not known & {"tokens_d", "compute_flop"}
        or (needs_loss and "loss_nats" not in known)
    ):
        separator = _other_separator(titles)
        raise UsageError(
            f"{name} has one column, with {separator} in its title: cells are separated by that"
            if separator
            else f"{name} has the columns {', '.join(titles) or 'none'}",
            allowed=f"cells with commas between, numbers with points; {COLUMNS}"
            if separator
            else COLUMNS,
            remedy="save it with commas (in a spreadsheet: CSV, comma separated)"
            if separator
            else _NAME_IT,
        )
    kept = [row for row in rows if any(row[index].strip() for index in field_of)]
    if not kept:
        raise UsageError(f"{name} has no rows", allowed=COLUMNS, remedy="check the file")
    notes = []
    for title, value in selection.where:
        before, kept = len(kept), _rows_with(titles, kept, title, value, name)
        notes.append(f"{len(kept)} of {before} rows have {title} = {value}; the others are left")
    chosen = {title for title, _ in selection.where}
    unused = [
        index
        for index, title in enumerate(titles)
        if index not in field_of and title and title not in chosen
    ]
    if unused:
        notes.append("columns not used: " + ", ".join(titles[index] for index in unused))
    return Read(
        rows=[{found: row[index] for index, found in field_of.items()} for row in kept],
        notes=notes,
        warnings=_kinds(titles, kept, unused),
    )


def _other_separator(titles: Sequence[str]) -> str:
    """What stands between the cells instead of commas, in words; "" if nothing does."""
    words = {";": "semicolons", "\t": "tabs", "|": "vertical bars"}
    return next(
        (word for mark, word in words.items() if len(titles) == 1 and mark in titles[0]), ""
    )


def _pair(flag: str, text: str, example: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator or not name.strip() or not value.strip():
        raise UsageError(f"{flag} {text!r}", allowed=f"{flag} {example}", remedy="write it so")
    return name.strip(), value.strip()


def _fields(titles: Sequence[str], selection: Selection, name: str) -> dict[int, str]:
    """Field of every column that is used, by the column's number."""
    found: dict[int, str] = {}
    for wanted, title in selection.columns:
        if wanted.lower() not in ALIASES:
            raise UsageError(
                f"--column {wanted}={title}",
                allowed="N, D, C, loss, convention, head_params, seed, run_digest, source",
                remedy="put one of them before the =",
            )
        found[_index(titles, title, f"--column {wanted}={title}", name)] = ALIASES[wanted.lower()]
    assigned = set(found.values())
    has_tokens = any(title.lower() == "tokens" for title in titles)
    for index, title in enumerate(titles):
        alias = ALIASES.get(title.lower(), "")
        is_width = title == "d" and has_tokens
        if alias and not is_width and alias not in assigned and index not in found:
            found[index] = alias
    for one in sorted(set(found.values())):
        same = [index for index in sorted(found) if found[index] == one]
        if same[1:]:
            both = " and ".join(f"{titles[index]!r} (column {index + 1})" for index in same)
            short = _SHORT.get(one, one)
            raise UsageError(
                f"{name} has {both}, all read as {short}",
                allowed="one column for each of N, D, C and loss; case does not matter",
                remedy=f"rename one, or say which: --column {short}=TITLE (exact case)",
            )
    return found


def _index(titles: Sequence[str], title: str, flag: str, name: str) -> int:
    places = [index for index, one in enumerate(titles) if one == title]
    if len(places) == 1:
        return places[0]
    raise UsageError(
        f"{flag}: {name} has {len(places)} columns {title!r}",
        allowed=", ".join(titles) or "a table with titles",
        remedy="name one column as it is written, rename it if it is there twice",
    )


def _rows_with(
    titles: Sequence[str], rows: Sequence[Sequence[str]], title: str, value: str, name: str
) -> list[Sequence[str]]:
    index = _index(titles, title, f"--where {title}={value}", name)
    kept = [row for row in rows if _is_same(row[index].strip(), value)]
    if not kept:
        values = list(dict.fromkeys(row[index].strip() for row in rows))
        raise UsageError(
            f"no row of {name} has {title} = {value}",
            allowed=", ".join(values[:12]) + (" ..." if values[12:] else ""),
            remedy="choose one of its values",
        )
    return kept


def _is_same(text: str, value: str) -> bool:
    if text == value:
        return True
    one, other = _number(text), _number(value)
    return one is not None and one == other


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _kinds(
    titles: Sequence[str], rows: Sequence[Sequence[str]], unused: Sequence[int]
) -> list[str]:
    """A warning where unused columns of words sort the rows into kinds."""
    found = []
    for index in unused:
        values = list(dict.fromkeys(text for row in rows if (text := row[index].strip())))
        is_words = any(_number(text) is None for text in values)
        if is_words and 2 <= len(values) <= min(_MOST_KINDS, len(rows) // 2):
            shown = ", ".join(values[:6]) + (" ..." if values[6:] else "")
            found.append((titles[index], values[0], shown))
    if not found:
        return []
    listed = "; ".join(f"{title} ({shown})" for title, _, shown in found)
    return [
        f"the rows are of several kinds by {listed} and are taken together as one: losses of "
        f"different experiments follow no one law; take one with e.g. --where "
        f"{found[0][0]}={found[0][1]}"
    ]
