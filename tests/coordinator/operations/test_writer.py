"""The writer thread: group commit, an operation's own failure, the store's failure, the end."""

import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.operations.common import OperationContext
from coordinator.operations.writer import MAX_BATCH, Writer
from coordinator.store.base import Transaction
from coordinator.store.rows import LeaseRow
from coordinator.store.sqlite import SqliteStore
from protos.contract.errors import ErrorCode, RefusedError, UnavailableError
from protos.contract.signing import SigningKey

LEASE = LeaseRow("no-run", 1, "a", 1, 1, 0, 0, 3, 0, 4, "ACTIVE", 0, 100, 200, "")
CONTEXT = OperationContext(signing_key=SigningKey(bytes(32)))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    store = SqliteStore.open(tmp_path)
    yield store
    store.close()


def put(tx: Transaction, request: tuple[str, str], /, *, context, now_unix_seconds: float) -> float:
    tx.set_meta(*request)
    return now_unix_seconds


def fail(tx: Transaction, request: BaseException, /, *, context, now_unix_seconds: float) -> None:
    tx.set_meta("failed", "left behind")
    raise request


def look(tx: Transaction, request: str, /, *, context, now_unix_seconds: float) -> str:
    return tx.meta(request)


def test_results_are_durable_and_see_the_clock(store: SqliteStore) -> None:
    writer = Writer(store, context=CONTEXT, clock=lambda: 12.5).start()
    assert writer.submit_and_wait(put, ("name", "value")) == 12.5
    assert writer.read(look, "name") == "value"
    writer.stop()
    assert writer.stats.num_operations == 1


def test_one_commit_serves_many_and_order_is_kept(store: SqliteStore) -> None:
    writer = Writer(store, context=CONTEXT, clock=lambda: 0.0).start()
    started, goes_on = threading.Event(), threading.Event()

    def block(tx: Transaction, request: None, /, *, context, now_unix_seconds: float) -> None:
        started.set()
        assert goes_on.wait(10)

    first = writer.submit(block, None)
    assert started.wait(10)
    futures = [writer.submit(put, ("name", f"{index}")) for index in range(MAX_BATCH + 1)]
    goes_on.set()
    for future in (first, *futures):
        future.result(10)
    assert writer.read(look, "name") == f"{MAX_BATCH}"
    writer.stop()
    assert writer.stats.num_batches == 3


@pytest.mark.parametrize("error", [RefusedError("no"), KeyError("bug")])
def test_a_failing_operation_takes_only_its_own_back(store: SqliteStore, error: Exception) -> None:
    writer = Writer(store, context=CONTEXT, clock=lambda: 0.0).start()
    futures = [
        writer.submit(put, ("a", "1")),
        writer.submit(fail, error),
        writer.submit(put, ("b", "2")),
    ]
    with pytest.raises(type(error)):
        futures[1].result(10)
    futures[2].result(10)
    assert [writer.read(look, name) for name in ("a", "failed", "b")] == ["1", "", "2"]
    writer.stop()


def test_a_row_that_breaks_a_constraint_at_the_commit_fails_alone(store: SqliteStore) -> None:
    """Leases are written with the commit: the thread lives, and only their operation fails."""

    def lease_of_no_run(
        tx: Transaction, request: LeaseRow, /, *, context, now_unix_seconds: float
    ) -> None:
        tx.insert_leases([request])

    writer = Writer(store, context=CONTEXT, clock=lambda: 0.0).start()
    futures = [writer.submit(put, ("a", "1")), writer.submit(lease_of_no_run, LEASE)]
    futures.append(writer.submit(put, ("b", "2")))
    with pytest.raises(sqlite3.IntegrityError):
        futures[1].result(10)
    assert [future.result(10) for future in (futures[0], futures[2])] == [0.0, 0.0]
    assert [writer.read(look, name) for name in ("a", "b")] == ["1", "2"]
    with store.read() as tx:
        assert tx.leases("no-run") == []
    writer.stop()


def test_a_store_that_cannot_write_fails_the_batch_and_recovers(store: SqliteStore) -> None:
    writer = Writer(store, context=CONTEXT, clock=lambda: 0.0).start()
    assert store._writer is not None
    pages = store._writer.execute("PRAGMA page_count").fetchone()[0]
    store._writer.execute(f"PRAGMA max_page_count = {pages + 1}")
    futures = [writer.submit(put, (f"{index}", "x" * 3000)) for index in range(20)]
    errors = [future.exception(10) for future in futures]
    full = [error for error in errors if error is not None]
    assert full and all(isinstance(error, UnavailableError) for error in full)
    assert {error.code for error in full} == {ErrorCode.DISK_FULL}
    store._writer.execute("PRAGMA max_page_count = 100000")
    writer.submit_and_wait(put, ("after", "works"))
    assert writer.read(look, "after") == "works"
    for index, error in enumerate(errors):
        assert bool(writer.read(look, f"{index}")) == (error is None)
    writer.stop()
    assert writer.stats.num_failed_batches >= 1


def test_stop_finishes_what_was_queued_and_refuses_more(store: SqliteStore) -> None:
    writer = Writer(store, context=CONTEXT, clock=lambda: 0.0).start()
    futures = [writer.submit(put, ("name", f"{index}")) for index in range(50)]
    writer.stop()
    writer.stop()
    assert all(future.done() for future in futures)
    with pytest.raises(UnavailableError, match="shutting down"):
        writer.submit(put, ("name", "late"))
    with store.read() as tx:
        assert tx.meta("name") == "49"
