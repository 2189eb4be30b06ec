"""Room for votes is bounded per voter: nobody pushes out another's."""

from peer.swarm.round_votes import VoteBox
from protos.muster.v1 import common_pb2, rounds_pb2


def _vote(voter: str, attempt: int, value: bytes = b"value") -> rounds_pb2.Vote:
    return rounds_pb2.Vote(voter=voter, attempt=attempt, value=value)


def test_many_ballots_of_one_voter_hide_nobody() -> None:
    box = VoteBox([common_pb2.RosterEntry(peer_id=p, has_vote=True) for p in "abc"])
    box.add(_vote("a", 3), current_attempt=3)
    box.add(_vote("c", 3), current_attempt=3)
    for attempt in range(10, 300):
        box.add(_vote("c", attempt, bytes([attempt % 251])), current_attempt=3)
    for number in range(100):
        box.add(_vote("c", 3, b"other %d" % number), current_attempt=3)
    assert box.voters((3, b"value")) == {"a", "c"}
    assert box.certificate((3, b"value"), b"") is not None
    assert box.voters((10, bytes([10]))) == set()
    assert len(box._votes) < 25
