"""What every store guarantees; the conformance suite (tests/coordinator/store/conformance.py)
checks each sentence.

- One writer: `Store.write` is entered by one thread at a time (operations/writer.py); it is one
  transaction.
- Durable: when `write` has returned, the changes survive SIGKILL, and power loss as far as fsync
  holds.
- All or nothing: an exception inside `write` leaves no trace; one inside `Transaction.savepoint`
  leaves none of what was done since the savepoint, and the transaction goes on.
- Readers see the newest committed state, whole; they never wait for the writer nor it for them.
- A store that cannot write (disk full) raises UnavailableError and works again when it can; one
  that cannot be read raises CorruptDataError; a data directory in use raises MachineError and names
  the process.
- Constraint violations are bugs of the caller and come out as the driver raised them.

`Transaction` is the sum of four groups of typed methods, one file each, so that no file grows
beyond reading. SQL lives nowhere else. Methods named after a thing return it or None; plural ones
return all in the stated order.
"""

from contextlib import AbstractContextManager
from typing import Protocol

from coordinator.store.base_ledger import LedgerTransaction
from coordinator.store.base_membership import MembershipTransaction
from coordinator.store.base_runs import RunsTransaction
from coordinator.store.base_studies import StudiesTransaction


class UndoNeededError(Exception):
    """Something was changed and must be undone: give the transaction up and use savepoints in
    another.
    """


class Transaction(
    RunsTransaction, LedgerTransaction, MembershipTransaction, StudiesTransaction, Protocol
):
    """Everything that can be read and written inside one transaction."""

    def savepoint(self) -> AbstractContextManager[None]:
        """Scope whose changes are undone if it is left by an exception, which is passed on."""

    def hopeful_scope(self) -> AbstractContextManager[None]:
        """Scope that cannot undo anything and costs next to nothing: if it is left by an exception
        after a change, it raises UndoNeededError instead, and the transaction must not be
        committed.
        """


class Store(Protocol):
    """A place that keeps rows."""

    def write(self) -> AbstractContextManager[Transaction]:
        """Open the one write transaction; commit durably at the end, roll back on an exception."""

    def read(self) -> AbstractContextManager[Transaction]:
        """Open a read-only transaction on the newest committed state; may be called from any
        thread.
        """

    def close(self) -> None:
        """Give the files back. Afterwards every call raises."""
