"""Who is left out of later groups of a step, from what members say of one another."""

from peer.swarm.accusations import Accusations

ALL = ("a", "b", "c", "liar")


def test_accused_member_is_left_out_with_the_reason() -> None:
    accusations = Accusations(num_members=4)
    accusations.add("a", "b", "part of b: piece 3 is not what was committed to", group=ALL)
    assert accusations.left_out == {"b"}
    assert "a says: part of b: piece 3" in accusations.reason_against("b")
    assert not accusations.reason_against("a")
    accusations.add("c", "c", "itself", group=ALL)
    assert accusations.left_out == {"b"}


def test_who_accuses_more_members_than_may_be_bad_is_the_liar() -> None:
    accusations = Accusations(num_members=4)
    for _ in range(3):
        accusations.add("liar", "a", "no reason", group=ALL)
    assert accusations.left_out == {"a"}, "saying it again costs nothing"
    accusations.add("liar", "b", "no reason", group=ALL)
    assert accusations.left_out == {"liar"}
    assert "it accused a, b" in accusations.reason_against("liar")
    accusations.add("c", "b", "a reason", group=ALL)
    assert accusations.left_out == {"b", "liar"}, "others may still accuse them"


def test_two_of_seven_may_be_bad() -> None:
    accusations = Accusations(num_members=7)
    accusations.add("a", "b", "bad", group=ALL)
    accusations.add("a", "c", "bad", group=ALL)
    assert accusations.left_out == {"b", "c"}


def test_when_nobody_would_be_left_all_are_forgiven() -> None:
    accusations = Accusations(num_members=3)
    accusations.add("a", "b", "silent", group=("a", "b"))
    accusations.add("b", "a", "silent", group=("a", "b"))
    assert not accusations.left_out
