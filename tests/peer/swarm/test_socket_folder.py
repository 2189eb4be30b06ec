"""Folders of p2pd's sockets: claimed by one process, removed by it or by whoever comes next."""

import fcntl
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from peer.swarm import socket_folder
from peer.swarm.socket_folder import (
    claim_socket_folder,
    release_socket_folder,
    remove_dead_folders,
)

HOLDER = """
import signal, sys, tempfile
from pathlib import Path
tempfile.tempdir = sys.argv[1]
from peer.swarm.socket_folder import claim_socket_folder
print(claim_socket_folder(Path(sys.argv[2])), flush=True)
signal.pause()
"""


def test_folder_of_a_killed_process_goes_when_the_next_one_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temp = tmp_path / "temp"
    temp.mkdir()
    monkeypatch.setattr(socket_folder.tempfile, "tempdir", str(temp))
    deep = tmp_path / ("d" * 90)
    command = [sys.executable, "-c", HOLDER, str(temp), str(deep)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            folder = Path(holder.stdout.readline().strip())
            assert folder.parent == temp and folder.name.startswith(f"muster-{os.getuid()}-")
            (folder / "p2p.sock").touch()
            assert remove_dead_folders(temp) == [], "its owner lives"
        finally:
            holder.kill()
    mine = claim_socket_folder(tmp_path / ("e" * 90))
    assert not folder.exists() and mine.exists()
    assert mine.stat().st_mode & 0o777 == 0o700
    release_socket_folder(mine)
    assert list(temp.iterdir()) == []


def test_a_folder_that_another_takes_for_a_dead_ones_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between making it and locking it."""
    monkeypatch.setattr(socket_folder.tempfile, "tempdir", str(tmp_path))
    lock, removed = fcntl.flock, []

    def late(fd: int, how: int) -> None:
        if how == fcntl.LOCK_EX and not removed:  # the owner's own, for the first time
            removed.extend(remove_dead_folders(tmp_path))
        lock(fd, how)

    monkeypatch.setattr(socket_folder.fcntl, "flock", late)
    mine = claim_socket_folder(tmp_path / ("f" * 90))
    assert removed == [mine] and mine.exists()
    assert remove_dead_folders(tmp_path) == []
    release_socket_folder(mine)


def test_short_homes_keep_their_sockets_at_home() -> None:
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        (home / "run").mkdir()
        (home / "run" / "old.sock").touch()
        assert claim_socket_folder(home) == home.resolve() / "run"
        assert list((home / "run").iterdir()) == []
        release_socket_folder(home / "run")
        assert (home / "run").is_dir(), "the folder is the home's"
