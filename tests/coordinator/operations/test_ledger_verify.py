"""`ledger verify` names one corrupted row of each kind, whatever the books say otherwise."""

import hashlib

import pytest

from coordinator.store.rows_membership import AttestationRow, PeerRow
from coordinator.store.sqlite import SqliteStore
from protos.contract.certificate import Tag
from protos.muster.v1 import common_pb2
from tests.coordinator.operations.ledger_world import RUN_ID, World, lease_of, whole


def attest(world: World, peer: int, outer_step: int, digest: bytes) -> None:
    """Store a peer's attestation of a state."""
    key = world.keys[peer]
    payload = common_pb2.Attestation(
        run_id=RUN_ID,
        incarnation=world.incarnation,
        outer_step=outer_step,
        state_digest=digest,
        peer_id=key.peer_id,
    ).SerializeToString()
    signature = key.sign(Tag.ATTESTATION, payload)
    with world.store.write() as tx:
        tx.put_attestation(
            AttestationRow(
                RUN_ID,
                world.incarnation,
                outer_step,
                key.peer_id,
                digest,
                payload,
                signature,
                0,
            )
        )


def build_history() -> World:
    """A run with every kind of row: credited, late, released, expired, uncredited, rolled back,
    active, half vote.
    """
    world = World.create(num_peers=2, budget_windows=40, windows_by_chunk=(8, 8, 8, 8, 8))
    with world.store.write() as tx:
        for key in world.keys:
            tx.put_peer(
                PeerRow(
                    run_id=RUN_ID,
                    peer_id=key.peer_id,
                    p2p_peer_id="",
                    public_key=key.public_key,
                    name="peer",
                    state="VOTER",
                    state_reason="",
                    first_join_unix_ms=0,
                    join_unix_ms=0,
                    last_heartbeat_unix_ms=0,
                    session_key=b"",
                    session_expire_unix_ms=0,
                    capabilities_json="{}",
                    claims_json="{}",
                    attested_incarnation=0,
                    attested_outer_step=0,
                    attested_digest=b"",
                    has_vote=True,
                )
            )
    for peer in (0, 1):
        signed = world.acquire(peer, wanted_windows=2).leases[0]
        contributions = world.contributions([world.contribution(peer, [whole(signed)])])
        value = world.value(contributions)
        response = world.submit(world.votes(value, [0]), contributions)
        world.swarm_chain.append(response.certificate)
        world.held[peer].clear()
        for voter in (0, 1):
            attest(world, voter, peer, hashlib.sha256(b"state %d" % peer).digest())
    stale = world.acquire(0, wanted_windows=2).leases[0]
    world.advance(61)
    world.begin_incarnation(to_outer_step=1)
    stale = world.acquire(0, wanted_windows=2).leases[0]
    world.release(0, [lease_of(stale).lease_number])
    fresh = world.acquire(1, wanted_windows=2).leases[0]
    world.report(world.commit([world.contribution(0, [whole(stale)], loss_nats=float("nan"))]))
    world.acquire(0, wanted_windows=4)
    world.release(0, [2])
    world.acquire(0, wanted_windows=4)
    world.advance(61)
    begin = lease_of(fresh).range.begin_window
    world.report(world.commit([world.contribution(1, [(fresh, begin, begin + 1)])]))
    world.acquire(1, wanted_windows=3)
    returned = world.acquire(0, wanted_windows=1).leases[0]
    world.release(0, [lease_of(returned).lease_number])
    return world


def test_the_history_is_right_and_has_every_kind_of_row() -> None:
    world = build_history()
    response = world.verify()
    assert response.violations == () and response.state_digests_equal
    with world.store.read() as tx:
        book = tx.book(RUN_ID)
        assert {row.cause for row in tx.all_returned(RUN_ID)} == {"RELEASED", "EXPIRED"}
        states = {row.state for row in tx.leases(RUN_ID)}
    assert states == {"ACTIVE", "COMMITTED", "RELEASED", "EXPIRED"}
    for tokens in (
        book.credited_tokens,
        book.uncredited_tokens,
        book.rolled_back_tokens,
        book.active_tokens,
    ):
        assert tokens > 0


