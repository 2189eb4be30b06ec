"""What the only writer keeps in memory: rows that it need not read again, and rows to be written
with the commit.

Each statement costs more than its microseconds: the driver lets go of the interpreter's lock, which
the event loop then takes, and inside a savepoint the first change of a page copies it. So rows that
nearly every operation reads (run, book, peers, active leases, returned ranges, directives) are kept
from one transaction to the next, and what changes with every operation is written once per
transaction by `SqliteTransaction.flush`, many rows a statement: books, leases, returned ranges, the
journal's lines, the answers to request ids. After any rollback nothing kept is trusted.
"""

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from coordinator.store.rows import (
    BookRow,
    DirectiveRow,
    JournalRow,
    LeaseRow,
    RequestRow,
    ReturnedRow,
    RunRow,
)
from coordinator.store.rows_membership import PeerRow
from protos.contract.telemetry import LeaseState

MAX_KEPT = 16_384
"""Peers, and last lease numbers; beyond that all of them are dropped and read again."""
MAX_KEPT_DIRECTIVES = 64
"""Each holds a roster."""

LeaseKey = tuple[str, int, str, int]
"""Run, incarnation, peer, number."""
RangeKey = tuple[int, int]
"""Schedule position and first window."""


@dataclass(slots=True)
class Unwritten:
    """Changes of this transaction that wait until it is flushed: before its commit, before a
    savepoint, and before a statement that has to see them.
    """

    num_changes: int = 0
    """Since the transaction began, written ones included."""
    book_by_run: dict[str, BookRow] = field(default_factory=dict)
    lines: list[JournalRow] = field(default_factory=list)
    request_by_key: dict[tuple[str, str], RequestRow] = field(default_factory=dict)
    """By caller and request id."""
    new_leases: dict[LeaseKey, LeaseRow] = field(default_factory=dict)
    changed_leases: dict[LeaseKey, LeaseRow] = field(default_factory=dict)
    returned_before: dict[str, dict[RangeKey, ReturnedRow | None]] = field(default_factory=dict)
    """By run: what is stored under every key that was touched; what shall be is in
    `KeptRows.returned_by_run`.
    """


class ReturnedRanges:
    """All returned ranges of a run in schedule order, as this transaction has left them."""

    def __init__(self, rows: Iterable[ReturnedRow]) -> None:
        self._row_by_key: dict[RangeKey, ReturnedRow] = {}
        self._keys_by_cause: dict[str, list[RangeKey]] = defaultdict(list)
        for row in rows:
            self.put(row)

    def row(self, key: RangeKey) -> ReturnedRow | None:
        """The range that begins there."""
        return self._row_by_key.get(key)

    def put(self, row: ReturnedRow) -> None:
        """Add a range; none may begin where it does."""
        key = range_key(row)
        assert key not in self._row_by_key, f"returned range {row} overlaps another"
        self._row_by_key[key] = row
        insort(self._keys_by_cause[row.cause], key)

    def drop(self, key: RangeKey) -> None:
        """Take a range out if it is there."""
        row = self._row_by_key.pop(key, None)
        if row is not None:
            keys = self._keys_by_cause[row.cause]
            del keys[bisect_left(keys, key)]

    def first(self, cause: str, num_ranges: int) -> list[ReturnedRow]:
        """The first ones of a cause."""
        return [self._row_by_key[key] for key in self._keys_by_cause[cause][:num_ranges]]

    def of_chunk(self, schedule_position: int) -> list[ReturnedRow]:
        """Those of one place in the schedule."""
        found: list[RangeKey] = []
        for keys in self._keys_by_cause.values():
            begin = bisect_left(keys, (schedule_position, -1))
            found += keys[begin : bisect_left(keys, (schedule_position + 1, -1))]
        return [self._row_by_key[key] for key in sorted(found)]


def lease_key(row: LeaseRow) -> LeaseKey:
    """A lease's primary key."""
    return row.run_id, row.incarnation, row.peer_id, row.lease_number


