"""First half of `ledger verify`: the journal replayed into the books, one small record per window.

Certificates are parsed anew, checked against their rosters, and credited by looking at single
windows (status, fence, holder). The books of this module are what the store's rows and totals
should say (ledger_compare.py).
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from coordinator.operations.common import OperationContext, load_book, load_run_data
from coordinator.store.base import Transaction
from coordinator.store.rows import BookRow, CertificateRow, JournalRow
from protos.contract.certificate import contributions_digest
from protos.contract.schedule_order import ScheduleOrder
from protos.contract.signing import check_certificate
from protos.muster.v1 import common_pb2, rounds_pb2

_MAX_VIOLATIONS = 200

_Message = TypeVar("_Message", bound=Message)

Window = tuple[int, int, int]
"""(data_pass, chunk_index, window)."""
LeaseKey = tuple[int, str, int]
"""(incarnation, peer_id, lease_number)."""


@dataclass(slots=True)
class Books:
    """What the replay knows so far."""

    status: dict[Window, str] = field(default_factory=dict)
    """ACTIVE, RELEASED, EXPIRED or CREDITED; absent = never leased."""
    fence: dict[Window, int] = field(default_factory=dict)
    holder: dict[Window, LeaseKey] = field(default_factory=dict)
    credited_by: dict[Window, tuple[str, int]] = field(default_factory=dict)
    """(peer_id, outer_step) of live credits."""
    windows_by_lease: dict[LeaseKey, list[Window]] = field(default_factory=dict)
    fence_by_lease: dict[LeaseKey, int] = field(default_factory=dict)
    end_by_lease: dict[LeaseKey, str] = field(default_factory=dict)
    num_credited_by_lease: Counter[LeaseKey] = field(default_factory=Counter)
    newest_number: Counter[tuple[int, str]] = field(default_factory=Counter)
    uncredited_by_peer: Counter[str] = field(default_factory=Counter)
    rolled_back_by_peer: Counter[str] = field(default_factory=Counter)
    uncredited_windows: Counter[tuple[int, int, str, Window]] = field(default_factory=Counter)
    """(incarnation, outer_step, peer_id, window)."""
    credit_windows: dict[tuple[int, int, str, int, Window], int] = field(default_factory=dict)
    """(incarnation, outer_step, peer_id, lease_number, window) -> incarnation that rolled it back,
    or 0.
    """
    seen_certificates: set[tuple[int, int]] = field(default_factory=set)
    rolled_back_certificates: dict[tuple[int, int], int] = field(default_factory=dict)
    schedule_windows_by_step: dict[int, int] = field(default_factory=lambda: {0: 0})
    incarnation: int = 0
    outer_step: int = 0
    directive_number: int = 0
    first_grants: list[Window] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    """Windows by status."""

    def move(self, window: Window, status: str) -> None:
        """Change a window's status and keep the counts."""
        before = self.status.get(window)
        if before is not None:
            self.counts[before] -= 1
        self.counts[status] += 1
        self.status[window] = status


def parse(kind: type[_Message], data: bytes, *, name: str, fail: Callable[[str], None]) -> _Message:
    """The message, or an empty one after saying that it cannot be read."""
    message: _Message = kind()
    try:
        message.ParseFromString(data)
    except DecodeError:
        fail(f"{name} cannot be read")
        message.Clear()
    return message


