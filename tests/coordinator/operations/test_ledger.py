"""Leases, certificates, credit and rollback, told as short stories with virtual time."""

import pytest

from coordinator.operations.common import BeginRecovery, begin_recovery
from protos.contract.certificate import Tag
from protos.contract.errors import RefusedError, UsageError
from protos.contract.signing import has_valid_signature
from protos.muster.v1 import rounds_pb2
from tests.coordinator.operations.ledger_world import (
    COORDINATOR_KEY,
    RUN_ID,
    SEQ_LEN,
    World,
    lease_of,
    whole,
)


def book(world: World):
    with world.store.read() as tx:
        return tx.book(RUN_ID)


def assert_right(world: World) -> None:
    assert world.verify().violations == ()


def test_leases_are_signed_whole_windows_in_schedule_order() -> None:
    world = World.create()
    first = world.acquire(0, wanted_windows=4).leases
    second = world.acquire(1, wanted_windows=4).leases
    order = world.context.run_data_by_run[RUN_ID].order
    position = (0, 0)
    for signed in (*first, *second):
        lease = lease_of(signed)
        assert has_valid_signature(
            COORDINATOR_KEY.public_key, Tag.LEASE, signed.payload, signed.signature
        )
        assert (lease.range.data_pass, lease.range.chunk_index) == order.chunk_at(position[0])
        assert lease.range.begin_window == position[1]
        assert lease.fence == 1
        at_end = lease.range.end_window == order.num_windows(lease.range.chunk_index)
        position = (position[0] + 1, 0) if at_end else (position[0], lease.range.end_window)
    assert [lease_of(s).lease_number for s in first] == list(range(1, len(first) + 1))
    assert_right(world)


def test_a_whole_run_credits_the_budget_exactly() -> None:
    world = World.create(budget_windows=60)
    for _ in range(200):
        parts = []
        for peer in range(3):
            world.acquire(peer, wanted_windows=4)
            ranges = [whole(signed) for signed in world.held[peer].values()]
            world.held[peer].clear()
            parts.append(world.contribution(peer, ranges, loss_nats=2.0))
        if not any(part.ranges for part in parts):
            break
        world.report(world.commit(parts))
    assert book(world).credited_tokens == world.budget_tokens
    assert world.acquire(0).is_budget_exhausted
    with world.store.read() as tx:
        assert sum(row.credited_tokens for row in tx.peer_totals(RUN_ID)) == world.budget_tokens
        rows = tx.live_certificates(RUN_ID)
        assert rows[-1].schedule_tokens == world.budget_tokens
        assert {row.loss_nats for row in rows} == {2.0}
        assert set(tx.num_leases_by_state(RUN_ID, 1)) == {"COMMITTED"}
    assert_right(world)


def test_the_same_request_id_gives_the_same_leases() -> None:
    world = World.create()
    first = world.acquire(0, request_id="a")
    assert first.leases
    again = world.acquire(0, request_id="a")
    assert again == first
    with pytest.raises(UsageError, match="used before"):
        world.acquire(0, wanted_windows=3, request_id="a")
    assert_right(world)


def test_a_peer_holds_at_most_two_rounds() -> None:
    world = World.create(budget_windows=60)
    for _ in range(10):
        response = world.acquire(0, wanted_windows=50)
    assert book(world).active_tokens == 8 * SEQ_LEN
    assert response.leases == ()
    assert "8 windows held" in response.reason


def test_a_late_certificate_counts_until_somebody_else_gets_the_range() -> None:
    world = World.create()
    mine = world.acquire(0).leases[0]
    assert world.advance(61) == 1
    assert book(world).expired_tokens > 0
    (receipt,) = world.report(world.commit([world.contribution(0, [whole(mine)])]))
    assert receipt.credited_tokens == SEQ_LEN * 4 and receipt.uncredited_tokens == 0
    assert book(world).expired_tokens == 0
    assert_right(world)


def test_an_old_fence_is_never_credited_and_booked_once() -> None:
    world = World.create(budget_windows=4)
    mine = [signed for _ in range(8) for signed in world.acquire(0).leases]
    late = [whole(signed) for signed in mine]
    world.advance(61)
    theirs = [signed for _ in range(8) for signed in world.acquire(1).leases]
    assert {lease_of(signed).fence for signed in theirs} == {2}
    certificate = world.commit([world.contribution(0, late)])
    (receipt,) = world.report(certificate)
    assert receipt.is_stored and receipt.credited_tokens == 0
    trained = sum(end - begin for _, begin, end in late) * SEQ_LEN
    assert receipt.uncredited_tokens == trained
    assert "fence 1 is old" in receipt.reason
    assert world.report(certificate)[0].is_stored
    assert book(world).uncredited_tokens == trained
    (receipt,) = world.report(world.commit([world.contribution(1, [whole(s) for s in theirs])]))
    assert receipt.uncredited_tokens == 0
    assert book(world).schedule_tokens == trained + receipt.credited_tokens
    assert_right(world)


def test_released_ranges_come_first_and_expired_ones_last() -> None:
    world = World.create(budget_windows=40, windows_by_chunk=(40,))
    released = world.acquire(0).leases[0]
    expired = world.acquire(1).leases[0]
    world.now_unix_seconds += 30
    world.acquire(2)
    world.renew(2)
    world.release(0, [1])
    assert world.advance(31) == 1
    first = lease_of(world.acquire(2, wanted_windows=2).leases[0])
    assert first.range.begin_window == lease_of(released).range.begin_window
    assert (first.range.chunk_index, first.fence) == (lease_of(released).range.chunk_index, 2)
    seen = [first]
    for _ in range(60):
        for peer in (0, 2):
            world.renew(2)
            for signed in world.acquire(peer, wanted_windows=1).leases:
                seen.append(lease_of(signed))
                world.report(world.commit([world.contribution(peer, [whole(signed)])]))
    key = lease_of(expired).range
    again = [
        index
        for index, lease in enumerate(seen)
        if lease.range.chunk_index == key.chunk_index
        and key.begin_window <= lease.range.begin_window < key.end_window
        and lease.range.data_pass == key.data_pass
    ]
    assert again and again[0] == len(seen) - len(again)
    assert_right(world)