def range_key(row: ReturnedRow) -> RangeKey:
    """What tells a returned range from the others of its run."""
    return row.schedule_position, row.begin_window


@dataclass(slots=True)
class KeptRows:
    """Newest rows, this transaction's changes included. A reader's transaction begins with an empty
    one.
    """

    run_by_id: dict[str, RunRow] = field(default_factory=dict)
    book_by_run: dict[str, BookRow] = field(default_factory=dict)
    peer_by_key: dict[tuple[str, str], PeerRow] = field(default_factory=dict)
    """By run and peer."""
    peers_by_run: dict[str, dict[str, PeerRow]] = field(default_factory=dict)
    """All peers of a run, for runs whose peers were listed: every tick lists them."""
    lease_number_by_key: dict[tuple[str, int, str], int] = field(default_factory=dict)
    """Highest number used, by run, incarnation and peer."""
    active_by_peer: dict[tuple[str, str], dict[tuple[int, int], LeaseRow]] = field(
        default_factory=dict
    )
    """Active leases by run and peer, then by incarnation and number."""
    returned_by_run: dict[str, ReturnedRanges] = field(default_factory=dict)
    """For runs whose returned ranges were asked for: few, because neighbours are joined."""
    directive_by_key: dict[tuple[str, int], DirectiveRow] = field(default_factory=dict)
    """By run and number."""
    meta_by_name: dict[str, str] = field(default_factory=dict)
    unwritten: Unwritten = field(default_factory=Unwritten)

    def forget(self) -> None:
        """Drop everything that was read or written; the unwritten changes are the caller's
        business.
        """
        for kept in (
            self.run_by_id,
            self.book_by_run,
            self.peer_by_key,
            self.peers_by_run,
            self.lease_number_by_key,
            self.active_by_peer,
            self.returned_by_run,
            self.directive_by_key,
            self.meta_by_name,
        ):
            kept.clear()

    def keep_peer(self, row: PeerRow) -> None:
        """Remember a peer's row."""
        if len(self.peer_by_key) >= MAX_KEPT:
            self.peer_by_key.clear()
        self.peer_by_key[row.run_id, row.peer_id] = row
        if row.run_id in self.peers_by_run:
            self.peers_by_run[row.run_id][row.peer_id] = row

    def keep_peers(self, run_id: str, rows: list[PeerRow]) -> None:
        """Remember all peers of a run."""
        if sum(map(len, self.peers_by_run.values())) + len(rows) > MAX_KEPT:
            self.peers_by_run.clear()
        if len(rows) <= MAX_KEPT:
            self.peers_by_run[run_id] = {row.peer_id: row for row in rows}

    def keep_lease_number(self, key: tuple[str, int, str], lease_number: int) -> None:
        """Remember the highest number of a peer in an incarnation."""
        if len(self.lease_number_by_key) >= MAX_KEPT:
            self.lease_number_by_key.clear()
        self.lease_number_by_key[key] = lease_number

    def keep_directive(self, row: DirectiveRow) -> None:
        """Remember a directive, which never changes."""
        if len(self.directive_by_key) >= MAX_KEPT_DIRECTIVES:
            self.directive_by_key.clear()
        self.directive_by_key[row.run_id, row.directive_number] = row

    def keep_active(
        self, key: tuple[str, str], rows: list[LeaseRow]
    ) -> dict[tuple[int, int], LeaseRow]:
        """Remember a peer's active leases."""
        if len(self.active_by_peer) >= MAX_KEPT:
            self.active_by_peer.clear()
        kept = self.active_by_peer[key] = {(row.incarnation, row.lease_number): row for row in rows}
        return kept

    def change_lease(self, row: LeaseRow) -> None:
        """A lease was written."""
        kept = self.active_by_peer.get((row.run_id, row.peer_id))
        if kept is None:
            return
        if row.state == LeaseState.ACTIVE:
            kept[row.incarnation, row.lease_number] = row
        else:
            kept.pop((row.incarnation, row.lease_number), None)
