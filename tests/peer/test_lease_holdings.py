"""Lease bookkeeping: what is held, sent, contributed, spent and given up, by examples."""

import pytest

from peer.lease_holdings import GrantedLease, LeaseHoldings, UsedRange

WINDOW_TOKENS = 256


def granted(number: int, *, begin: int = 0, end: int = 8) -> GrantedLease:
    return GrantedLease(
        lease_number=number, begin_window=begin, end_window=end, tokens_per_window=WINDOW_TOKENS
    )


def used(number: int, begin: int, end: int) -> UsedRange:
    return UsedRange(lease_number=number, begin_window=begin, end_window=end)


@pytest.fixture
def holdings() -> LeaseHoldings:
    leases = LeaseHoldings()
    leases.grant([granted(1), granted(2), granted(3)])
    return leases


def send_all(leases: LeaseHoldings) -> None:
    for number in (1, 2, 3):
        leases.mark_fetched(number)
    leases.take_sendable()


def test_counts_tokens_that_are_in_no_contribution(holdings: LeaseHoldings) -> None:
    assert holdings.left_tokens == 3 * 8 * WINDOW_TOKENS
    holdings.contribute([used(1, 0, 8), used(2, 0, 3)])
    assert (holdings.num_held, holdings.left_tokens) == (2, (5 + 8) * WINDOW_TOKENS)


def test_sends_in_order_and_once(holdings: LeaseHoldings) -> None:
    holdings.mark_fetched(2)
    assert holdings.take_sendable() == ()
    holdings.mark_fetched(1)
    assert [part.lease_number for part in holdings.take_sendable()] == [1, 2]
    assert holdings.take_sendable() == ()
    holdings.mark_fetched(3)
    assert [part.lease_number for part in holdings.take_sendable()] == [3]


def test_renews_spent_leases_until_their_certificate_is_acknowledged(
    holdings: LeaseHoldings,
) -> None:
    holdings.contribute([used(1, 0, 8), used(2, 0, 3)])
    assert holdings.renewed_numbers == (1, 2, 3)
    holdings.commit(5)
    assert holdings.renewed_numbers == (1, 2, 3)
    holdings.acknowledge(4)
    assert holdings.renewed_numbers == (1, 2, 3)
    holdings.acknowledge(5)
    assert holdings.renewed_numbers == (2, 3)


def test_a_discarded_contribution_names_its_leases_once(holdings: LeaseHoldings) -> None:
    holdings.contribute([used(1, 0, 8), used(2, 0, 3)])
    assert holdings.discard_contribution() == (1, 2)
    assert holdings.discard_contribution() == ()
    assert holdings.forget([1, 2]) == (2,)
    assert holdings.renewed_numbers == (3,)


@pytest.mark.parametrize(
    ("progress_tokens", "begun"),
    [(0, (1,)), (7 * WINDOW_TOKENS, (1,)), (8 * WINDOW_TOKENS, (1, 2)), (99_999, (1, 2, 3))],
)
def test_a_dead_trainer_may_have_begun_one_lease_more_than_it_said(
    holdings: LeaseHoldings, progress_tokens: int, begun: tuple[int, ...]
) -> None:
    send_all(holdings)
    assert holdings.take_begun(progress_tokens) == begun
    left = tuple(number for number in (1, 2, 3) if number not in begun)
    assert holdings.renewed_numbers == left
    assert tuple(part.lease_number for part in holdings.take_sendable()) == left


def test_a_dead_trainer_leaves_the_contribution_in_the_round_alone(
    holdings: LeaseHoldings,
) -> None:
    send_all(holdings)
    holdings.contribute([used(1, 0, 8), used(2, 0, 3)])
    assert holdings.take_begun(0) == ()
    assert holdings.renewed_numbers == (1, 2, 3)
    holdings.commit(1)
    holdings.acknowledge(1)
    assert holdings.renewed_numbers == (3,)


def test_leases_of_a_trainer_that_lost_a_device_are_sent_again(holdings: LeaseHoldings) -> None:
    send_all(holdings)
    holdings.contribute([used(1, 0, 8)])
    holdings.commit(1)
    holdings.contribute([used(2, 0, 3)])
    holdings.take_back()
    assert [part.lease_number for part in holdings.take_sendable()] == [3]
    holdings.commit(2)
    holdings.acknowledge(2)
    assert holdings.renewed_numbers == (3,)


def test_another_incarnation_ends_everything(holdings: LeaseHoldings) -> None:
    holdings.contribute([used(1, 0, 8)])
    holdings.commit(1)
    holdings.contribute([used(2, 0, 8)])
    assert holdings.forget_all() == (2, 3)
    assert holdings.renewed_numbers == ()
