"""SQLite: runs, incarnations, directives, events, request ids, meta (guarantees: base_runs.py)."""

import sqlite3

from coordinator.store.rows import DirectiveRow, EventRow, IncarnationRow, RequestRow, RunRow
from coordinator.store.sqlite_kept import KeptRows
from coordinator.store.sqlite_table import Table, run_sql

RUNS = Table("runs", RunRow, key=("run_id",))
INCARNATIONS = Table("incarnation_records", IncarnationRow, key=("run_id", "incarnation"))
DIRECTIVES = Table("directives", DirectiveRow, key=("run_id", "directive_number"))
EVENTS = Table("events", EventRow, key=("event_id",), has_rowid=True)
REQUESTS = Table("request_ids", RequestRow, key=("caller", "request_id"))


class SqliteRuns:
    """Mixin of SqliteTransaction."""

    _connection: sqlite3.Connection
    _kept: KeptRows

    def insert_run(self, row: RunRow) -> None:
        RUNS.insert(self._connection, row)

    def update_run(self, row: RunRow) -> None:
        RUNS.upsert(self._connection, row)
        self._kept.run_by_id[row.run_id] = row

    def run(self, run_id: str) -> RunRow | None:
        row = self._kept.run_by_id.get(run_id)
        if row is None:
            row = RUNS.one(self._connection, run_id)
            if row is not None:
                self._kept.run_by_id[run_id] = row
        return row

    def runs(self) -> list[RunRow]:
        return RUNS.where(self._connection, "1 ORDER BY create_unix_ms, run_id")

    def insert_incarnation(self, row: IncarnationRow) -> None:
        INCARNATIONS.insert(self._connection, row)

    def incarnation(self, run_id: str, incarnation: int) -> IncarnationRow | None:
        return INCARNATIONS.one(self._connection, run_id, incarnation)

    def incarnations(self, run_id: str) -> list[IncarnationRow]:
        return INCARNATIONS.where(self._connection, "run_id = ? ORDER BY incarnation", run_id)

    def insert_directive(self, row: DirectiveRow) -> None:
        DIRECTIVES.insert(self._connection, row)

    def directive(self, run_id: str, directive_number: int) -> DirectiveRow | None:
        row = self._kept.directive_by_key.get((run_id, directive_number))
        if row is None:
            row = DIRECTIVES.one(self._connection, run_id, directive_number)
            if row is not None:
                self._kept.keep_directive(row)
        return row

    def directives(self, run_id: str) -> list[DirectiveRow]:
        return DIRECTIVES.where(self._connection, "run_id = ? ORDER BY directive_number", run_id)

    def insert_event(
        self, *, run_id: str, unix_ms: int, kind: str, peer_id: str, text: str
    ) -> None:
        row = EventRow(
            event_id=0, run_id=run_id, unix_ms=unix_ms, kind=kind, peer_id=peer_id, text=text
        )
        EVENTS.insert(self._connection, row)

    def events(
        self, run_id: str, *, after_event_id: int = 0, num_events: int = 200
    ) -> list[EventRow]:
        condition = "run_id = ? AND event_id > ? ORDER BY event_id LIMIT ?"
        return EVENTS.where(self._connection, condition, run_id, after_event_id, num_events)

    def newest_events(self, run_id: str, *, num_events: int = 200) -> list[EventRow]:
        condition = "run_id = ? ORDER BY event_id DESC LIMIT ?"
        return EVENTS.where(self._connection, condition, run_id, num_events)[::-1]

    def insert_request(self, row: RequestRow) -> None:
        unwritten = self._kept.unwritten
        unwritten.request_by_key[row.caller, row.request_id] = row
        unwritten.num_changes += 1

    def request(self, caller: str, request_id: str) -> RequestRow | None:
        unwritten = self._kept.unwritten.request_by_key.get((caller, request_id))
        return unwritten or REQUESTS.one(self._connection, caller, request_id)

    def write_requests(self) -> None:
        """Write the answers that wait."""
        rows = self._kept.unwritten.request_by_key
        REQUESTS.insert_many(self._connection, list(rows.values()))
        rows.clear()

    def prune_requests(self, *, before_unix_ms: int, num_requests: int) -> int:
        self.write_requests()
        sql = (
            "DELETE FROM request_ids WHERE (caller, request_id) IN "
            "(SELECT caller, request_id FROM request_ids WHERE store_unix_ms < ? LIMIT ?)"
        )
        return run_sql(self._connection, sql, (before_unix_ms, num_requests)).rowcount

    def meta(self, name: str) -> str:
        value = self._kept.meta_by_name.get(name)
        if value is None:
            sql = "SELECT value FROM meta WHERE name = ?"
            found = run_sql(self._connection, sql, (name,)).fetchone()
            value = self._kept.meta_by_name[name] = "" if found is None else str(found[0])
        return value

    def set_meta(self, name: str, value: str) -> None:
        sql = (
            "INSERT INTO meta (name, value) VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value "
            "= excluded.value"
        )
        run_sql(self._connection, sql, (name, value))
        self._kept.meta_by_name[name] = value
