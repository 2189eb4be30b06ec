"""SQLite: book, leases, returned ranges, journal, certificates, credits, acceptor (guarantees:
base_ledger.py).
"""

import sqlite3
from collections.abc import Iterable
from dataclasses import replace
from operator import attrgetter

from coordinator.store.rows import (
    AcceptorRow,
    BookRow,
    CertificateRow,
    CreditRow,
    JournalRow,
    LeaseRow,
    PeerTotalRow,
    ReturnedRow,
    UncreditedRow,
)
from coordinator.store.sqlite_kept import KeptRows, ReturnedRanges, lease_key, range_key
from coordinator.store.sqlite_table import Table, run_sql

BOOKS = Table("books", BookRow, key=("run_id",))
PEER_TOTALS = Table("peer_totals", PeerTotalRow, key=("run_id", "peer_id"))
LEASES = Table(
    "leases",
    LeaseRow,
    key=("run_id", "incarnation", "peer_id", "lease_number"),
    changing=("state", "credited_windows", "expire_unix_ms", "end_reason"),
)
RETURNED = Table(
    "returned_ranges", ReturnedRow, key=("run_id", "schedule_position", "begin_window")
)
JOURNAL = Table("journal", JournalRow, key=("journal_number",), has_rowid=True)
CERTIFICATES = Table("certificates", CertificateRow, key=("run_id", "incarnation", "outer_step"))
CREDITS = Table(
    "credits",
    CreditRow,
    key=("run_id", "schedule_position", "begin_window", "incarnation", "outer_step"),
)
UNCREDITED = Table("uncredited", UncreditedRow, key=("uncredited_id",), has_rowid=True)
ACCEPTOR = Table("acceptor", AcceptorRow, key=("run_id", "incarnation", "outer_step"))


_LEASE_NUMBER = attrgetter("lease_number")