class Replay:
    """Replays one run; `violations` collects sentences."""

    def __init__(self, tx: Transaction, run_id: str, context: OperationContext) -> None:
        self._tx = tx
        self._run_id = run_id
        self._key = context.signing_key.public_key
        self._book: BookRow = load_book(tx, run_id)
        self._order: ScheduleOrder = load_run_data(tx, context, run_id).order
        self.books = Books()
        self.violations: list[str] = []
        self._certificates = {
            (row.incarnation, row.outer_step): row for row in tx.certificates(run_id)
        }
        self._directives = {
            row.directive_number: parse(
                common_pb2.Directive,
                row.payload,
                name=f"directive {row.directive_number}",
                fail=self.fail,
            )
            for row in tx.directives(run_id)
        }

    def fail(self, text: str) -> None:
        """Note a violation; the first few hundred say enough."""
        if len(self.violations) < _MAX_VIOLATIONS:
            self.violations.append(text)

    def run(self) -> None:
        """Replay the journal in order."""
        for row in self._tx.journal(self._run_id):
            if row.kind == "GRANT":
                self._grant(row)
            elif row.kind in ("RELEASE", "EXPIRE"):
                self._end(row)
            elif row.kind == "CERTIFICATE":
                self._certificate(row)
            elif row.kind == "ROLLBACK":
                self._rollback(row)
            elif row.kind != "OPEN":
                self.fail(f"journal line {row.journal_number} is of unknown kind {row.kind!r}")
            self._check_budget(row)
        for key in sorted(set(self._certificates) - self.books.seen_certificates):
            self.fail(
                f"certificate of incarnation {key[0]} outer step {key[1]} is not in the journal"
            )
        self._check_order()

    def _check_budget(self, row: JournalRow) -> None:
        counts = self.books.counts
        windows = counts["ACTIVE"] + counts["CREDITED"] + counts["EXPIRED"]
        if windows * self._book.seq_len > self._book.budget_tokens:
            self.fail(
                f"after journal line {row.journal_number} {windows * self._book.seq_len} tokens "
                "are leased, expired "
                f"or credited; the budget is {self._book.budget_tokens}"
            )

    def _grant(self, row: JournalRow) -> None:
        books = self.books
        key = (row.incarnation, row.peer_id, row.lease_number)
        name = f"lease {row.lease_number} of {row.peer_id} in incarnation {row.incarnation}"
        if row.incarnation != books.incarnation:
            self.fail(f"{name} was granted while incarnation {books.incarnation} was in force")
        if row.lease_number != books.newest_number[(row.incarnation, row.peer_id)] + 1:
            self.fail(
                f"{name} does not follow number "
                f"{books.newest_number[(row.incarnation, row.peer_id)]}"
            )
        books.newest_number[(row.incarnation, row.peer_id)] = row.lease_number
        if not 0 <= row.begin_window < row.end_window <= self._num_windows(row.chunk_index):
            self.fail(
                f"{name} covers windows {row.begin_window} to {row.end_window} outside its chunk"
            )
        windows = window_list(row.data_pass, row.chunk_index, row.begin_window, row.end_window)
        for window in windows:
            status = books.status.get(window)
            if status in ("ACTIVE", "CREDITED"):
                self.fail(f"{name} covers window {window}, which was {status} then")
            if row.fence <= books.fence.get(window, 0):
                self.fail(
                    f"{name} has fence {row.fence}, not above {books.fence.get(window, 0)} of "
                    f"{window}"
                )
            if status is None:
                books.first_grants.append(window)
            books.fence[window] = row.fence
            books.holder[window] = key
            books.move(window, "ACTIVE")
        books.windows_by_lease[key] = windows
        books.fence_by_lease[key] = row.fence

    def _num_windows(self, chunk_index: int) -> int:
        try:
            return self._order.num_windows(chunk_index)
        except IndexError:
            return 0

    def _end(self, row: JournalRow) -> None:
        books = self.books
        key = (row.incarnation, row.peer_id, row.lease_number)
        state = "RELEASED" if row.kind == "RELEASE" else "EXPIRED"
        name = f"lease {row.lease_number} of {row.peer_id} in incarnation {row.incarnation}"
        if key not in books.windows_by_lease:
            self.fail(f"{name} ended without having been granted")
            return
        if key in books.end_by_lease:
            self.fail(f"{name} ended twice: {books.end_by_lease[key]}, then {state}")
            return
        books.end_by_lease[key] = state
        for window in books.windows_by_lease[key]:
            if books.holder[window] == key and books.status[window] == "ACTIVE":
                books.move(window, state)

    def _certificate(self, row: JournalRow) -> None:
        books = self.books
        key = (row.incarnation, row.outer_step)
        name = f"certificate of incarnation {row.incarnation} outer step {row.outer_step}"
        stored = self._certificates.get(key)
        if stored is None:
            self.fail(f"{name} is in the journal but not stored")
            return
        if key in books.seen_certificates:
            self.fail(f"{name} is in the journal twice")
            return
        books.seen_certificates.add(key)
        certificate = parse(rounds_pb2.Certificate, stored.certificate, name=name, fail=self.fail)
        value = parse(rounds_pb2.RoundValue, certificate.value, name=name, fail=self.fail)
        self._check_proof(name, stored, certificate, value)
        credited, uncredited = self._count(row, certificate)
        seq_len = self._book.seq_len
        trained = (credited + uncredited) * seq_len
        total = books.schedule_windows_by_step.get(row.outer_step - 1, 0) + credited + uncredited
        books.schedule_windows_by_step[row.outer_step] = total
        for label, found, expected in (
            ("trained", stored.trained_tokens, trained),
            ("credited", stored.credited_tokens, credited * seq_len),
            ("uncredited", stored.uncredited_tokens, uncredited * seq_len),
            ("schedule", stored.schedule_tokens, total * seq_len),
        ):
            if found != expected:
                self.fail(
                    f"{name} is stored with {found} {label} tokens; its ranges give {expected}"
                )
        books.outer_step = row.outer_step
        books.directive_number = value.next_directive_number

    def _check_proof(
        self,
        name: str,
        stored: CertificateRow,
        certificate: rounds_pb2.Certificate,
        value: rounds_pb2.RoundValue,
    ) -> None:
        books = self.books
        if stored.value != certificate.value or stored.attempt != certificate.attempt:
            self.fail(f"{name} is stored with another value or attempt than it proves")
        if (value.run_id, value.incarnation, value.outer_step) != (
            self._run_id,
            stored.incarnation,
            stored.outer_step,
        ):
            self.fail(
                f"{name} proves outer step {value.outer_step} of incarnation {value.incarnation}"
            )
        if (value.incarnation, value.outer_step) != (books.incarnation, books.outer_step + 1):
            self.fail(
                f"{name} was taken while incarnation {books.incarnation} stood at outer step "
                f"{books.outer_step}"
            )
        if value.roster_directive_number != books.directive_number:
            self.fail(
                f"{name} was decided by roster {value.roster_directive_number}; "
                f"{books.directive_number} was in force"
            )
        directive = self._directives.get(value.roster_directive_number)
        flaw = f"directive {value.roster_directive_number} is not in the store"
        if directive is not None:
            flaw = check_certificate(
                certificate, directive=directive, coordinator_public_key=self._key
            )
        if contributions_digest(certificate.contributions) != value.contributions_digest:
            flaw = "its contributions are not those that were voted for"
        if flaw:
            self.fail(f"{name} proves nothing: {flaw}")

    def _count(self, row: JournalRow, certificate: rounds_pb2.Certificate) -> tuple[int, int]:
        """Credit window by window; returns (credited, uncredited) windows."""
        books = self.books
        credited = uncredited = 0
        name = f"contributions of outer step {row.outer_step}"
        contributions = parse(
            rounds_pb2.Contributions, certificate.contributions, name=name, fail=self.fail
        )
        for contribution in contributions.contributions:
            peer_id = contribution.peer_id
            for leased in contribution.ranges:
                lease = parse(
                    common_pb2.Lease,
                    leased.lease.payload,
                    name=f"a lease of {name}",
                    fail=self.fail,
                )
                key = (row.incarnation, peer_id, lease.lease_number)
                is_real = (lease.run_id, lease.incarnation, lease.peer_id) == (
                    self._run_id,
                    row.incarnation,
                    peer_id,
                ) and books.fence_by_lease.get(key) == lease.fence
                own = set(books.windows_by_lease[key]) if is_real else set()
                where = (lease.range.data_pass, lease.range.chunk_index)
                for window in window_list(*where, leased.begin_window, leased.end_window):
                    counts = window in own and books.holder[window] == key
                    if counts and books.status[window] != "CREDITED":
                        books.move(window, "CREDITED")
                        books.credited_by[window] = (peer_id, row.outer_step)
                        books.num_credited_by_lease[key] += 1
                        entry = (
                            row.incarnation,
                            row.outer_step,
                            peer_id,
                            lease.lease_number,
                            window,
                        )
                        books.credit_windows[entry] = 0
                        credited += 1
                    else:
                        books.uncredited_by_peer[peer_id] += 1
                        books.uncredited_windows[
                            (row.incarnation, row.outer_step, peer_id, window)
                        ] += 1
                        uncredited += 1
        return credited, uncredited

    def _rollback(self, row: JournalRow) -> None:
        books = self.books
        may_jump = bool(self._tx.meta(f"older_store/{self._run_id}"))  # a restored, older store
        if row.incarnation != books.incarnation + 1 and not (
            may_jump and row.incarnation > books.incarnation
        ):
            self.fail(f"incarnation {row.incarnation} follows incarnation {books.incarnation}")
        if row.outer_step > books.outer_step:
            self.fail(
                f"incarnation {row.incarnation} begins at {row.outer_step}, after "
                f"{books.outer_step}"
            )
        for window, (peer_id, outer_step) in list(books.credited_by.items()):
            if outer_step > row.outer_step:
                books.move(window, "RELEASED")
                books.rolled_back_by_peer[peer_id] += 1
                del books.credited_by[window]
        for window, status in books.status.items():
            if status == "EXPIRED":
                books.move(window, "RELEASED")
            elif status == "ACTIVE":
                self.fail(
                    f"window {window} was active over the start of incarnation {row.incarnation}"
                )
        for entry, rolled_back_by in books.credit_windows.items():
            if entry[1] > row.outer_step and not rolled_back_by:
                books.credit_windows[entry] = row.incarnation
        for key in books.seen_certificates:
            if key[1] > row.outer_step and key not in books.rolled_back_certificates:
                books.rolled_back_certificates[key] = row.incarnation
        books.incarnation = row.incarnation
        books.outer_step = row.outer_step
        books.directive_number = self._first_directive_number(row)

    def _first_directive_number(self, row: JournalRow) -> int:
        record = self._tx.incarnation(self._run_id, row.incarnation)
        if record is None:
            self.fail(f"the record of incarnation {row.incarnation} is not stored")
            return 0
        name = f"the record of incarnation {row.incarnation}"
        message = parse(common_pb2.IncarnationRecord, record.payload, name=name, fail=self.fail)
        if message.to_outer_step != row.outer_step:
            self.fail(
                f"the record of incarnation {row.incarnation} names outer step "
                f"{message.to_outer_step}"
            )
        directive = parse(
            common_pb2.Directive, message.directive.payload, name=name, fail=self.fail
        )
        number: int = directive.directive_number
        return number

    def _check_order(self) -> None:
        """Windows granted for the first time follow the schedule without a gap, and the frontier is
        where they end.
        """
        position, window = 0, 0
        for granted in self.books.first_grants:
            while window >= self._num_windows(self._order.chunk_at(position)[1]):
                position, window = position + 1, 0
            expected = (*self._order.chunk_at(position), window)
            if granted != expected:
                self.fail(f"window {granted} was granted where the schedule has {expected}")
                return
            window += 1
        if window and window >= self._num_windows(self._order.chunk_at(position)[1]):
            position, window = position + 1, 0
        found = (self._book.frontier_position, self._book.frontier_window)
        if found != (position, window):
            self.fail(f"the frontier is stored as {found}; the grants end at {(position, window)}")


def window_list(data_pass: int, chunk_index: int, begin: int, end: int) -> list[Window]:
    """The single windows of a range."""
    return [(data_pass, chunk_index, window) for window in range(begin, end)]
