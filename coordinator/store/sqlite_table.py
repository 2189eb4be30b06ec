"""Rows to SQL and back: the statements of one table, built once from its row class.

Columns are the dataclass's fields in order, so a table and its row cannot drift apart unnoticed:
the conformance suite compares them with the schema. Booleans are stored as 0 and 1.
"""

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from operator import attrgetter
from typing import Any, Generic, NoReturn, TypeVar

from protos.contract.errors import (
    CorruptDataError,
    ErrorCode,
    MachineError,
    UnavailableError,
    UsageError,
)

_FULL_WORDS = ("full", "no space")


def raise_store_error(error: sqlite3.Error) -> NoReturn:
    """Turn a driver's error into ours: full, unreadable, or out of order."""
    text = str(error)
    if any(word in text.lower() for word in _FULL_WORDS):
        raise UnavailableError(
            f"the store cannot write: {text}",
            allowed="reads go on; writes wait for space",
            remedy="free disk space under the data directory; writes resume by themselves",
            code=ErrorCode.DISK_FULL,
        ) from error
    if "readonly" in text:
        raise MachineError(
            f"the store cannot be written: {text}",
            allowed="a data directory and a store that this user may write",
            remedy="run as the user that owns --data-dir, or correct its modes",
            code=ErrorCode.STORE_UNAVAILABLE,
        ) from error
    if isinstance(error, sqlite3.DatabaseError) and (
        "malformed" in text or "not a database" in text
    ):
        raise CorruptDataError(
            f"the store's file cannot be read: {text}",
            allowed="an SQLite file of Muster",
            remedy="restore store.sqlite3 from a backup (ops/runbook.md)",
            code=ErrorCode.STORE_UNAVAILABLE,
        ) from error
    raise UnavailableError(
        f"the store refused a statement: {text}",
        allowed="a store that takes it",
        remedy="try again; if it stays, see the coordinator's log",
        code=ErrorCode.STORE_UNAVAILABLE,
    ) from error


@contextmanager
def full_disk_is_fatal() -> Iterator[None]:
    """For starts and single commands, which wait for nobody to free space: a full disk is this
    machine's error (MachineError), not a reason to try again.
    """
    try:
        yield
    except UnavailableError as error:
        if error.code is not ErrorCode.DISK_FULL:
            raise
        raise MachineError(
            error.found,
            allowed="free space under the data directory",
            remedy="free some, or name a --data-dir on another disk; what was stored is kept",
            code=ErrorCode.DISK_FULL,
        ) from error


def run_sql(connection: sqlite3.Connection, sql: str, values: Sequence[Any] = ()) -> sqlite3.Cursor:
    """Execute one statement; the driver's operational errors come out as ours, constraint
    violations as they are.
    """
    try:
        return connection.execute(sql, values)
    except sqlite3.IntegrityError:
        raise
    except OverflowError as error:
        raise UsageError(
            "a number beyond 64 bits", allowed="-2^63 to 2^63 - 1", remedy="correct the request"
        ) from error
    except sqlite3.Error as error:
        raise_store_error(error)


_ROWS_PER_STATEMENT = 32
"""Of `insert_many`; each number of rows is a statement of its own in the driver's cache."""

Row = TypeVar("Row")


