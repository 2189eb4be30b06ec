"""Second half of `ledger verify`: every row and total in the store against what the replay gave,
and members' states.

Works on single windows, like the replay (ledger_verify.py). Order of the checks: leases, returned
ranges, credits, uncredited ranges, totals, the coordinator's votes, attested states.
"""

from collections import Counter, defaultdict
from collections.abc import Callable

from coordinator.operations.common import load_book
from coordinator.operations.ledger_replay import Books, Window, parse, window_list
from coordinator.store.base import Transaction
from protos.contract.certificate import Tag
from protos.contract.ids import COORDINATOR_VOTER
from protos.contract.signing import has_valid_signature
from protos.muster.v1 import common_pb2, rounds_pb2

Fail = Callable[[str], None]


def compare_rows(tx: Transaction, run_id: str, books: Books, fail: Fail) -> None:
    """Compare everything that the store derives from journal and certificates."""
    _compare_leases(tx, run_id, books, fail)
    _compare_returned(tx, run_id, books, fail)
    _compare_credits(tx, run_id, books, fail)
    _compare_uncredited(tx, run_id, books, fail)
    _compare_certificates(tx, run_id, books, fail)
    _compare_book(tx, run_id, books, fail)
    _compare_peers(tx, run_id, books, fail)
    _compare_votes(tx, run_id, fail)


def _compare_leases(tx: Transaction, run_id: str, books: Books, fail: Fail) -> None:
    rows = {(row.incarnation, row.peer_id, row.lease_number): row for row in tx.leases(run_id)}
    for key in sorted(set(books.windows_by_lease) - set(rows)):
        fail(f"lease {key[2]} of {key[1]} in incarnation {key[0]} was granted but is not stored")
    for key, row in rows.items():
        name = f"lease {key[2]} of {key[1]} in incarnation {key[0]}"
        if key not in books.windows_by_lease:
            fail(f"{name} is stored but was never granted")
            continue
        windows = books.windows_by_lease[key]
        if window_list(row.data_pass, row.chunk_index, row.begin_window, row.end_window) != windows:
            fail(f"{name} is stored with other windows than were granted")
        if row.fence != books.fence_by_lease[key]:
            fail(
                f"{name} is stored with fence {row.fence}; it was granted "
                f"{books.fence_by_lease[key]}"
            )
        credited = books.num_credited_by_lease[key]
        if row.credited_windows != credited:
            fail(
                f"{name} is stored with {row.credited_windows} credited windows; certificates "
                f"give {credited}"
            )
        open_state = "COMMITTED" if credited == len(windows) else "ACTIVE"
        state = books.end_by_lease.get(key, open_state)
        if row.state != state:
            fail(f"{name} is stored as {row.state}; its events give {state}")


def _compare_returned(tx: Transaction, run_id: str, books: Books, fail: Fail) -> None:
    cause_by_window: dict[Window, str] = {}
    for row in tx.all_returned(run_id):
        for window in window_list(row.data_pass, row.chunk_index, row.begin_window, row.end_window):
            if window in cause_by_window:
                fail(f"returned window {window} is stored twice")
            cause_by_window[window] = row.cause
            if row.fence < books.fence.get(window, 0):
                fail(
                    f"returned window {window} has fence {row.fence}, below "
                    f"{books.fence.get(window, 0)}"
                )
    for window in sorted(set(cause_by_window) | set(books.status)):
        status = books.status.get(window, "never leased")
        found = cause_by_window.get(window)
        expected = status if status in ("RELEASED", "EXPIRED") else None
        if found != expected:
            fail(f"window {window} is returned as {found}; its events make it {status}")