def test_part_of_a_lease_is_credited_and_the_rest_returns() -> None:
    world = World.create()
    signed = world.acquire(0, wanted_windows=4).leases[0]
    begin = lease_of(signed).range.begin_window
    world.report(world.commit([world.contribution(0, [(signed, begin, begin + 1)])]))
    assert world.release(0, [1]) == 1
    assert world.release(0, [1]) == 0
    assert book(world).released_tokens == 3 * SEQ_LEN
    assert_right(world)


def test_the_same_windows_twice_in_one_certificate_count_once() -> None:
    world = World.create()
    signed = world.acquire(0, wanted_windows=2).leases[0]
    (receipt,) = world.report(world.commit([world.contribution(0, [whole(signed), whole(signed)])]))
    assert receipt.credited_tokens == receipt.uncredited_tokens == 2 * SEQ_LEN
    assert "credited before in outer step 1" in receipt.reason
    assert_right(world)


def test_a_lease_of_somebody_else_credits_nothing() -> None:
    world = World.create()
    signed = world.acquire(0, wanted_windows=2).leases[0]
    (receipt,) = world.report(world.commit([world.contribution(1, [whole(signed)])]))
    assert receipt.credited_tokens == 0 and "not in the book" in receipt.reason
    (receipt,) = world.report(world.commit([world.contribution(0, [(signed, 0, 200)])]))
    assert receipt.credited_tokens == 2 * SEQ_LEN and "outside lease" in receipt.reason
    assert_right(world)


def test_certificates_are_taken_in_order() -> None:
    world = World.create()
    one, two = world.commit([]), world.commit([])
    (early,) = world.report(two)
    assert not early.is_stored and "outer step 1 is missing" in early.reason
    assert [receipt.is_stored for receipt in world.report(one, two)] == [True, True]
    forged = rounds_pb2.Certificate()
    forged.CopyFrom(world.commit([]))
    forged.votes[0].signature = bytes(64)
    (refused,) = world.report(forged)
    assert not refused.is_stored and "not valid" in refused.reason
    assert_right(world)


def test_rollback_frees_what_was_credited_later() -> None:
    world = World.create()
    for peer in (0, 1):
        signed = world.acquire(peer, wanted_windows=2).leases[0]
        world.report(world.commit([world.contribution(peer, [whole(signed)])]))
    open_lease = world.acquire(2, wanted_windows=2).leases[0]
    late = world.commit([world.contribution(2, [whole(open_lease)])])
    assert world.begin_incarnation(to_outer_step=1) == 2 * SEQ_LEN
    after = book(world)
    assert (after.credited_tokens, after.rolled_back_tokens) == (2 * SEQ_LEN, 2 * SEQ_LEN)
    assert (after.active_tokens, after.released_tokens) == (0, 4 * SEQ_LEN)
    assert (after.schedule_tokens, after.certified_outer_step) == (2 * SEQ_LEN, 1)
    (refused,) = world.report(late)
    assert not refused.is_stored and "incarnation 2 is in force" not in refused.reason
    assert "2 is in force" in refused.reason
    again = lease_of(world.acquire(0, wanted_windows=2).leases[0])
    assert (again.lease_number, again.incarnation, again.fence) == (1, 2, 2)
    assert_right(world)


def test_rollback_waits_for_missing_certificates() -> None:
    world = World.create()
    with pytest.raises(RefusedError, match="no certificate of outer step 3"):
        world.begin_incarnation(to_outer_step=3)
    assert_right(world)


def test_nothing_expires_or_is_granted_again_while_recovering() -> None:
    world = World.create(budget_windows=8)
    world.acquire(0)
    world.release(0, [1])
    world.acquire(1, wanted_windows=1)
    with world.store.write() as tx:
        begin_recovery(tx, BeginRecovery(seconds=90), **world.clock)
    assert world.advance(80) == 0
    fences = [lease_of(s).fence for _ in range(9) for s in world.acquire(2).leases]
    assert set(fences) == {1}
    assert "recovering" in world.acquire(2).reason or book(world).granted_tokens == 8 * SEQ_LEN
    assert world.advance(11) >= 1
    assert {lease_of(s).fence for s in world.acquire(0).leases} == {2}
    assert_right(world)


def test_passes_are_limited() -> None:
    world = World.create(
        num_peers=1, windows_by_chunk=(3, 3), max_data_passes=1, budget_windows=40, round_windows=9
    )
    world.acquire(0, wanted_windows=30)
    response = world.acquire(0, wanted_windows=30)
    assert book(world).granted_tokens == 6 * SEQ_LEN
    assert "beyond the 1 passes" in response.reason and not response.is_budget_exhausted


def test_heartbeats_renew_leases_and_name_lost_ones() -> None:
    world = World.create()
    world.acquire(0, wanted_windows=2)
    world.advance(50)
    assert world.renew(0) == ()
    assert world.advance(50) == 0
    assert world.advance(61) == 1
    assert world.renew(0) == (1,)


def test_stale_incarnations_are_refused() -> None:
    world = World.create()
    world.acquire(0)
    world.begin_incarnation(to_outer_step=0)
    world.incarnation = 1
    with pytest.raises(RefusedError, match="incarnation 1"):
        world.acquire(0)
    assert world.renew(0) == (1,)
