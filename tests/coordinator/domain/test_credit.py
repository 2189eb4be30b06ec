"""Credit and chain decisions, one rule each."""

from dataclasses import replace

from coordinator.domain.ledger import (
    BookedLease,
    ChainHead,
    Claim,
    decide_chain,
    decide_credit,
)

LEASE = BookedLease(lease_number=3, peer_id="a", fence=2, chunk=(0, 5), windows=(10, 20))
CLAIM = Claim(peer_id="a", lease_number=3, fence=2, chunk=(0, 5), windows=(12, 16))


def verdicts(claim=CLAIM, *, lease=LEASE, others=(), credited=()):
    pieces = decide_credit(claim, lease=lease, leases_of_chunk=[LEASE, *others], credited=credited)
    return [(piece.windows, piece.is_credited) for piece in pieces]


def test_a_range_under_the_newest_fence_is_credited_whole() -> None:
    older = replace(LEASE, peer_id="b", fence=1)
    beside = replace(LEASE, peer_id="b", fence=9, windows=(20, 30))
    assert verdicts(others=[older, beside]) == [((12, 16), True)]


def test_windows_granted_again_are_not() -> None:
    newer = replace(LEASE, peer_id="b", fence=3, windows=(14, 20))
    assert verdicts(others=[newer]) == [((12, 14), True), ((14, 16), False)]


def test_windows_credited_before_are_not() -> None:
    assert verdicts(credited=[((10, 13), 7)]) == [((12, 13), False), ((13, 16), True)]
    pieces = decide_credit(CLAIM, lease=LEASE, leases_of_chunk=[], credited=[((10, 20), 7)])
    assert [piece.reason for piece in pieces] == ["credited before in outer step 7"]


def test_windows_outside_the_lease_are_not() -> None:
    wide = replace(CLAIM, windows=(5, 25))
    assert verdicts(wide) == [((5, 10), False), ((10, 20), True), ((20, 25), False)]
    assert verdicts(replace(CLAIM, windows=(0, 4))) == [((0, 4), False)]
    assert verdicts(replace(CLAIM, windows=(4, 4))) == []


def test_leases_that_the_book_does_not_have_give_nothing() -> None:
    assert verdicts(lease=None) == [((12, 16), False)]
    assert verdicts(replace(CLAIM, fence=1)) == [((12, 16), False)]
    assert verdicts(replace(CLAIM, chunk=(1, 5))) == [((12, 16), False)]


def test_the_chain_takes_certificates_in_order() -> None:
    head = ChainHead(incarnation=2, outer_step=10, directive_number=4)

    def decide(incarnation: int, outer_step: int, roster_number: int):
        return decide_chain(
            head, incarnation=incarnation, outer_step=outer_step, roster_number=roster_number
        )

    assert decide(2, 11, 4).is_next
    assert decide(2, 10, 4).is_old
    assert "outer step 11 is missing" in decide(2, 12, 4).reason
    assert "names roster 3" in decide(2, 11, 3).reason
    assert "names incarnation 1" in decide(1, 11, 4).reason