def _compare_credits(tx: Transaction, run_id: str, books: Books, fail: Fail) -> None:
    found: dict[tuple[int, int, str, int, Window], int] = {}
    live: set[Window] = set()
    for row in tx.credits(run_id):
        for window in window_list(row.data_pass, row.chunk_index, row.begin_window, row.end_window):
            key = (row.incarnation, row.outer_step, row.peer_id, row.lease_number, window)
            if key in found or (row.rolled_back_by == 0 and window in live):
                fail(
                    f"window {window} is credited twice (outer step {row.outer_step}, "
                    f"{row.peer_id})"
                )
            found[key] = row.rolled_back_by
            if row.rolled_back_by == 0:
                live.add(window)
    for key in sorted(set(found) | set(books.credit_windows)):
        stored, expected = found.get(key), books.credit_windows.get(key)
        if stored == expected:
            continue
        name = f"credit of window {key[4]} to lease {key[3]} of {key[2]} in outer step {key[1]}"
        if expected is None:
            fail(f"{name} is stored but no certificate gives it")
        elif stored is None:
            fail(f"{name} is missing")
        else:
            fail(f"{name} is stored as rolled back by {stored}; events give {expected}")


def _compare_uncredited(tx: Transaction, run_id: str, books: Books, fail: Fail) -> None:
    found: Counter[tuple[int, int, str, Window]] = Counter()
    for row in tx.uncredited(run_id):
        for window in window_list(row.data_pass, row.chunk_index, row.begin_window, row.end_window):
            found[(row.incarnation, row.outer_step, row.peer_id, window)] += 1
        if not row.reason:
            fail(f"uncredited range {row.uncredited_id} has no reason")
    for key in sorted(set(found) | set(books.uncredited_windows)):
        if found[key] != books.uncredited_windows[key]:
            fail(
                f"window {key[3]} of {key[2]} in outer step {key[1]} is booked {found[key]} times "
                "as uncredited; "
                f"certificates give {books.uncredited_windows[key]}"
            )


def _compare_certificates(tx: Transaction, run_id: str, books: Books, fail: Fail) -> None:
    for row in tx.certificates(run_id):
        expected = books.rolled_back_certificates.get((row.incarnation, row.outer_step), 0)
        if row.rolled_back_by != expected:
            fail(
                f"certificate of incarnation {row.incarnation} outer step {row.outer_step} is "
                "stored as rolled back "
                f"by {row.rolled_back_by}; events give {expected}"
            )


def _compare_book(tx: Transaction, run_id: str, books: Books, fail: Fail) -> None:
    book = load_book(tx, run_id)
    counts = books.counts
    for name, found, windows in (
        ("granted", book.granted_tokens, len(books.status)),
        ("active", book.active_tokens, counts["ACTIVE"]),
        ("released", book.released_tokens, counts["RELEASED"]),
        ("expired", book.expired_tokens, counts["EXPIRED"]),
        ("credited", book.credited_tokens, counts["CREDITED"]),
        ("uncredited", book.uncredited_tokens, sum(books.uncredited_by_peer.values())),
        ("rolled back", book.rolled_back_tokens, sum(books.rolled_back_by_peer.values())),
        ("schedule", book.schedule_tokens, books.schedule_windows_by_step.get(books.outer_step, 0)),
    ):
        if found != windows * book.seq_len:
            fail(f"the book has {found} {name} tokens; events give {windows * book.seq_len}")
    if book.certified_outer_step != books.outer_step:
        fail(
            f"the book stands at outer step {book.certified_outer_step}; events give "
            f"{books.outer_step}"
        )


def _compare_peers(tx: Transaction, run_id: str, books: Books, fail: Fail) -> None:
    seq_len = load_book(tx, run_id).seq_len
    credited = Counter(peer_id for peer_id, _ in books.credited_by.values())
    rows = {row.peer_id: row for row in tx.peer_totals(run_id)}
    peers = (
        set(rows) | set(credited) | set(books.uncredited_by_peer) | set(books.rolled_back_by_peer)
    )
    for peer_id in sorted(peers):
        row = rows.get(peer_id)
        for name, found, windows in (
            ("credited", 0 if row is None else row.credited_tokens, credited[peer_id]),
            (
                "uncredited",
                0 if row is None else row.uncredited_tokens,
                books.uncredited_by_peer[peer_id],
            ),
            (
                "rolled back",
                0 if row is None else row.rolled_back_tokens,
                books.rolled_back_by_peer[peer_id],
            ),
        ):
            if found != windows * seq_len:
                fail(f"peer {peer_id} has {found} {name} tokens; events give {windows * seq_len}")


