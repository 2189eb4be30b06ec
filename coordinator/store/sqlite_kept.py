"""What the only writer keeps in memory: rows that it need not read again, and rows to be written
with the commit.

Each statement costs more than its microseconds: the driver lets go of the interpreter's lock, which
the event loop then takes, and inside a savepoint the first change of a page copies it. So rows that
nearly every operation reads (run, book, peers) are kept from one transaction to the next, and what
changes with every operation is written once per transaction by `SqliteTransaction.flush`: the
books, the journal's lines, the answers to request ids. After any rollback nothing kept is trusted.
"""

from dataclasses import dataclass, field

from coordinator.store.rows import BookRow, JournalRow, LeaseRow, RequestRow, RunRow
from coordinator.store.rows_membership import PeerRow
from protos.contract.telemetry import LeaseState

MAX_KEPT = 16_384
"""Peers, and last lease numbers; beyond that all of them are dropped and read again."""


@dataclass(frozen=True, slots=True)
class Mark:
    """Where the unwritten changes stood when a savepoint began."""

    book_by_run: dict[str, BookRow]
    num_lines: int
    num_lines_written: int
    num_requests: int
    num_requests_written: int


@dataclass(slots=True)
class Unwritten:
    """Changes of this transaction that wait for its commit. What had to be written earlier stays
    listed, because undoing a savepoint takes it out of the database again.
    """

    book_by_run: dict[str, BookRow] = field(default_factory=dict)
    lines: list[JournalRow] = field(default_factory=list)
    num_lines_written: int = 0
    requests: list[RequestRow] = field(default_factory=list)
    num_requests_written: int = 0
    request_by_key: dict[tuple[str, str], RequestRow] = field(default_factory=dict)
    """Those not written yet, by caller and request id."""

    def mark(self) -> Mark:
        """Before a savepoint."""
        return Mark(
            dict(self.book_by_run),
            len(self.lines),
            self.num_lines_written,
            len(self.requests),
            self.num_requests_written,
        )

    def return_to(self, mark: Mark) -> None:
        """After the savepoint was undone."""
        self.book_by_run = mark.book_by_run
        del self.lines[mark.num_lines :]
        self.num_lines_written = mark.num_lines_written
        del self.requests[mark.num_requests :]
        self.num_requests_written = mark.num_requests_written
        self.request_by_key = {
            (row.caller, row.request_id): row for row in self.requests[mark.num_requests_written :]
        }


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
