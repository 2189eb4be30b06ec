"""SQLite: the conformance suite over a file and over memory, and what only files can do: locks,
crashes, full disks.
"""

import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from coordinator.store import sqlite_ledger, sqlite_membership, sqlite_runs, sqlite_studies
from coordinator.store.base import Store
from coordinator.store.sqlite import STORE_FILE_NAME, SqliteStore, migrations
from coordinator.store.sqlite_table import Table
from protos.contract.errors import CorruptDataError, ErrorCode, MachineError, UnavailableError
from tests.coordinator.store.conformance import StoreConformance


class TestFile(StoreConformance):
    """A file under a data directory."""

    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[Store]:
        store = SqliteStore.open(tmp_path / "data")
        yield store
        store.close()


class TestMemory(StoreConformance):
    """In memory, as tests use it."""

    @pytest.fixture
    def store(self) -> Iterator[Store]:
        store = SqliteStore.in_memory()
        yield store
        store.close()


def test_only_the_owner_can_read_a_store(tmp_path: Path) -> None:
    """Session keys are in it. A store and a directory of an earlier version are tightened too."""
    data_dir = tmp_path / "data"
    for _ in range(2):
        old_umask = os.umask(0o022)
        try:
            store = SqliteStore.open(data_dir)
            with store.write() as tx:
                tx.set_meta("key", "value")
            modes = {path.name: path.stat().st_mode & 0o777 for path in data_dir.iterdir()}
            assert {f"{STORE_FILE_NAME}{suffix}" for suffix in ("", "-wal", "-shm")} <= set(modes)
            assert set(modes.values()) == {0o600}
            assert data_dir.stat().st_mode & 0o777 == 0o700
            store.close()
        finally:
            os.umask(old_umask)
        data_dir.chmod(0o755)
        (data_dir / STORE_FILE_NAME).chmod(0o644)


def test_rows_and_schema_name_the_same_columns_in_the_same_order() -> None:
    connection = sqlite3.connect(":memory:")
    for _, script in migrations():
        connection.executescript(script)
    tables = [
        table
        for module in (sqlite_ledger, sqlite_membership, sqlite_runs, sqlite_studies)
        for table in vars(module).values()
        if isinstance(table, Table)
    ]
    whole = set()
    for table in tables:
        columns = [row[1] for row in connection.execute(f"PRAGMA table_info({table.name})")]
        names = [field.name for field in fields(table.row_class)]
        assert set(names) <= set(columns)
        if names == columns:
            whole.add(table.name)
    assert whole == {table.name for table in tables}
    rows = connection.execute("SELECT name FROM sqlite_master WHERE type='table'")
    assert {row[0] for row in rows} - whole == {"meta", "token_uses"}


def test_durability_settings(tmp_path: Path) -> None:
    store = SqliteStore.open(tmp_path)
    assert store._writer is not None
    pragmas = [
        store._writer.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("journal_mode", "synchronous", "foreign_keys", "user_version")
    ]
    assert pragmas == ["wal", 2, 1, migrations()[-1][0]]
    store.close()


def test_a_data_directory_has_one_owner(tmp_path: Path) -> None:
    store = SqliteStore.open(tmp_path)
    with pytest.raises(MachineError, match=f"in use by process {os.getpid()}") as caught:
        SqliteStore.open(tmp_path)
    assert caught.value.code is ErrorCode.DATA_DIR_LOCKED
    store.close()
    SqliteStore.open(tmp_path).close()


def test_reading_beside_a_running_owner_and_after_it(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="there is no store"):
        SqliteStore.open_read_only(tmp_path)
    owner = SqliteStore.open(tmp_path)
    with owner.write() as tx:
        tx.set_meta("name", "one")
    reader = SqliteStore.open_read_only(tmp_path)
    with owner.write() as tx:
        tx.set_meta("name", "two")
        with reader.read() as seen, owner.read() as own:
            assert seen.meta("name") == own.meta("name") == "one"
    with reader.read() as seen:
        assert seen.meta("name") == "two"
    with pytest.raises(MachineError, match="reading only"), reader.write():
        pass
    owner.close()
    with SqliteStore.open_read_only(tmp_path).read() as seen:
        assert seen.meta("name") == "two"
    reader.close()