def _compare_votes(tx: Transaction, run_id: str, fail: Fail) -> None:
    signed: dict[tuple[int, int], tuple[int, bytes]] = {}
    for row in tx.certificates(run_id):
        certificate = parse(
            rounds_pb2.Certificate, row.certificate, name="a certificate", fail=fail
        )
        if any(vote.voter == COORDINATOR_VOTER for vote in certificate.votes):
            signed[(row.incarnation, row.outer_step)] = (certificate.attempt, certificate.value)
    voted: dict[tuple[int, int], tuple[int, bytes]] = {}
    for state in tx.acceptors(run_id):
        if state.vote_attempt > state.promised_attempt:
            fail(
                f"the coordinator voted in attempt {state.vote_attempt} of outer step "
                f"{state.outer_step} unpromised"
            )
        if state.vote_attempt >= 0:
            voted[(state.incarnation, state.outer_step)] = (state.vote_attempt, state.vote_value)
        if state.equivocation_reason:
            fail(state.equivocation_reason)
    for key in sorted(set(signed) | set(voted)):
        if signed.get(key) != voted.get(key):
            fail(
                f"the coordinator's vote for incarnation {key[0]} outer step {key[1]} does not "
                "match "
                "the stored certificate"
            )


def state_flaws(tx: Transaction, run_id: str) -> list[str]:
    """Sentences about members whose attested states differ, over every attested outer step; empty
    if all are equal.
    """
    flaws: list[str] = []
    key_by_peer = {row.peer_id: row.public_key for row in tx.peers(run_id)}
    peers_by_digest: dict[tuple[int, int], dict[bytes, list[str]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for row in tx.all_attestations(run_id):
        name = (
            f"attestation of {row.peer_id} for incarnation {row.incarnation} outer step "
            f"{row.outer_step}"
        )
        message = parse(common_pb2.Attestation, row.payload, name=name, fail=flaws.append)
        found = (
            message.run_id,
            message.incarnation,
            message.outer_step,
            message.peer_id,
            message.state_digest,
        )
        if found != (run_id, row.incarnation, row.outer_step, row.peer_id, row.state_digest):
            flaws.append(f"{name} is stored with other fields than were signed")
        key = key_by_peer.get(row.peer_id, b"")
        if not has_valid_signature(key, Tag.ATTESTATION, row.payload, row.signature):
            flaws.append(f"{name} has no valid signature")
        peers_by_digest[(row.incarnation, row.outer_step)][row.state_digest].append(row.peer_id)
    for certificate in tx.certificates(run_id):
        value = parse(rounds_pb2.RoundValue, certificate.value, name="a value", fail=flaws.append)
        state = (certificate.incarnation, certificate.outer_step - 1)
        if state in peers_by_digest:
            peers_by_digest[state][value.previous_state_digest].append("the next certificate")
    for record in tx.incarnations(run_id):
        state = (record.base_incarnation, record.to_outer_step)
        if record.base_state_digest and state in peers_by_digest:
            peers_by_digest[state][record.base_state_digest].append(
                f"the record of incarnation {record.incarnation}"
            )
    for (incarnation, outer_step), names_by_digest in sorted(peers_by_digest.items()):
        if len(names_by_digest) > 1:
            sides = "; ".join(
                f"{digest.hex()[:12]} by {', '.join(names)}"
                for digest, names in sorted(names_by_digest.items())
            )
            flaws.append(
                f"states differ at incarnation {incarnation} outer step {outer_step}: {sides}"
            )
    return flaws
