"""Rows that the only writer keeps in memory from one transaction to the next, so that it need not read them again.

A run's row, its book and its peers are read by nearly every operation, and each statement costs more than
its microseconds: the driver lets go of the interpreter's lock, which the event loop then takes. Everything is written
through at once, except the book: it changes with every operation and is written once per transaction
(`SqliteTransaction.flush`, before the commit). After any rollback nothing is trusted: `forget`.
"""

from dataclasses import dataclass, field

from coordinator.store.rows import BookRow, RunRow
from coordinator.store.rows_membership import PeerRow

MAX_KEPT = 16_384
"""Peers, and last lease numbers; beyond that all of them are dropped and read again."""


@dataclass(slots=True)
class KeptRows:
    """Newest rows, this transaction's changes included. A reader's transaction begins with an empty one."""

    run_by_id: dict[str, RunRow] = field(default_factory=dict)
    book_by_run: dict[str, BookRow] = field(default_factory=dict)
    unwritten_books: dict[str, BookRow] = field(default_factory=dict)
    """Books changed in this transaction; newer than those in `book_by_run`."""
    peer_by_key: dict[tuple[str, str], PeerRow] = field(default_factory=dict)
    """By run and peer."""
    lease_number_by_key: dict[tuple[str, int, str], int] = field(default_factory=dict)
    """Highest number used, by run, incarnation and peer."""
    meta_by_name: dict[str, str] = field(default_factory=dict)

    def forget(self, *, unwritten_books: dict[str, BookRow] | None = None) -> None:
        """Drop everything except these changed books."""
        for kept in (
            self.run_by_id,
            self.book_by_run,
            self.peer_by_key,
            self.lease_number_by_key,
            self.meta_by_name,
        ):
            kept.clear()
        self.unwritten_books = unwritten_books or {}

    def keep_peer(self, row: PeerRow) -> None:
        """Remember a peer's row."""
        if len(self.peer_by_key) >= MAX_KEPT:
            self.peer_by_key.clear()
        self.peer_by_key[row.run_id, row.peer_id] = row

    def keep_lease_number(self, key: tuple[str, int, str], lease_number: int) -> None:
        """Remember the highest number of a peer in an incarnation."""
        if len(self.lease_number_by_key) >= MAX_KEPT:
            self.lease_number_by_key.clear()
        self.lease_number_by_key[key] = lease_number
