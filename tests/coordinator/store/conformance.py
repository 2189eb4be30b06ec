"""What every store must do (coordinator/store/base.py, sentence by sentence), over any backend."""

from dataclasses import replace

import pytest

from coordinator.store.base import Store, Transaction, UndoNeededError
from coordinator.store.rows import (
    AcceptorRow,
    BookRow,
    CertificateRow,
    CreditRow,
    DirectiveRow,
    IncarnationRow,
    JournalRow,
    LeaseRow,
    RequestRow,
    ReturnedRow,
    RunRow,
    UncreditedRow,
)
from coordinator.store.rows_membership import (
    AttestationRow,
    CheckpointRow,
    DutyRow,
    EvaluationRow,
    PeerRow,
    TokenRow,
)
from coordinator.store.rows_studies import ForecastRow, StudyRow, TrialRow
from protos.contract.errors import UsageError

RUN = RunRow("r", "d", b"s", "data", "dir", "p", "RUNNING", "why", 1, 0, 1, 10, 0, 0)
BOOK = BookRow("r", 4, 400, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
LEASE = LeaseRow("r", 1, "a", 1, 1, 0, 0, 3, 0, 4, "ACTIVE", 0, 100, 200, "")
RETURNED = ReturnedRow("r", 0, 0, 4, 0, 3, 1, "RELEASED")
CERTIFICATE = CertificateRow("r", 1, 1, 0, 2, 3, 2, 16, 12, 4, 16, 1.5, 100, 0, b"v", b"c")
CREDIT = CreditRow("r", 1, 1, "a", 1, 0, 0, 3, 0, 3, 0)
PEER = PeerRow(
    "r", "a", "q", b"k", "name", "JOINED", "", 1, 2, 3, b"s", 4, "{}", "{}", 0, 0, b"", False
)
TOKEN = TokenRow("t", "r", b"digest", 2, 0, 1, 2, False)
ATTESTATION = AttestationRow("r", 1, 2, "a", b"d", b"p", b"s", 5)
DUTY = DutyRow("u", "r", "EVALUATE", "OPEN", "", 0, 0, 0, 1, 0, 0, "")
EVALUATION = EvaluationRow("r", 1, 2, "u", "a", b"d", 1.25, 10, 40, 100, 6)
CHECKPOINT = CheckpointRow("r", 1, 2, b"d", "path", 10, "a", 7)
FORECAST = ForecastRow("r", 1, 2, 100, 120, 400, 6, "{}", "why")
STUDY = StudyRow("s", "r", "{}", "SIZES", "why", 5, 0)
TRIAL = TrialRow("s-0", "s", 0, "SIZE", "{}", 1e9, 1e4, "", "", 0, "", 0)


def fill(tx: Transaction) -> None:
    """A run with a book."""
    tx.insert_run(RUN)
    tx.insert_book(BOOK)


class StoreConformance:
    """Inherit, and provide a `store` fixture that gives an empty store."""

    def test_commit_keeps_and_an_exception_undoes_everything(self, store: Store) -> None:
        with store.write() as tx:
            fill(tx)
        with pytest.raises(KeyError), store.write() as tx:
            tx.update_run(replace(RUN, state="STOPPED"))
            raise KeyError
        with store.read() as tx:
            assert tx.run("r") == RUN
            assert tx.run("other") is None

    def test_a_savepoint_undoes_only_its_own(self, store: Store) -> None:
        with store.write() as tx:
            fill(tx)
            with pytest.raises(KeyError), tx.savepoint():
                tx.set_meta("name", "inner")
                raise KeyError
            with tx.savepoint():
                tx.set_meta("other", "kept")
        with store.read() as tx:
            assert (tx.meta("name"), tx.meta("other")) == ("", "kept")
            assert tx.runs() == [RUN]

    def test_rows_read_often_follow_savepoints_and_rollbacks(self, store: Store) -> None:
        """A store may keep these in memory; it must not show what was undone."""
        busy, done = replace(BOOK, active_tokens=8), replace(BOOK, credited_tokens=8)
        with store.write() as tx:
            fill(tx)
            tx.put_peer(PEER)
            tx.insert_leases([LEASE])
            assert tx.newest_lease_number("r", 1, "a") == 1
            tx.update_book(busy)
            with pytest.raises(KeyError), tx.savepoint():
                tx.update_book(done)
                tx.update_run(replace(RUN, state="STOPPED"))
                tx.put_peer(replace(PEER, state="LEFT"))
                tx.insert_leases([replace(LEASE, lease_number=2)])
                assert tx.newest_lease_number("r", 1, "a") == 2
                raise KeyError
            assert (tx.book("r"), tx.run("r"), tx.peer("r", "a")) == (busy, RUN, PEER)
            assert tx.peers("r") == [PEER]
            tx.put_peer(replace(PEER, peer_id="0"))
            assert [row.peer_id for row in tx.peers("r")] == ["0", "a"]
            assert tx.newest_lease_number("r", 1, "a") == 1
        with pytest.raises(KeyError), store.write() as tx:
            tx.update_book(done)
            tx.put_peer(replace(PEER, state="LEFT"))
            tx.set_meta("name", "value")
            raise KeyError
        with store.write() as tx:
            assert (tx.book("r"), tx.peer("r", "a"), tx.meta("name")) == (busy, PEER, "")
        with store.read() as tx:
            assert tx.book("r") == busy

    def test_a_hopeful_scope_says_when_it_cannot_undo(self, store: Store) -> None:
        with store.write() as tx:
            fill(tx)
            with pytest.raises(KeyError), tx.hopeful_scope():
                raise KeyError
            with tx.hopeful_scope():
                tx.set_meta("name", "kept")
        for change in (
            lambda tx: tx.set_meta("name", "changed"),
            lambda tx: tx.update_book(replace(BOOK, credited_tokens=8)),
            lambda tx: tx.insert_request(RequestRow("a", "1", "m", b"d", b"r", 1)),
        ):
            with pytest.raises(UndoNeededError), store.write() as tx, tx.hopeful_scope():
                change(tx)
                raise KeyError
        with store.read() as tx:
            assert (tx.meta("name"), tx.book("r"), tx.request("a", "1")) == ("kept", BOOK, None)

    def test_active_leases_follow_every_change(self, store: Store) -> None:
        second = replace(LEASE, lease_number=2, begin_window=4, end_window=6)
        with store.write() as tx:
            fill(tx)
            assert tx.active_leases("r", "a") == []
            tx.insert_leases([second, LEASE])
            assert tx.active_leases("r", "a") == [LEASE, second]
            tx.renew_leases("r", 1, "a", [2, 3], expire_unix_ms=900)
            tx.update_lease(replace(LEASE, credited_windows=1))
            expected = [replace(LEASE, credited_windows=1), replace(second, expire_unix_ms=900)]
            assert tx.active_leases("r", "a") == expected
            with pytest.raises(KeyError), tx.savepoint():
                tx.update_lease(replace(second, state="RELEASED", end_reason="why"))
                assert tx.active_leases("r", "a") == expected[:1]
                raise KeyError
            assert tx.active_leases("r", "a") == expected
        with store.read() as tx:
            assert tx.active_leases("r", "a") == expected

    def test_lines_and_answers_follow_savepoints(self, store: Store) -> None:
        """A store may write these with the commit; the order is kept and nothing undone comes
        back.
        """
        first, second = (
            RequestRow("a", "1", "m", b"d", b"r", 1),
            RequestRow("a", "2", "m", b"", b"", 2),
        )
        lines = [
            JournalRow(0, "r", number, "GRANT", *[0, 0, "", 0, 0, 0, 0, 0, 0, ""])
            for number in range(40)
        ]
        with store.write() as tx:
            fill(tx)
            tx.insert_request(first)
            tx.insert_journal(lines[0])
            with pytest.raises(KeyError), tx.savepoint():
                tx.insert_request(second)
                tx.insert_journal(lines[1])
                assert len(tx.journal("r")) == 2
                assert tx.prune_requests(before_unix_ms=0, num_requests=9) == 0
                assert tx.request("a", "2") == second
                raise KeyError
            assert tx.request("a", "1") == first
            assert tx.request("a", "2") is None
            for line in lines[2:]:
                tx.insert_journal(line)
        with pytest.raises(KeyError), store.write() as tx:
            tx.insert_request(second)
            tx.insert_journal(lines[1])
            raise KeyError
        with store.write() as tx:
            assert tx.request("a", "2") is None
        with store.read() as tx:
            assert tx.request("a", "1") == first
            assert [row.unix_ms for row in tx.journal("r")] == [0, *range(2, 40)]

    def test_numbers_beyond_64_bits_are_refused(self, store: Store) -> None:
        with store.write() as tx:
            fill(tx)
            with pytest.raises(UsageError, match="64 bits"):
                tx.certificate("r", 1, 2**64 - 1)

    def test_runs_records_and_directives(self, store: Store) -> None:
        record = IncarnationRow("r", 0, 0, 0, b"", b"p", b"s", 1)
        directive = DirectiveRow("r", 1, 0, b"p", b"s", 1)
        with store.write() as tx:
            fill(tx)
            tx.insert_incarnation(record)
            tx.insert_directive(directive)
            tx.update_run(replace(RUN, incarnation=1))
            assert tx.run("r") == replace(RUN, incarnation=1)
            assert tx.incarnation("r", 0) == record
            assert tx.incarnation("r", 1) is None
            assert tx.incarnations("r") == [record]
            assert tx.directive("r", 1) == directive
            assert tx.directives("r") == [directive]

    def test_events_come_in_order_and_by_page(self, store: Store) -> None:
        with store.write() as tx:
            for index in range(5):
                tx.insert_event(run_id="r", unix_ms=index, kind="k", peer_id="", text=f"{index}")
            first = tx.events("r", num_events=2)
            assert [event.text for event in first] == ["0", "1"]
            later = tx.events("r", after_event_id=first[-1].event_id)
            assert [event.text for event in later] == ["2", "3", "4"]
            assert [event.text for event in tx.newest_events("r", num_events=2)] == ["3", "4"]

    def test_request_ids_are_remembered_and_pruned(self, store: Store) -> None:
        rows = [RequestRow("a", f"{index}", "m", b"d", b"r", index) for index in range(4)]
        with store.write() as tx:
            for row in rows:
                tx.insert_request(row)
            assert tx.request("a", "2") == rows[2]
            assert tx.request("b", "2") is None
            assert tx.prune_requests(before_unix_ms=3, num_requests=2) == 2
            assert tx.prune_requests(before_unix_ms=3, num_requests=9) == 1
            assert tx.request("a", "3") == rows[3]

    def test_book_and_peer_totals(self, store: Store) -> None:
        with store.write() as tx:
            fill(tx)
            tx.update_book(replace(BOOK, credited_tokens=8))
            assert tx.book("r") == replace(BOOK, credited_tokens=8)
            tx.add_peer_totals("r", "a", credited=8, uncredited=4)
            tx.add_peer_totals("r", "a", credited=-8, rolled_back=8)
            (total,) = tx.peer_totals("r")
            assert (total.credited_tokens, total.uncredited_tokens) == (0, 4)
            assert total.rolled_back_tokens == 8

    def test_leases(self, store: Store) -> None:
        second = replace(LEASE, lease_number=2, begin_window=4, end_window=6, expire_unix_ms=300)
        other = replace(LEASE, peer_id="b", schedule_position=1)
        with store.write() as tx:
            fill(tx)
            tx.insert_leases([LEASE, second, other])
            assert tx.lease("r", 1, "a", 2) == second
            assert tx.newest_lease_number("r", 1, "a") == 2
            assert tx.newest_lease_number("r", 2, "a") == 0
            assert tx.active_leases("r", "a") == [LEASE, second]
            assert tx.all_active_leases("r") == [LEASE, second, other]
            assert tx.leases_of_chunk("r", 1, 0, windows=(3, 5)) == [LEASE, second]
            assert tx.leases_of_chunk("r", 1, 0, windows=(4, 9)) == [second]
            expired = tx.expired_candidates("r", now_unix_ms=250, num_leases=9)
            assert sorted(row.peer_id for row in expired) == ["a", "b"]
            tx.renew_leases("r", 1, "a", [1, 7], expire_unix_ms=900)
            assert tx.lease("r", 1, "a", 1) == replace(LEASE, expire_unix_ms=900)
            tx.update_lease(replace(second, state="RELEASED"))
            tx.renew_leases("r", 1, "a", [2], expire_unix_ms=900)
            assert tx.lease("r", 1, "a", 2) == replace(second, state="RELEASED")
            assert tx.num_leases_by_state("r", 1) == {"ACTIVE": 2, "RELEASED": 1}
            assert len(tx.leases("r")) == 3

    def test_returned_ranges(self, store: Store) -> None:
        later = replace(RETURNED, schedule_position=2)
        expired = replace(RETURNED, begin_window=4, end_window=5, cause="EXPIRED")
        with store.write() as tx:
            fill(tx)
            tx.insert_returned([later, expired, RETURNED])
            assert tx.returned("r", "RELEASED", num_ranges=9) == [RETURNED, later]
            assert tx.returned("r", "RELEASED", num_ranges=1) == [RETURNED]
            assert tx.returned_of_chunk("r", 0) == [RETURNED, expired]
            tx.delete_returned([RETURNED])
            assert tx.all_returned("r") == [expired, later]

    def test_leases_and_returned_ranges_follow_savepoints_and_rollbacks(self, store: Store) -> None:
        """A store may write these with the commit; what was undone neither shows nor is written."""
        moved = replace(RETURNED, end_window=RETURNED.end_window + 3, fence=7)
        later = replace(RETURNED, schedule_position=2)
        released = replace(LEASE, state="RELEASED", end_reason="asked")
        with store.write() as tx:
            fill(tx)
            tx.insert_leases([LEASE])
            tx.insert_returned([RETURNED])
            with pytest.raises(KeyError), tx.savepoint():
                tx.update_lease(released)
                tx.delete_returned([RETURNED])
                tx.insert_returned([later])
                assert (tx.active_leases("r", "a"), tx.all_returned("r")) == ([], [later])
                raise KeyError
            assert (tx.active_leases("r", "a"), tx.lease("r", 1, "a", 1)) == ([LEASE], LEASE)
            assert tx.returned("r", "RELEASED", num_ranges=9) == [RETURNED]
            tx.insert_returned([later])
            tx.delete_returned([later, RETURNED])
            tx.insert_returned([moved])
        with pytest.raises(KeyError), store.write() as tx:
            tx.update_lease(released)
            tx.delete_returned([moved])
            raise KeyError
        with store.read() as tx:
            assert (tx.leases("r"), tx.all_returned("r")) == ([LEASE], [moved])
        with store.write() as tx:
            assert tx.returned_of_chunk("r", 0) == [moved]
            tx.update_lease(released)
            tx.delete_returned([moved])
        with store.read() as tx:
            assert (tx.leases("r"), tx.all_returned("r")) == ([released], [])

    def test_journal_keeps_its_order(self, store: Store) -> None:
        with store.write() as tx:
            fill(tx)
            for kind in ("OPEN", "GRANT", "EXPIRE"):
                tx.insert_journal(JournalRow(0, "r", 1, kind, 1, 0, "a", 1, 1, 0, 3, 0, 4, ""))
            rows = tx.journal("r")
            assert [row.kind for row in rows] == ["OPEN", "GRANT", "EXPIRE"]
            assert rows[0].journal_number < rows[1].journal_number < rows[2].journal_number

    def test_certificates_and_credits_roll_back_by_outer_step(self, store: Store) -> None:
        second = replace(CERTIFICATE, outer_step=2)
        credit = replace(CREDIT, outer_step=2, begin_window=3, end_window=4)
        with store.write() as tx:
            fill(tx)
            tx.insert_certificate(CERTIFICATE)
            tx.insert_certificate(second)
            tx.insert_credits([CREDIT, credit])
            assert tx.live_credits_of_chunk("r", 0, windows=(0, 9)) == [CREDIT, credit]
            assert tx.live_credits_after("r", 1) == [credit]
            assert tx.mark_certificates_rolled_back("r", after_outer_step=1, rolled_back_by=2) == 1
            tx.mark_credits_rolled_back("r", after_outer_step=1, rolled_back_by=2)
            assert tx.live_certificate("r", 2) is None
            assert tx.certificate("r", 1, 2) == replace(second, rolled_back_by=2)
            assert tx.live_certificates("r") == [CERTIFICATE]
            assert tx.live_certificates("r", from_outer_step=2) == []
            again = replace(second, incarnation=2)
            tx.insert_certificate(again)
            assert tx.live_certificate("r", 2) == again
            assert len(tx.certificates("r")) == 3
            assert tx.live_credits_of_chunk("r", 0, windows=(2, 9)) == [CREDIT]
            assert tx.live_credits_of_chunk("r", 0, windows=(3, 9)) == []
            assert len(tx.credits("r")) == 2

    def test_uncredited_and_acceptor(self, store: Store) -> None:
        promise = AcceptorRow("r", 1, 2, 3, -1, b"", "")
        with store.write() as tx:
            fill(tx)
            tx.insert_uncredited([UncreditedRow(0, "r", 1, 1, "a", 1, 0, 3, 0, 4, "why")])
            assert [row.reason for row in tx.uncredited("r")] == ["why"]
            assert tx.acceptor("r", 1, 2) is None
            tx.put_acceptor(promise)
            tx.put_acceptor(replace(promise, vote_attempt=3, vote_value=b"v"))
            assert tx.acceptors("r") == [replace(promise, vote_attempt=3, vote_value=b"v")]

    def test_tokens_and_peers(self, store: Store) -> None:
        with store.write() as tx:
            fill(tx)
            tx.insert_token(TOKEN)
            tx.update_token(replace(TOKEN, is_revoked=True))
            assert tx.token("t") == replace(TOKEN, is_revoked=True)
            assert tx.token_by_secret_digest(b"digest") == replace(TOKEN, is_revoked=True)
            assert tx.token_by_secret_digest(b"no") is None
            tx.insert_token_use("t", "a", use_unix_ms=1)
            assert (tx.has_token_use("t", "a"), tx.has_token_use("t", "b")) == (True, False)
            tx.put_peer(PEER)
            tx.put_peer(replace(PEER, has_vote=True))
            assert tx.peer("r", "a") == replace(PEER, has_vote=True)
            assert tx.peers("r") == tx.peer_runs("a") == [replace(PEER, has_vote=True)]
            assert len(tx.tokens("r")) == 1

    def test_attestations_duties_evaluations_checkpoints(self, store: Store) -> None:
        with store.write() as tx:
            fill(tx)
            tx.put_attestation(ATTESTATION)
            tx.put_attestation(replace(ATTESTATION, state_digest=b"e"))
            assert tx.attestations("r", 1, 2) == [replace(ATTESTATION, state_digest=b"e")]
            for outer_step in (3, 4, 5):
                tx.put_attestation(replace(ATTESTATION, outer_step=outer_step))
            tx.prune_attestations("r", 1, "another", above_outer_step=0, keep=0)
            tx.prune_attestations("r", 1, ATTESTATION.peer_id, above_outer_step=2, keep=1)
            assert [row.outer_step for row in tx.all_attestations("r")] == [2, 5]
            tx.put_duty(DUTY)
            tx.put_duty(replace(DUTY, fence=1))
            assert tx.duty("u") == replace(DUTY, fence=1)
            assert len(tx.duties("r")) == 1
            tx.put_evaluation(EVALUATION)
            assert tx.evaluations("r") == [EVALUATION]
            tx.put_checkpoint(CHECKPOINT)
            assert tx.checkpoints("r") == [CHECKPOINT]
            tx.delete_checkpoint("r", 1, 2)
            assert tx.checkpoints("r") == []

    def test_forecasts_studies_and_trials(self, store: Store) -> None:
        with store.write() as tx:
            fill(tx)
            assert tx.newest_forecast("r") is None
            tx.put_forecast(replace(FORECAST, outer_step=3, make_unix_ms=7))
            tx.put_forecast(FORECAST)
            tx.put_forecast(replace(FORECAST, reason="again"))
            assert [row.outer_step for row in tx.forecasts("r")] == [2, 3]
            assert tx.newest_forecast("r") == replace(FORECAST, outer_step=3, make_unix_ms=7)
            tx.put_study(STUDY)
            tx.put_study(replace(STUDY, stage="DONE"))
            assert tx.study("s") == replace(STUDY, stage="DONE")
            assert tx.studies() == [replace(STUDY, stage="DONE")]
            tx.put_trial(replace(TRIAL, trial_id="s-1", trial_number=1))
            tx.put_trial(TRIAL)
            assert [row.trial_id for row in tx.trials("s")] == ["s-0", "s-1"]
            assert tx.trial("s-0") == TRIAL
            assert (tx.study("x"), tx.trial("x"), tx.trials("x")) == (None, None, [])

    def test_readers_see_the_newest_commit(self, store: Store) -> None:
        with store.read() as tx:
            assert tx.meta("name") == ""
        with store.write() as tx:
            tx.set_meta("name", "value")
        with store.read() as tx:
            assert tx.meta("name") == "value"