def test_readers_cannot_write(tmp_path: Path) -> None:
    store = SqliteStore.open(tmp_path)
    with store.read() as tx, pytest.raises(MachineError, match="readonly"):
        tx.set_meta("name", "value")
    store.close()


KILLED = """
import os, signal, sys
from pathlib import Path
from coordinator.store.sqlite import SqliteStore
store = SqliteStore.open(Path(sys.argv[1]))
for number in range(1000):
    with store.write() as tx:
        tx.set_meta("number", str(number))
    os.write(1, f"{number}\\n".encode())
    if number == 20:
        transaction = store.write()
        transaction.__enter__().set_meta("number", "never committed")
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_was_committed_survives_sigkill(tmp_path: Path) -> None:
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        cwd=root,
        capture_output=True,
        timeout=60,
        check=False,
    )
    acknowledged = done.stdout.split()[-1].decode()
    assert (done.returncode, acknowledged) == (-9, "20")
    store = SqliteStore.open(tmp_path)
    with store.read() as tx:
        assert tx.meta("number") == acknowledged
    store.close()


def test_a_full_store_refuses_and_recovers(tmp_path: Path) -> None:
    store = SqliteStore.open(tmp_path)
    writer = store._writer
    assert writer is not None
    pages = writer.execute("PRAGMA page_count").fetchone()[0]
    writer.execute(f"PRAGMA max_page_count = {pages + 2}")
    with pytest.raises(UnavailableError, match="full") as caught, store.write() as tx:
        for index in range(100):
            tx.set_meta(f"{index}", "x" * 4000)
    assert caught.value.code is ErrorCode.DISK_FULL
    with store.read() as tx:
        assert tx.meta("0") == ""
    writer.execute("PRAGMA max_page_count = 100000")
    with store.write() as tx:
        tx.set_meta("0", "kept")
    with store.read() as tx:
        assert tx.meta("0") == "kept"
    store.close()


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / STORE_FILE_NAME).write_bytes(b"not a database at all" * 100)
    with pytest.raises(CorruptDataError, match="cannot be read"):
        SqliteStore.open(tmp_path)
    (tmp_path / STORE_FILE_NAME).unlink()
    SqliteStore.open(tmp_path).close()


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    SqliteStore.open(tmp_path).close()
    connection = sqlite3.connect(tmp_path / STORE_FILE_NAME)
    connection.execute("PRAGMA user_version = 9999")
    connection.close()
    with pytest.raises(MachineError, match="schema 9999"):
        SqliteStore.open(tmp_path)
    with pytest.raises(MachineError, match="schema"):
        SqliteStore.open_read_only(tmp_path)


def test_a_file_in_place_of_the_directory_is_named(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("x")
    with pytest.raises(MachineError, match="data directory"):
        SqliteStore.open(path)


@pytest.mark.parametrize("is_in_memory", [True, False])
def test_backup_is_a_complete_store(tmp_path: Path, is_in_memory: bool) -> None:
    store = SqliteStore.in_memory() if is_in_memory else SqliteStore.open(tmp_path)
    with store.write() as tx:
        tx.set_meta("name", "value")
    copy = tmp_path / "copy" / STORE_FILE_NAME
    copy.parent.mkdir()
    store.backup(copy)
    with pytest.raises(MachineError, match="exists"):
        store.backup(copy)
    store.close()
    with SqliteStore.open_read_only(copy.parent).read() as tx:
        assert tx.meta("name") == "value"


def test_a_closed_store_says_so(tmp_path: Path) -> None:
    store = SqliteStore.open(tmp_path)
    store.close()
    with pytest.raises(CorruptDataError, match="closed"), store.read():
        pass
