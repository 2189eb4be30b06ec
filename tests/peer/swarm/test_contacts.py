"""Who counts as gone, and how long each member is waited for."""

from peer.swarm.contacts import Contacts
from peer.swarm.pace import FIRST_CALL_SECONDS, Pace

PATIENCE_SECONDS = 0.758
"""Four times an answer of 2 ms, and the margin."""


def _contacts() -> Contacts:
    """Everybody has answered quickly so far."""
    contacts = Contacts(Pace())
    for _ in range(64):
        _answer(contacts, "b", 0.002)
    return contacts


def _answer(contacts: Contacts, peer_id: str, seconds: float, *, at_seconds: float = 0.0) -> None:
    contacts.answered(
        peer_id, begin_seconds=at_seconds, now_seconds=at_seconds + seconds, has_dialled=False
    )


def _fail(
    contacts: Contacts,
    peer_id: str,
    begin_seconds: float,
    *,
    after_seconds: float,
    has_dialled: bool = False,
) -> bool:
    return contacts.failed(
        peer_id,
        begin_seconds=begin_seconds,
        now_seconds=begin_seconds + after_seconds,
        timeout_seconds=contacts.patience_seconds(peer_id),
        has_dialled=has_dialled,
    )


def _silence(contacts: Contacts, peer_id: str, begin_seconds: float) -> bool:
    """A call that nobody answers in time."""
    seconds = contacts.patience_seconds(peer_id) + 0.01
    return _fail(contacts, peer_id, begin_seconds, after_seconds=seconds)


def test_two_calls_in_a_row_are_needed_and_the_second_is_shorter() -> None:
    contacts = _contacts()
    assert contacts.patience_seconds("b") == PATIENCE_SECONDS
    assert not _silence(contacts, "b", 1.0)
    assert contacts.patience_seconds("b") == 0.7 * PATIENCE_SECONDS
    assert _silence(contacts, "b", 2.0)
    _answer(contacts, "b", 0.002, at_seconds=3.0)
    assert not _silence(contacts, "b", 4.0)


def test_calls_under_way_together_are_one_hiccup() -> None:
    contacts = _contacts()
    assert not _fail(contacts, "b", 1.0, after_seconds=0.76)
    assert not _fail(contacts, "b", 1.3, after_seconds=0.76)
    assert _fail(contacts, "b", 1.8, after_seconds=0.53)


def test_who_has_spoken_since_the_call_began_is_there() -> None:
    contacts = _contacts()
    assert not _silence(contacts, "b", 1.0)
    contacts.heard("b", 2.1)
    assert not _silence(contacts, "b", 2.0), "the call is lost, not the member"
    assert _silence(contacts, "b", 3.0)


def test_a_member_that_is_always_slow_is_waited_for_longer() -> None:
    contacts = _contacts()
    for number in range(3):
        _silence(contacts, "slow", 1.0 + number)
        contacts.heard("slow", 1.9 + number)
    assert contacts.patience_seconds("slow") > 1.9 and contacts.patience_seconds("b") < 0.8
    _answer(contacts, "slow", 1.0, at_seconds=5.0)
    assert _fail(contacts, "slow", 6.0, after_seconds=0.0) is False  # refused at once, not quick
    _answer(contacts, "slow", 1.0, at_seconds=7.0)
    assert contacts.patience_seconds("slow") > 2.0


def test_one_slow_answer_makes_nobody_patient() -> None:
    """It may have come from a process that was just starting, and that is killed next."""
    contacts = _contacts()
    _answer(contacts, "b", 1.2, at_seconds=1.0)
    assert contacts.patience_seconds("b") == PATIENCE_SECONDS


def test_who_has_spoken_since_a_failure_is_given_the_whole_patience() -> None:
    contacts = _contacts()
    assert not _silence(contacts, "b", 1.0)
    contacts.heard("b", 2.0)
    assert contacts.patience_seconds("b") == PATIENCE_SECONDS


def test_a_dial_that_takes_as_long_as_two_calls_counts_as_two() -> None:
    contacts = _contacts()
    assert _fail(contacts, "b", 1.0, after_seconds=5.0, has_dialled=True)


def test_a_call_that_outlived_its_patience_because_we_were_stopped_counts_as_one() -> None:
    """All others would be gone for a process that has just woken up."""
    contacts = _contacts()
    assert not _fail(contacts, "b", 1.0, after_seconds=600.0)
    assert contacts.patience_seconds("b") == 0.7 * PATIENCE_SECONDS
    assert _silence(contacts, "b", 602.0)


def test_a_member_that_is_gone_is_found_as_quickly_in_every_step() -> None:
    contacts = _contacts()
    for number in range(20):
        is_gone = _silence(contacts, "b", 1.0 + 2.0 * number)
        assert is_gone == (number > 0)
        assert contacts.patience_seconds("b") == 0.7 * PATIENCE_SECONDS


def test_dialling_says_nothing_of_how_quick_a_member_answers() -> None:
    contacts = Contacts(Pace())
    for number in range(5):
        contacts.answered(
            "b", begin_seconds=number, now_seconds=number + 3.0, has_dialled=number < 4
        )
        assert contacts.patience_seconds("b") == FIRST_CALL_SECONDS


def test_members_that_have_left_are_forgotten() -> None:
    contacts = _contacts()
    assert not _silence(contacts, "b", 1.0)
    contacts.keep_only({"c"})
    assert not _silence(contacts, "b", 2.0)