CORRUPTIONS = [
    ("UPDATE books SET credited_tokens = credited_tokens + 4", "credited tokens"),
    ("UPDATE books SET active_tokens = 0", "active tokens"),
    ("UPDATE books SET released_tokens = 0", "released tokens"),
    ("UPDATE books SET expired_tokens = 0", "expired tokens"),
    ("UPDATE books SET uncredited_tokens = 0", "uncredited tokens"),
    ("UPDATE books SET rolled_back_tokens = 0", "rolled back tokens"),
    ("UPDATE books SET granted_tokens = 0", "granted tokens"),
    ("UPDATE books SET schedule_tokens = 0", "schedule tokens"),
    ("UPDATE books SET certified_outer_step = 9", "stands at outer step 9"),
    ("UPDATE books SET frontier_window = frontier_window + 1", "the frontier is stored as"),
    ("UPDATE books SET budget_tokens = 8", "the budget is 8"),
    (
        "UPDATE peer_totals SET credited_tokens = credited_tokens + 4 "
        "WHERE peer_id = (SELECT MIN(peer_id) FROM peer_totals)",
        "credited tokens; events give",
    ),
    ("DELETE FROM peer_totals", "tokens; events give"),
    ("UPDATE leases SET state = 'COMMITTED' WHERE state = 'ACTIVE'", "is stored as COMMITTED"),
    ("UPDATE leases SET fence = 7 WHERE lease_number = 1", "is stored with fence 7"),
    ("UPDATE leases SET end_window = end_window + 1", "other windows than were granted"),
    ("UPDATE leases SET credited_windows = 9 WHERE state = 'ACTIVE'", "9 credited windows"),
    ("DELETE FROM leases WHERE state = 'EXPIRED'", "was granted but is not stored"),
    ("UPDATE leases SET lease_number = 50 WHERE state = 'ACTIVE'", "but was never granted"),
    ("DELETE FROM returned_ranges WHERE cause = 'EXPIRED'", "is returned as None"),
    ("UPDATE returned_ranges SET cause = 'RELEASED'", "is returned as RELEASED"),
    ("UPDATE returned_ranges SET fence = 0", "has fence 0, below"),
    ("DELETE FROM credits WHERE rolled_back_by = 0", "is missing"),
    ("UPDATE credits SET rolled_back_by = 0", "stored as rolled back by 0"),
    ("UPDATE credits SET lease_number = 77 WHERE outer_step = 1", "no certificate gives it"),
    ("DELETE FROM uncredited", "0 times as uncredited"),
    ("UPDATE uncredited SET reason = ''", "has no reason"),
    ("UPDATE certificates SET credited_tokens = 0 WHERE outer_step = 1", "0 credited tokens"),
    ("UPDATE certificates SET schedule_tokens = 1 WHERE outer_step = 2", "1 schedule tokens"),
    ("UPDATE certificates SET rolled_back_by = 0", "stored as rolled back by 0"),
    ("UPDATE certificates SET attempt = 5 WHERE outer_step = 1", "another value or attempt"),
    ("UPDATE certificates SET certificate = x'ff' WHERE outer_step = 1", "cannot be read"),
    ("UPDATE incarnation_records SET payload = x'ff'", "cannot be read"),
    ("DELETE FROM certificates WHERE outer_step = 1", "in the journal but not stored"),
    ("UPDATE acceptor SET vote_attempt = -1 WHERE outer_step = 1", "coordinator's vote"),
    ("UPDATE acceptor SET promised_attempt = -1 WHERE outer_step = 1", "unpromised"),
    ("DELETE FROM journal WHERE kind = 'RELEASE'", "is stored as RELEASED"),
    ("DELETE FROM journal WHERE kind = 'GRANT' AND lease_number = 1", "never granted"),
    ("DELETE FROM journal WHERE kind = 'CERTIFICATE' AND outer_step = 1", "is not in the journal"),
    ("UPDATE journal SET fence = 0 WHERE kind = 'GRANT'", "has fence 0, not above"),
    ("UPDATE journal SET kind = 'GIFT' WHERE kind = 'EXPIRE'", "unknown kind 'GIFT'"),
    ("DELETE FROM journal WHERE kind = 'ROLLBACK' AND incarnation = 2", "while incarnation 1"),
    ("UPDATE directives SET payload = x''", "proves nothing"),
    ("UPDATE attestations SET state_digest = x'00' WHERE outer_step = 1", "states differ"),
    ("UPDATE attestations SET signature = x'00'", "no valid signature"),
]


@pytest.mark.parametrize(("sql", "named"), CORRUPTIONS)
def test_a_corrupted_row_is_named(sql: str, named: str) -> None:
    world = build_history()
    store = world.store
    assert isinstance(store, SqliteStore) and store._writer is not None
    assert store._writer.execute(sql).rowcount > 0
    violations = world.verify().violations
    assert any(named in text for text in violations), violations


def test_a_member_with_another_state_is_named() -> None:
    world = build_history()
    attest(world, 1, 3, b"a" * 32)
    attest(world, 0, 3, b"b" * 32)
    response = world.verify()
    assert not response.state_digests_equal
    assert any("states differ at incarnation 2 outer step 3" in v for v in response.violations)
