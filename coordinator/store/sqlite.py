"""SQLite: the store of every deployment so far (guarantees: base.py).

WAL with synchronous=FULL: a commit is one fsync of the log, shared by up to 512 operations
(operations/writer.py), which makes FULL as cheap as NORMAL (measured, ops-security 4.1). One
connection writes, readers have their own, so a slow page never holds up a lease. `:memory:` keeps
one connection behind a lock, for tests.
"""

import os
import queue
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from coordinator.store.base import UndoNeededError
from coordinator.store.data_dir_lock import DataDirLock, machine_error_from_os_error
from coordinator.store.sqlite_kept import KeptRows, Unwritten
from coordinator.store.sqlite_ledger import SqliteLedger
from coordinator.store.sqlite_membership import SqliteMembership
from coordinator.store.sqlite_runs import SqliteRuns
from coordinator.store.sqlite_studies import SqliteStudies
from coordinator.store.sqlite_table import full_disk_is_fatal, raise_store_error, run_sql
from protos.contract.errors import CorruptDataError, ErrorCode, MachineError, MusterError

STORE_FILE_NAME = "store.sqlite3"
MIGRATIONS_DIR = Path(__file__).parent / "migrations"
_BUSY_WAIT_SECONDS = 5.0
_CACHED_STATEMENTS = 256
_WRITER_CACHE_KIB = 65_536
_CHECKPOINT_PAGES = 4_000
"""Of 4 KiB. With the driver's 2 MiB cache and 1,000 pages, leases cost 12 % more CPU
(ops/bench/coordinator.md).
"""


class _HopefulScope:
    """See base.Transaction.hopeful_scope. A class, because a generator costs as much as a
    statement.
    """

    __slots__ = ("_connection", "_kept", "_num_changes", "_num_unwritten")

    def __init__(self, connection: sqlite3.Connection, kept: KeptRows) -> None:
        self._connection = connection
        self._kept = kept

    def __enter__(self) -> None:
        self._num_changes = self._connection.total_changes
        self._num_unwritten = self._kept.unwritten.num_changes

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            return
        is_changed = self._connection.total_changes != self._num_changes
        if is_changed or self._kept.unwritten.num_changes != self._num_unwritten:
            raise UndoNeededError from error


class SqliteTransaction(SqliteRuns, SqliteLedger, SqliteMembership, SqliteStudies):
    """All typed methods over one connection with an open transaction."""

    def __init__(self, connection: sqlite3.Connection, kept: KeptRows) -> None:
        """`kept` holds the newest rows; a reader brings an empty one."""
        self._connection = connection
        self._kept = kept

    def copy_to(self, path: Path) -> None:
        """Write what this transaction sees to a new database file. Raises MachineError,
        UnavailableError.
        """
        target = _connect(str(path))
        try:
            self._connection.backup(target)
        except sqlite3.Error as error:
            raise_store_error(error)
        finally:
            target.close()

    def flush(self) -> None:
        """Write what waits for the commit."""
        self.write_books()
        self.write_leases()
        self.write_returned()
        self.write_journal()
        self.write_requests()

    def hopeful_scope(self) -> _HopefulScope:
        """See base.Transaction.hopeful_scope."""
        return _HopefulScope(self._connection, self._kept)

    @contextmanager
    def savepoint(self) -> Iterator[None]:
        """See base.Transaction.savepoint."""
        self.flush()
        run_sql(self._connection, "SAVEPOINT operation")
        try:
            yield
            self.flush()  # a constraint that does not hold is this operation's error, nobody else's
        except BaseException:
            self._kept.forget()
            self._kept.unwritten = Unwritten()
            if self._connection.in_transaction:
                run_sql(self._connection, "ROLLBACK TO operation")
                run_sql(self._connection, "RELEASE operation")
            raise
        run_sql(self._connection, "RELEASE operation")


