"""Votes and promises survive whatever a crash leaves of the file."""

import asyncio
import hashlib
from pathlib import Path

import pytest

from peer.swarm.record_file import run_folder_name
from peer.swarm.round_types import RoundRecord
from peer.swarm.vote_file import VoteFile
from protos.contract.errors import CorruptDataError
from protos.muster.v1 import common_pb2, rounds_pb2
from tests.peer.swarm.swarm_hub import RUN_ID, Hub


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


def test_last_line_of_a_torn_page_is_cut_off(tmp_path: Path) -> None:
    """A crash may leave the end of a line on disk, and zeros in place of its beginning."""
    _write_three(tmp_path)
    path = tmp_path / "votes-1.jsonl"
    *whole, last = path.read_bytes().splitlines(keepends=True)
    for torn in (b"\0" * 30 + last[30:], b"\0" * len(last), b"\r" + last[1:]):
        path.write_bytes(b"".join(whole) + torn)
        votes = VoteFile(tmp_path, incarnation=1)
        assert votes.record(2) == _record(2, 0) and votes.record(3).highest_vote is None
        votes.close()
        assert path.read_bytes() == b"".join(whole)


def _write_three(folder: Path) -> None:
    votes = VoteFile(folder, incarnation=1)
    for step in (1, 2, 3):
        votes.write(_record(step, 0))
    votes.close()


@pytest.mark.parametrize("last", [b"", b"torn", b"also bad\n"])
def test_damage_before_the_last_line_is_refused_and_nothing_is_cut_off(
    tmp_path: Path, last: bytes
) -> None:
    _write_three(tmp_path)
    path = tmp_path / "votes-1.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1] = lines[1].replace(b'"outer_step":2', b'"outer_step":9')
    damaged = b"".join(lines) + last
    path.write_bytes(damaged)
    with pytest.raises(CorruptDataError, match=f"{path.name} is damaged in line 2 of") as refused:
        VoteFile(tmp_path, incarnation=1)
    assert refused.value.allowed and "new peer" in refused.value.remedy
    assert path.read_bytes() == damaged


@pytest.mark.parametrize("body", [b"no JSON", b"[]", b'{"outer_step":4}', b"{}"])
def test_a_whole_line_that_says_something_else_is_refused(tmp_path: Path, body: bytes) -> None:
    _write_three(tmp_path)
    path = tmp_path / "votes-1.jsonl"
    checksum = hashlib.sha256(body).hexdigest()[:16].encode()
    path.write_bytes(path.read_bytes() + checksum + b" " + body + b"\n")
    with pytest.raises(CorruptDataError, match="line 4 of 4"):
        VoteFile(tmp_path, incarnation=1)


def test_newer_incarnation_drops_older_votes(tmp_path: Path) -> None:
    old = VoteFile(tmp_path, incarnation=1)
    old.write(_record(1, 0))
    old.close()
    new = VoteFile(tmp_path, incarnation=2)
    assert new.record(1).highest_vote is None
    assert not (tmp_path / "votes-1.jsonl").exists()
    new.close()


async def _damaged_story(folder: Path) -> None:
    hub = Hub(folder)
    hub.begin()
    daemon = hub.add_daemon()
    votes = daemon.home / "votes" / run_folder_name(RUN_ID, hub.key.public_key)
    votes.mkdir(parents=True)
    (votes / "votes-0.jsonl").write_bytes(b"damaged\ndamaged\n")
    with pytest.warns(UserWarning), pytest.raises(AssertionError, match="damaged in line 1 of 2"):
        await hub.launch(daemon)  # twice
    failed = daemon.newest("failed")
    assert failed is not None and failed["exit_code"] == CorruptDataError.exit_code
    assert daemon.process is not None and await daemon.process.wait() == CorruptDataError.exit_code
    assert "Traceback" not in daemon.stderr_path.read_text()


@pytest.mark.slow
def test_a_swarm_process_with_damaged_votes_ends_with_that_reason(tmp_path: Path) -> None:
    asyncio.run(asyncio.wait_for(_damaged_story(tmp_path), 60.0))