class Table(Generic[Row]):
    """Statements of one table over one row class."""

    def __init__(
        self,
        name: str,
        row_class: type[Row],
        *,
        key: Sequence[str],
        has_rowid: bool = False,
        changing: Sequence[str] = (),
    ) -> None:
        """`key` names the primary key's columns; `has_rowid` says that the first column is given by
        the store; `changing` names the columns that an upsert replaces, all but the key's if empty.
        """
        columns = [field.name for field in fields(row_class)]  # type: ignore[arg-type]
        self.name = name
        self.row_class = row_class
        self.columns = ", ".join(columns)
        self._values = attrgetter(*columns)
        self._has_rowid = has_rowid
        types = [field.type for field in fields(row_class)]  # type: ignore[arg-type]
        self._bools = [index for index, kind in enumerate(types) if kind is bool]
        self._marks = f"({', '.join('?' * len(columns))})"
        self._insert_sql = f"INSERT INTO {name} ({self.columns}) VALUES {self._marks}"
        others = [column for column in columns if column not in key]
        updates = ", ".join(f"{column} = excluded.{column}" for column in changing or others)
        self._update_sql = (
            f"UPDATE {name} SET {', '.join(f'{column} = ?' for column in others)} WHERE "
            + " AND ".join(f"{k} = ?" for k in key)
        )
        self._update_values = attrgetter(*others, *key)
        self._on_conflict = f" ON CONFLICT ({', '.join(key)}) DO UPDATE SET {updates}"
        self._one_sql = f"SELECT {self.columns} FROM {name} WHERE " + " AND ".join(
            f"{k} = ?" for k in key
        )

    def _row(self, values: Sequence[Any]) -> Row:
        if not self._bools:
            return self.row_class(*values)
        changed = list(values)
        for index in self._bools:
            changed[index] = bool(changed[index])
        return self.row_class(*changed)

    def _parameters(self, row: Row) -> Sequence[Any]:
        values: tuple[Any, ...] = self._values(row)
        return (None, *values[1:]) if self._has_rowid else values

    def insert(self, connection: sqlite3.Connection, row: Row) -> int:
        """Insert one row; returns its rowid. A row with this key must not exist."""
        return run_sql(connection, self._insert_sql, self._parameters(row)).lastrowid or 0

    def insert_all(self, connection: sqlite3.Connection, rows: Iterable[Row]) -> None:
        """Insert several rows."""
        for row in rows:
            run_sql(connection, self._insert_sql, self._parameters(row))

    def insert_many(self, connection: sqlite3.Connection, rows: Sequence[Row]) -> None:
        """Insert rows in order, many with one statement."""
        self._write_many(connection, rows, "")

    def upsert_many(self, connection: sqlite3.Connection, rows: Sequence[Row]) -> None:
        """`upsert` for each row, many with one statement."""
        self._write_many(connection, rows, self._on_conflict)

    def _write_many(
        self, connection: sqlite3.Connection, rows: Sequence[Row], on_conflict: str
    ) -> None:
        for begin in range(0, len(rows), _ROWS_PER_STATEMENT):
            part = rows[begin : begin + _ROWS_PER_STATEMENT]
            sql = self._insert_sql + f", {self._marks}" * (len(part) - 1) + on_conflict
            run_sql(connection, sql, [value for row in part for value in self._parameters(row)])

    def update(self, connection: sqlite3.Connection, row: Row) -> None:
        """Replace every other column of the row with this key, which must exist; cheaper than
        `upsert`.
        """
        run_sql(connection, self._update_sql, self._update_values(row))

    def upsert(self, connection: sqlite3.Connection, row: Row) -> None:
        """Insert the row or replace the other columns of the one with its key."""
        run_sql(connection, self._insert_sql + self._on_conflict, self._parameters(row))

    def one(self, connection: sqlite3.Connection, *key: Any) -> Row | None:
        """Row with this primary key."""
        values = run_sql(connection, self._one_sql, key).fetchone()
        return None if values is None else self._row(values)

    def where(
        self, connection: sqlite3.Connection, condition: str, *values: Any, index: str = ""
    ) -> list[Row]:
        """Rows under a condition, which is a constant of the calling method, with ORDER BY and
        LIMIT if wanted.

        `index` makes the planner use that index: without statistics it prefers a prefix of the
        primary key, which for leases is the whole table.
        """
        hint = f" INDEXED BY {index}" if index else ""
        sql = f"SELECT {self.columns} FROM {self.name}{hint} WHERE {condition}"
        cursor = run_sql(connection, sql, values)
        try:
            return [self._row(found) for found in cursor]
        except sqlite3.Error as error:
            raise_store_error(error)