def migrations() -> list[tuple[int, str]]:
    """Numbered scripts of this version, in order."""
    found = sorted(MIGRATIONS_DIR.glob("[0-9][0-9][0-9][0-9]_*.sql"))
    return [(int(path.name[:4]), path.read_text(encoding="ascii")) for path in found]


def migrate(connection: sqlite3.Connection) -> None:
    """Bring the schema forward, each script in its own transaction. Raises MachineError for a newer
    schema.
    """
    scripts = migrations()
    current = run_sql(connection, "PRAGMA user_version").fetchone()[0]
    newest = scripts[-1][0]
    if current > newest:
        raise MachineError(
            f"the store has schema {current}",
            allowed=f"schemas up to {newest} with this version",
            remedy="upgrade muster or name another --data-dir",
        )
    for number, script in scripts:
        if number <= current:
            continue
        try:
            connection.executescript(
                f"BEGIN IMMEDIATE;\n{script}\nPRAGMA user_version = {number};\nCOMMIT;"
            )
        except sqlite3.Error as error:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise_store_error(error)


def _tune(connection: sqlite3.Connection) -> None:
    """Settings of the writing connection beside the log's: durable commits, and memory instead of
    system calls.
    """
    run_sql(connection, "PRAGMA synchronous = FULL")
    run_sql(connection, "PRAGMA temp_store = MEMORY")  # savepoints' undo pages: 22 writes a lease
    run_sql(connection, f"PRAGMA cache_size = -{_WRITER_CACHE_KIB}")
    run_sql(connection, f"PRAGMA wal_autocheckpoint = {_CHECKPOINT_PAGES}")


def _connect(location: str, *, is_uri: bool = False) -> sqlite3.Connection:
    try:
        connection = sqlite3.connect(
            location,
            uri=is_uri,
            isolation_level=None,
            check_same_thread=False,
            timeout=_BUSY_WAIT_SECONDS,
            cached_statements=_CACHED_STATEMENTS,
        )
    except sqlite3.Error as error:
        raise MachineError(
            f"the store {location} cannot be opened: {error}",
            allowed="a readable file in a data directory",
            remedy="check --data-dir and its permissions",
            code=ErrorCode.PERMISSION_DENIED,
        ) from error
    run_sql(connection, "PRAGMA foreign_keys = ON")
    return connection


def _make_files_private(data_dir: Path) -> None:
    """Make the database file with mode 0600 before SQLite would use the umask's; its log and index
    then get the same. Files of an earlier version lose the rights of others.
    """
    try:
        path = data_dir / STORE_FILE_NAME
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        for suffix in ("", "-wal", "-shm"):
            file = path.with_name(path.name + suffix)
            if file.exists():
                file.chmod(0o600)
    except OSError as error:
        raise machine_error_from_os_error(
            error, doing=f"opening the store in {data_dir}"
        ) from error


def has_store(data_dir: Path) -> bool:
    """True if a coordinator has worked here. Raises MachineError when this user may not look."""
    try:
        return (data_dir / STORE_FILE_NAME).is_file()
    except OSError as error:
        raise machine_error_from_os_error(
            error, doing=f"looking into data directory {data_dir}"
        ) from error