class SqliteLedger:
    """Mixin of SqliteTransaction."""

    _connection: sqlite3.Connection
    _kept: KeptRows

    def insert_book(self, row: BookRow) -> None:
        BOOKS.insert(self._connection, row)

    def update_book(self, row: BookRow) -> None:
        unwritten = self._kept.unwritten
        unwritten.book_by_run[row.run_id] = row
        unwritten.num_changes += 1

    def book(self, run_id: str) -> BookRow | None:
        kept = self._kept
        row = kept.unwritten.book_by_run.get(run_id) or kept.book_by_run.get(run_id)
        if row is None:
            row = BOOKS.one(self._connection, run_id)
            if row is not None:
                self._kept.book_by_run[run_id] = row
        return row

    def add_peer_totals(
        self,
        run_id: str,
        peer_id: str,
        *,
        credited: int = 0,
        uncredited: int = 0,
        rolled_back: int = 0,
    ) -> None:
        sql = (
            "INSERT INTO peer_totals (run_id, peer_id, credited_tokens, uncredited_tokens, "
            "rolled_back_tokens) "
            "VALUES (?, ?, ?, ?, ?) ON CONFLICT (run_id, peer_id) DO UPDATE SET "
            "credited_tokens = credited_tokens + excluded.credited_tokens, "
            "uncredited_tokens = uncredited_tokens + excluded.uncredited_tokens, "
            "rolled_back_tokens = rolled_back_tokens + excluded.rolled_back_tokens"
        )
        run_sql(self._connection, sql, (run_id, peer_id, credited, uncredited, rolled_back))

    def peer_totals(self, run_id: str) -> list[PeerTotalRow]:
        return PEER_TOTALS.where(self._connection, "run_id = ? ORDER BY peer_id", run_id)

    def insert_leases(self, rows: Iterable[LeaseRow]) -> None:
        unwritten = self._kept.unwritten
        for row in rows:
            unwritten.new_leases[lease_key(row)] = row
            unwritten.num_changes += 1
            self._kept.change_lease(row)
            key = (row.run_id, row.incarnation, row.peer_id)
            newest = self._kept.lease_number_by_key.get(key)
            if newest is not None:
                self._kept.keep_lease_number(key, max(newest, row.lease_number))

    def update_lease(self, row: LeaseRow) -> None:
        unwritten, key = self._kept.unwritten, lease_key(row)
        if key in unwritten.new_leases:
            unwritten.new_leases[key] = row
        else:
            unwritten.changed_leases[key] = row
        unwritten.num_changes += 1
        self._kept.change_lease(row)

    def write_leases(self) -> None:
        """Write the leases that wait."""
        unwritten = self._kept.unwritten
        LEASES.insert_many(self._connection, list(unwritten.new_leases.values()))
        LEASES.upsert_many(self._connection, list(unwritten.changed_leases.values()))
        unwritten.new_leases.clear()
        unwritten.changed_leases.clear()

    def lease(
        self, run_id: str, incarnation: int, peer_id: str, lease_number: int
    ) -> LeaseRow | None:
        active = self._kept.active_by_peer.get((run_id, peer_id), {})
        row = active.get((incarnation, lease_number))
        if row is None:
            self.write_leases()
            row = LEASES.one(self._connection, run_id, incarnation, peer_id, lease_number)
        return row

    def newest_lease_number(self, run_id: str, incarnation: int, peer_id: str) -> int:
        key = (run_id, incarnation, peer_id)
        newest = self._kept.lease_number_by_key.get(key)
        if newest is None:
            self.write_leases()
            sql = (
                "SELECT MAX(lease_number) FROM leases "
                "WHERE run_id = ? AND incarnation = ? AND peer_id = ?"
            )
            newest = int(run_sql(self._connection, sql, key).fetchone()[0] or 0)
            self._kept.keep_lease_number(key, newest)
        return newest

    def active_leases(self, run_id: str, peer_id: str) -> list[LeaseRow]:
        kept = self._kept.active_by_peer.get((run_id, peer_id))
        if kept is None:
            self.write_leases()
            condition = "run_id = ? AND peer_id = ? AND state = 'ACTIVE'"
            rows = LEASES.where(
                self._connection, condition, run_id, peer_id, index="leases_active_by_peer"
            )
            kept = self._kept.keep_active((run_id, peer_id), rows)
        return sorted(kept.values(), key=_LEASE_NUMBER)

    def all_active_leases(self, run_id: str) -> list[LeaseRow]:
        self.write_leases()
        condition = "run_id = ? AND state = 'ACTIVE' ORDER BY peer_id, lease_number"
        return LEASES.where(self._connection, condition, run_id)

    def expired_candidates(
        self, run_id: str, *, now_unix_ms: int, num_leases: int
    ) -> list[LeaseRow]:
        self.write_leases()
        condition = (
            "run_id = ? AND expire_unix_ms <= ? AND state = 'ACTIVE' ORDER BY expire_unix_ms "
            "LIMIT ?"
        )
        return LEASES.where(self._connection, condition, run_id, now_unix_ms, num_leases)

    def leases_of_chunk(
        self, run_id: str, incarnation: int, schedule_position: int, *, windows: tuple[int, int]
    ) -> list[LeaseRow]:
        self.write_leases()
        condition = (
            "run_id = ? AND incarnation = ? AND schedule_position = ? "
            "AND end_window > ? AND begin_window < ?"
        )
        values = (run_id, incarnation, schedule_position, *windows)
        return LEASES.where(self._connection, condition, *values, index="leases_by_chunk")

    def renew_leases(
        self,
        run_id: str,
        incarnation: int,
        peer_id: str,
        lease_numbers: Iterable[int],
        *,
        expire_unix_ms: int,
    ) -> None:
        active = {
            row.lease_number: row
            for row in self.active_leases(run_id, peer_id)
            if row.incarnation == incarnation
        }
        for number in lease_numbers:
            if number in active:
                self.update_lease(replace(active[number], expire_unix_ms=expire_unix_ms))

    def num_leases_by_state(self, run_id: str, incarnation: int) -> dict[str, int]:
        self.write_leases()
        sql = (
            "SELECT state, COUNT(*) FROM leases WHERE run_id = ? AND incarnation = ? GROUP BY state"
        )
        return dict(run_sql(self._connection, sql, (run_id, incarnation)).fetchall())

    def leases(self, run_id: str) -> list[LeaseRow]:
        self.write_leases()
        condition = "run_id = ? ORDER BY incarnation, peer_id, lease_number"
        return LEASES.where(self._connection, condition, run_id)

    def insert_returned(self, rows: Iterable[ReturnedRow]) -> None:
        for row in rows:
            self._touch_returned(row).put(row)

    def delete_returned(self, rows: Iterable[ReturnedRow]) -> None:
        for row in rows:
            self._touch_returned(row).drop(range_key(row))

    def _returned(self, run_id: str) -> ReturnedRanges:
        ranges = self._kept.returned_by_run.get(run_id)
        if ranges is None:
            rows = RETURNED.where(self._connection, "run_id = ?", run_id)
            ranges = self._kept.returned_by_run[run_id] = ReturnedRanges(rows)
        return ranges

    def _touch_returned(self, row: ReturnedRow) -> ReturnedRanges:
        """The ranges of its run, of which the one that begins with it is about to change."""
        ranges, key, unwritten = self._returned(row.run_id), range_key(row), self._kept.unwritten
        unwritten.returned_before.setdefault(row.run_id, {}).setdefault(key, ranges.row(key))
        unwritten.num_changes += 1
        return ranges

    def write_returned(self) -> None:
        """Write the returned ranges that differ from what is stored."""
        delete = (
            "DELETE FROM returned_ranges WHERE run_id = ? AND schedule_position = ? AND "
            "begin_window = ?"
        )
        changed: list[ReturnedRow] = []
        for run_id, stored_by_key in self._kept.unwritten.returned_before.items():
            ranges = self._kept.returned_by_run[run_id]
            for key, stored in stored_by_key.items():
                row = ranges.row(key)
                if row is None and stored is not None:
                    run_sql(self._connection, delete, (run_id, *key))
                elif row is not None and row != stored:
                    changed.append(row)
        RETURNED.upsert_many(self._connection, changed)
        self._kept.unwritten.returned_before.clear()

    def returned(self, run_id: str, cause: str, *, num_ranges: int) -> list[ReturnedRow]:
        return self._returned(run_id).first(cause, num_ranges)

    def returned_of_chunk(self, run_id: str, schedule_position: int) -> list[ReturnedRow]:
        return self._returned(run_id).of_chunk(schedule_position)

    def all_returned(self, run_id: str) -> list[ReturnedRow]:
        self.write_returned()
        condition = "run_id = ? ORDER BY schedule_position, begin_window"
        return RETURNED.where(self._connection, condition, run_id)

    def insert_journal(self, row: JournalRow) -> None:
        unwritten = self._kept.unwritten
        unwritten.lines.append(row)
        unwritten.num_changes += 1

    def write_journal(self) -> None:
        """Write the lines that wait."""
        lines = self._kept.unwritten.lines
        JOURNAL.insert_many(self._connection, lines)
        lines.clear()

    def write_books(self) -> None:
        """Write the books that wait."""
        books = self._kept.unwritten.book_by_run
        for row in books.values():
            BOOKS.update(self._connection, row)
        self._kept.book_by_run |= books
        books.clear()

    def journal(self, run_id: str) -> list[JournalRow]:
        self.write_journal()
        return JOURNAL.where(self._connection, "run_id = ? ORDER BY journal_number", run_id)

    def insert_certificate(self, row: CertificateRow) -> None:
        CERTIFICATES.insert(self._connection, row)

    def certificate(self, run_id: str, incarnation: int, outer_step: int) -> CertificateRow | None:
        return CERTIFICATES.one(self._connection, run_id, incarnation, outer_step)

    def live_certificate(self, run_id: str, outer_step: int) -> CertificateRow | None:
        condition = "run_id = ? AND outer_step = ? AND rolled_back_by = 0"
        found = CERTIFICATES.where(self._connection, condition, run_id, outer_step)
        return found[0] if found else None

    def live_certificates(
        self, run_id: str, *, from_outer_step: int = 0, num_certificates: int = 1_000_000
    ) -> list[CertificateRow]:
        condition = (
            "run_id = ? AND outer_step >= ? AND rolled_back_by = 0 ORDER BY outer_step LIMIT ?"
        )
        return CERTIFICATES.where(
            self._connection, condition, run_id, from_outer_step, num_certificates
        )

    def certificates(self, run_id: str) -> list[CertificateRow]:
        return CERTIFICATES.where(
            self._connection, "run_id = ? ORDER BY incarnation, outer_step", run_id
        )

    def mark_certificates_rolled_back(
        self, run_id: str, *, after_outer_step: int, rolled_back_by: int
    ) -> int:
        sql = (
            "UPDATE certificates SET rolled_back_by = ? WHERE run_id = ? AND outer_step > ? AND "
            "rolled_back_by = 0"
        )
        return run_sql(self._connection, sql, (rolled_back_by, run_id, after_outer_step)).rowcount

    def insert_credits(self, rows: Iterable[CreditRow]) -> None:
        CREDITS.insert_all(self._connection, rows)

    def live_credits_of_chunk(
        self, run_id: str, schedule_position: int, *, windows: tuple[int, int]
    ) -> list[CreditRow]:
        condition = (
            "run_id = ? AND schedule_position = ? AND end_window > ? AND begin_window < ? "
            "AND rolled_back_by = 0 ORDER BY begin_window"
        )
        return CREDITS.where(self._connection, condition, run_id, schedule_position, *windows)

    def live_credits_after(self, run_id: str, outer_step: int) -> list[CreditRow]:
        condition = "run_id = ? AND outer_step > ? AND rolled_back_by = 0 ORDER BY outer_step"
        return CREDITS.where(self._connection, condition, run_id, outer_step)

    def credits(self, run_id: str) -> list[CreditRow]:
        condition = "run_id = ? ORDER BY incarnation, outer_step, schedule_position, begin_window"
        return CREDITS.where(self._connection, condition, run_id)

    def mark_credits_rolled_back(
        self, run_id: str, *, after_outer_step: int, rolled_back_by: int
    ) -> None:
        sql = (
            "UPDATE credits SET rolled_back_by = ? WHERE run_id = ? AND outer_step > ? AND "
            "rolled_back_by = 0"
        )
        run_sql(self._connection, sql, (rolled_back_by, run_id, after_outer_step))

    def insert_uncredited(self, rows: Iterable[UncreditedRow]) -> None:
        UNCREDITED.insert_all(self._connection, rows)

    def uncredited(self, run_id: str) -> list[UncreditedRow]:
        return UNCREDITED.where(self._connection, "run_id = ? ORDER BY uncredited_id", run_id)

    def acceptor(self, run_id: str, incarnation: int, outer_step: int) -> AcceptorRow | None:
        return ACCEPTOR.one(self._connection, run_id, incarnation, outer_step)

    def put_acceptor(self, row: AcceptorRow) -> None:
        ACCEPTOR.upsert(self._connection, row)

    def acceptors(self, run_id: str) -> list[AcceptorRow]:
        return ACCEPTOR.where(
            self._connection, "run_id = ? ORDER BY incarnation, outer_step", run_id
        )
