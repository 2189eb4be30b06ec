"""Votes and promises survive whatever a crash leaves of the file."""

from pathlib import Path

from peer.swarm.round_types import RoundRecord
from peer.swarm.vote_file import VoteFile
from protos.muster.v1 import common_pb2, rounds_pb2


def _record(step: int, promised: int) -> RoundRecord:
    return RoundRecord(
        incarnation=1,
        outer_step=step,
        promised_attempt=promised,
        led_attempt=0,
        highest_vote=rounds_pb2.Vote(value=b"value", attempt=promised, voter="me"),
        contributions=b"contributions",
        next_directive=common_pb2.Signed(payload=b"directive"),
    )


def test_last_record_of_a_step_counts(tmp_path: Path) -> None:
    votes = VoteFile(tmp_path, incarnation=1)
    for record in (_record(1, 0), _record(1, 2), _record(2, 1)):
        votes.write(record)
    votes.close()
    again = VoteFile(tmp_path, incarnation=1)
    assert again.record(1) == _record(1, 2)
    assert again.record(2) == _record(2, 1)
    assert again.record(3) == RoundRecord(incarnation=1, outer_step=3)
    again.close()


def test_torn_last_line_is_cut_off_and_writing_goes_on(tmp_path: Path) -> None:
    votes = VoteFile(tmp_path, incarnation=1)
    votes.write(_record(1, 0))
    votes.write(_record(2, 0))
    votes.close()
    path = tmp_path / "votes-1.jsonl"
    data = path.read_bytes()
    for num_lost in (1, 7, 60):
        path.write_bytes(data[:-num_lost])
        torn = VoteFile(tmp_path, incarnation=1)
        assert torn.record(1) == _record(1, 0)
        assert torn.record(2).highest_vote is None
        torn.write(_record(2, 5))
        torn.close()
        again = VoteFile(tmp_path, incarnation=1)
        assert again.record(2) == _record(2, 5)
        again.close()


def test_newer_incarnation_drops_older_votes(tmp_path: Path) -> None:
    old = VoteFile(tmp_path, incarnation=1)
    old.write(_record(1, 0))
    old.close()
    new = VoteFile(tmp_path, incarnation=2)
    assert new.record(1).highest_vote is None
    assert not (tmp_path / "votes-1.jsonl").exists()
    new.close()