class SqliteStore:
    """Implements base.Store."""

    def __init__(
        self, *, writer: sqlite3.Connection | None, location: str, lock: DataDirLock | None
    ) -> None:
        """Use `open`, `open_read_only` or `in_memory` instead."""
        self._writer = writer
        self._location = location
        """Empty for a store in memory, whose one connection also reads."""
        self._lock = lock
        self._guard = threading.RLock()
        self._kept = KeptRows()
        """The writer's; used under the guard."""
        self._readers: queue.SimpleQueue[sqlite3.Connection] = queue.SimpleQueue()
        self._is_closed = False

    @classmethod
    def open(cls, data_dir: Path) -> Self:
        """Lock the data directory, open or create its store, migrate it. Raises MachineError,
        CorruptDataError.
        """
        lock = DataDirLock(data_dir)
        try:
            location = str(data_dir / STORE_FILE_NAME)
            with full_disk_is_fatal():
                _make_files_private(data_dir)
                writer = _connect(location)
                run_sql(writer, "PRAGMA journal_mode = WAL")
                _tune(writer)
                migrate(writer)
        except MusterError:
            lock.release()
            raise
        return cls(writer=writer, location=location, lock=lock)

    @classmethod
    def open_read_only(cls, data_dir: Path) -> Self:
        """Open for reading only, without the lock, beside a running coordinator or none. Raises
        MachineError.
        """
        path = data_dir / STORE_FILE_NAME
        if not has_store(data_dir):
            raise MachineError(
                f"there is no store in {data_dir}",
                allowed="the data directory of a coordinator that has run",
                remedy="check --data-dir",
                code=ErrorCode.PERMISSION_DENIED,
            )
        store = cls(writer=None, location=f"{path.absolute().as_uri()}?mode=ro", lock=None)
        with store.read():
            return store

    @classmethod
    def in_memory(cls) -> Self:
        """Open an empty store that lives as long as the object."""
        writer = _connect(":memory:")
        migrate(writer)
        return cls(writer=writer, location="", lock=None)

    @contextmanager
    def write(self) -> Iterator[SqliteTransaction]:
        """See base.Store.write."""
        self._check_open()
        if self._writer is None:
            raise MachineError(
                "this store was opened for reading only",
                allowed="reading",
                remedy="ask the running coordinator",
            )
        with self._guard:
            connection = self._writer
            run_sql(connection, "BEGIN IMMEDIATE")
            self._kept.unwritten = Unwritten()
            try:
                tx = SqliteTransaction(connection, self._kept)
                yield tx
                tx.flush()
                run_sql(connection, "COMMIT")
            except BaseException:
                self._kept.forget()
                if connection.in_transaction:
                    run_sql(connection, "ROLLBACK")
                raise

    @contextmanager
    def read(self) -> Iterator[SqliteTransaction]:
        """See base.Store.read."""
        self._check_open()
        if not self._location:
            with self._guard:
                assert self._writer is not None
                yield SqliteTransaction(self._writer, KeptRows())
            return
        connection = self._reader()
        try:
            run_sql(connection, "BEGIN")
            yield SqliteTransaction(connection, KeptRows())
        finally:
            if connection.in_transaction:
                run_sql(connection, "ROLLBACK")
            if self._is_closed:
                connection.close()
            else:
                self._readers.put(connection)

    def _reader(self) -> sqlite3.Connection:
        try:
            return self._readers.get_nowait()
        except queue.Empty:
            connection = _connect(self._location, is_uri=self._location.startswith("file:"))
        run_sql(connection, "PRAGMA query_only = ON")
        if run_sql(connection, "PRAGMA user_version").fetchone()[0] != migrations()[-1][0]:
            connection.close()
            raise MachineError(
                "the store's schema is not this version's",
                allowed="a store of this version",
                remedy=(
                    "start the coordinator once with this version, or use the version that wrote it"
                ),
            )
        return connection

    def backup(self, path: Path) -> None:
        """Write a consistent copy to a new file while work goes on. Raises MachineError."""
        self._check_open()
        if path.exists():
            raise MachineError(f"{path} exists", allowed="a new file", remedy="name another file")
        with self.read() as tx:
            tx.copy_to(path)

    def close(self) -> None:
        """See base.Store.close."""
        self._is_closed = True
        with self._guard:
            while not self._readers.empty():
                self._readers.get().close()
            if self._writer is not None:
                self._writer.close()
                self._writer = None
            if self._lock is not None:
                self._lock.release()
                self._lock = None

    def _check_open(self) -> None:
        if self._is_closed:
            raise CorruptDataError(
                "the store is closed",
                allowed="an open one",
                remedy="open it again",
                code=ErrorCode.INTERNAL,
            )
