"""The home directory: its lock, its leftovers, and files that are written whole."""

import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from peer.home import (
    ChildRecord,
    Home,
    find_leftover_files,
    holder_of_lock,
    load_child_records,
    load_status,
    start_ticks_of,
    write_atomically,
)
from protos.contract.errors import ErrorCode, MachineError


def test_two_peers_on_one_home(tmp_path: Path) -> None:
    home = Home.open(tmp_path / "home")
    assert holder_of_lock(tmp_path / "home") == os.getpid()
    with pytest.raises(MachineError, match=str(os.getpid())) as caught:
        Home.open(tmp_path / "home")
    assert caught.value.code is ErrorCode.HOME_LOCKED
    assert "--home" in caught.value.remedy
    home.close()
    assert holder_of_lock(tmp_path / "home") is None
    Home.open(tmp_path / "home").close()


def test_private_modes(tmp_path: Path) -> None:
    home = Home.open(tmp_path / "home")
    write_atomically(home.path / "x.json", b"{}")
    assert stat.S_IMODE(home.path.stat().st_mode) == 0o700
    assert stat.S_IMODE((home.path / "x.json").stat().st_mode) == 0o600
    home.close()


def test_a_home_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError) as caught:
        Home.open(tmp_path / "file" / "home")
    assert caught.value.remedy


def test_orphans_and_files_of_a_dead_peer_go(tmp_path: Path) -> None:
    home = Home.open(tmp_path / "home")
    orphan = subprocess.Popen(
        [sys.executable, "-c", "import signal; signal.pause()"], process_group=0
    )
    ticks = start_ticks_of(orphan.pid)
    assert ticks is not None
    home.record_children(
        [ChildRecord(name="swarm", pid=orphan.pid, group_id=orphan.pid, start_ticks=ticks)]
    )
    (home.tmp / "download.bin").write_bytes(b"x")
    (home.path / "status.json.17.tmp").write_bytes(b"x")
    leftover = socket.socket(socket.AF_UNIX)
    leftover.bind(str(home.run / "p2p.sock"))
    leftover.close()
    done = home.clean_leftovers(wait_seconds=0.0)
    assert orphan.wait(10) == -signal.SIGKILL
    assert any(f"swarm process {orphan.pid}" in line for line in done)
    assert len(done) == 4 and find_leftover_files(home.path) == []
    assert home.clean_leftovers() == []
    home.close()


def test_a_later_process_with_the_same_number_is_left_alone(tmp_path: Path) -> None:
    home = Home.open(tmp_path / "home")
    ticks = start_ticks_of(os.getpid())
    assert ticks is not None
    record = ChildRecord(
        name="swarm", pid=os.getpid(), group_id=os.getpgrp(), start_ticks=ticks - 1
    )
    home.record_children([record])
    assert not record.is_alive
    assert load_child_records(home.path) == [record]
    assert home.clean_leftovers() == []
    home.close()


def test_damaged_notes_count_as_none(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "children.json").write_text('[{"pid": 1}]')
    (tmp_path / "run" / "status.json").write_text("{")
    assert load_child_records(tmp_path) == []
    assert load_status(tmp_path) is None


def test_whoever_carries_the_homes_mark_is_ended_whatever_became_of_its_parents(
    tmp_path: Path,
) -> None:
    home, other = Home.open(tmp_path / "home"), Home.open(tmp_path / "other")
    command = [sys.executable, "-c", "print('up', flush=True); import signal; signal.pause()"]
    mine, theirs = (
        subprocess.Popen(
            command, env=mark, start_new_session=True, stdout=subprocess.PIPE, text=True
        )
        for mark in (home.owner_mark, other.owner_mark)
    )
    for process in (mine, theirs):
        assert process.stdout is not None and process.stdout.readline() == "up\n"
    assert home.clean_leftovers() == [f"ended orphaned process {mine.pid}"]
    assert mine.wait(10) == -signal.SIGKILL
    assert theirs.poll() is None
    theirs.kill()
    theirs.wait(10)
    for process in (mine, theirs):
        assert process.stdout is not None
        process.stdout.close()
    home.close()
    other.close()
