"""What members say of later steps takes little room, whatever they say."""

from peer.swarm import round_types as rt
from peer.swarm.early_events import EarlyEvents
from protos.muster.v1 import rounds_pb2


def _message(outer_step: int, num_bytes: int = 0) -> rounds_pb2.RoundMessage:
    refusal = rounds_pb2.RoundRefusal(reason="x" * num_bytes)
    return rounds_pb2.RoundMessage(incarnation=1, outer_step=outer_step, refusal=refusal)


def test_a_member_that_floods_takes_little_room_and_none_of_others() -> None:
    early = EarlyEvents()
    early.keep((1, 3), rt.Received("good", _message(3)))
    for number in range(400):
        early.keep((1, 10**9), rt.Received("small", _message(number)))
    for _ in range(12):
        early.keep((1, 10**9), rt.Received("large", _message(9, 10 * 2**20)))
    kept = [event for _, event in early.take((1, 3))]
    assert all(isinstance(event, rt.Received) for event in kept)
    senders = [event.sender for event in kept if isinstance(event, rt.Received)]
    assert [senders.count(s) for s in ("good", "small", "large")] == [1, 32, 3]


def test_only_events_of_this_step_and_later_ones_are_left() -> None:
    early = EarlyEvents()
    places = [(1, 2), (1, 4), (1, 3), (2, 0)]
    for place in places:
        early.keep(place, rt.Received("a", _message(place[1])))
    early.keep((1, 5), rt.Tick())
    assert [place for place, _ in early.take((1, 3))] == [(1, 4), (1, 3), (2, 0), (1, 5)]
    assert early.take((0, 0)) == []
