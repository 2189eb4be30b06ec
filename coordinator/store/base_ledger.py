"""Transaction methods about the ledger: book, leases, returned ranges, journal, certificates,
credits, acceptor.
"""

from collections.abc import Iterable
from typing import Protocol

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


class LedgerTransaction(Protocol):
    """Leases and what was credited. The operations keep rows and totals in step within one
    transaction.
    """

    def insert_book(self, row: BookRow) -> None:
        """Open a run's ledger."""

    def update_book(self, row: BookRow) -> None:
        """Replace the totals."""

    def book(self, run_id: str) -> BookRow | None:
        """The totals of a run."""

    def add_peer_totals(
        self,
        run_id: str,
        peer_id: str,
        *,
        credited: int = 0,
        uncredited: int = 0,
        rolled_back: int = 0,
    ) -> None:
        """Add tokens to a peer's totals, which begin at zero."""

    def peer_totals(self, run_id: str) -> list[PeerTotalRow]:
        """Totals of every peer that ever had one, ordered by peer_id."""

    def insert_leases(self, rows: Iterable[LeaseRow]) -> None:
        """Add leases; (run, incarnation, peer, number) must be new."""

    def update_lease(self, row: LeaseRow) -> None:
        """Change state, credited windows, expiry and reason of a lease; the rest of it never
        changes.
        """

    def lease(
        self, run_id: str, incarnation: int, peer_id: str, lease_number: int
    ) -> LeaseRow | None:
        """One lease."""

    def newest_lease_number(self, run_id: str, incarnation: int, peer_id: str) -> int:
        """Highest number used by this peer in this incarnation, 0 if none."""

    def active_leases(self, run_id: str, peer_id: str) -> list[LeaseRow]:
        """Active leases of one peer, by number."""

    def all_active_leases(self, run_id: str) -> list[LeaseRow]:
        """Active leases of a run, by peer and number."""

    def expired_candidates(
        self, run_id: str, *, now_unix_ms: int, num_leases: int
    ) -> list[LeaseRow]:
        """At most `num_leases` active leases whose time is over, oldest expiry first."""

    def leases_of_chunk(
        self, run_id: str, incarnation: int, schedule_position: int, *, windows: tuple[int, int]
    ) -> list[LeaseRow]:
        """All leases ever granted in one chunk of one pass in one incarnation, in any state, that
        share windows with [begin, end).
        """

    def renew_leases(
        self,
        run_id: str,
        incarnation: int,
        peer_id: str,
        lease_numbers: Iterable[int],
        *,
        expire_unix_ms: int,
    ) -> None:
        """Move the expiry of those of the leases that are active; others stay as they are."""

    def num_leases_by_state(self, run_id: str, incarnation: int) -> dict[str, int]:
        """How many leases of an incarnation are in each state."""

    def leases(self, run_id: str) -> list[LeaseRow]:
        """All leases of all incarnations, by incarnation, peer and number."""

    def insert_returned(self, rows: Iterable[ReturnedRow]) -> None:
        """Add free windows that were leased before; they must not overlap any other."""

    def delete_returned(self, rows: Iterable[ReturnedRow]) -> None:
        """Take rows out."""

    def returned(self, run_id: str, cause: str, *, num_ranges: int) -> list[ReturnedRow]:
        """At most `num_ranges` rows of a cause in schedule order."""

    def returned_of_chunk(self, run_id: str, schedule_position: int) -> list[ReturnedRow]:
        """All rows of one chunk of one pass, in window order."""

    def all_returned(self, run_id: str) -> list[ReturnedRow]:
        """All rows in schedule order."""

    def insert_journal(self, row: JournalRow) -> None:
        """Append one fact; its number is given by the store and rises."""

    def journal(self, run_id: str) -> list[JournalRow]:
        """The whole journal in order."""

    def insert_certificate(self, row: CertificateRow) -> None:
        """Store a certificate; (run, incarnation, outer_step) must be new."""

    def certificate(self, run_id: str, incarnation: int, outer_step: int) -> CertificateRow | None:
        """The certificate of an outer step in an incarnation, rolled back or not."""

    def live_certificate(self, run_id: str, outer_step: int) -> CertificateRow | None:
        """The certificate of an outer step that is not rolled back."""

    def live_certificates(
        self, run_id: str, *, from_outer_step: int = 0, num_certificates: int = 1_000_000
    ) -> list[CertificateRow]:
        """Certificates that are not rolled back, in order of outer_step."""

    def certificates(self, run_id: str) -> list[CertificateRow]:
        """All certificates, by incarnation and outer_step."""

    def mark_certificates_rolled_back(
        self, run_id: str, *, after_outer_step: int, rolled_back_by: int
    ) -> int:
        """Mark live certificates after an outer step; returns how many."""

    def insert_credits(self, rows: Iterable[CreditRow]) -> None:
        """Add credited ranges."""

    def live_credits_of_chunk(
        self, run_id: str, schedule_position: int, *, windows: tuple[int, int]
    ) -> list[CreditRow]:
        """Credited ranges of one chunk of one pass that are not rolled back and share windows with
        [begin, end), in window order.
        """

    def live_credits_after(self, run_id: str, outer_step: int) -> list[CreditRow]:
        """Credited ranges of later outer steps that are not rolled back."""

    def credits(self, run_id: str) -> list[CreditRow]:
        """All credited ranges, rolled back ones included."""

    def mark_credits_rolled_back(
        self, run_id: str, *, after_outer_step: int, rolled_back_by: int
    ) -> None:
        """Mark live credits after an outer step."""

    def insert_uncredited(self, rows: Iterable[UncreditedRow]) -> None:
        """Add ranges that could not be credited."""

    def uncredited(self, run_id: str) -> list[UncreditedRow]:
        """All of them, oldest first."""

    def acceptor(self, run_id: str, incarnation: int, outer_step: int) -> AcceptorRow | None:
        """The coordinator's promise and vote, None before the first."""

    def put_acceptor(self, row: AcceptorRow) -> None:
        """Insert or replace them."""

    def acceptors(self, run_id: str) -> list[AcceptorRow]:
        """All promises and votes of a run."""
