"""Children as real processes: channel and shared memory, one group, escalation, and nothing that
survives.
"""

import asyncio
import os
import select
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from peer.home import Home, load_child_records, start_ticks_of
from peer.ipc import ChannelClosed
from peer.shared_vectors import SharedVectors
from peer.supervisor import KEPT_LOGS, Supervisor, rotate_log

ECHO = """
import sys
from peer.ipc import Channel
from peer.shared_vectors import SharedVectors
channel = Channel.from_fd(int(sys.argv[sys.argv.index("--channel-fd") + 1]))
vectors = SharedVectors(int(sys.argv[1]), 16)
vectors.contribution[:] = 2.5
print("hello from the child", flush=True)
while True:
    message = channel.receive()
    channel.send("echo", text=message["text"])
"""
STUBBORN = """
import signal
from peer.ipc import Channel
import sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
channel = Channel.from_fd(int(sys.argv[sys.argv.index("--channel-fd") + 1]))
channel.send("ready")
while True:
    signal.pause()
"""
PARENT = """
import asyncio, ctypes, os, sys
from pathlib import Path
from peer.home import Home
from peer.supervisor import Supervisor
CHILD = '''
import ctypes, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
from peer.ipc import Channel
channel = Channel.from_fd(int(sys.argv[sys.argv.index("--channel-fd") + 1]))
channel.send("ready")
channel.receive()
'''
async def main():
    home = Home.open(Path(sys.argv[1]))
    supervisor = Supervisor(
        logs=home.logs, environment=dict(os.environ), record_children=home.record_children
    )
    for name in ("swarm", "trainer"):
        command = [sys.executable, "-c", CHILD]
        child = await supervisor.spawn(name, command, channel_flag="--channel-fd")
        await child.channel.receive()
    print("ready", flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


@asynccontextmanager
async def opened(tmp_path: Path) -> AsyncIterator[tuple[Supervisor, Home]]:
    home = Home.open(tmp_path / "home")
    supervisor = Supervisor(
        logs=home.logs, environment=dict(os.environ), record_children=home.record_children
    )
    try:
        yield supervisor, home
    finally:
        await supervisor.close()
        home.close()


def python(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", code, *arguments]


def test_channel_shared_memory_and_log(tmp_path: Path) -> None:
    async def scenario() -> None:
        vectors = SharedVectors.create(16)
        async with opened(tmp_path) as (supervisor, home):
            child = await supervisor.spawn(
                "trainer",
                python(ECHO, str(vectors.fd)),
                channel_flag="--channel-fd",
                fds=(vectors.fd,),
            )
            child.channel.send("say", text="x" * 200_000)
            answer = await child.channel.receive()
            assert (answer["kind"], len(answer["text"])) == ("echo", 200_000)
            assert float(vectors.contribution[7]) == 2.5
            assert "hello from the child" in child.last_lines()
            assert [record.pid for record in load_child_records(home.path)] == [child.process.pid]
            assert supervisor.memory_bytes() > 2**20
            await child.channel.close()
            assert "exit code 1" in await supervisor.wait(child)
            assert "ChannelClosed" in child.last_lines()
        vectors.close()

    asyncio.run(scenario())


def test_children_share_a_group_that_is_not_ours(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with opened(tmp_path) as (supervisor, _):
            first = await supervisor.spawn("a", python(STUBBORN), channel_flag="--channel-fd")
            second = await supervisor.spawn("b", python(STUBBORN), channel_flag="--channel-fd")
            groups = {os.getpgid(child.process.pid) for child in (first, second)}
            assert groups == {first.process.pid} and os.getpgrp() not in groups
            first.process.kill()
            assert await supervisor.wait(first) == "was ended by SIGKILL"
            third = await supervisor.spawn("c", python(STUBBORN), channel_flag="--channel-fd")
            assert os.getpgid(third.process.pid) in (first.process.pid, third.process.pid)

    asyncio.run(scenario())


def test_a_child_that_ignores_everything_is_killed(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with opened(tmp_path) as (supervisor, home):
            child = await supervisor.spawn("a", python(STUBBORN), channel_flag="--channel-fd")
            await child.channel.receive()
            await supervisor.stop(child, grace_seconds=0.1)
            assert child.process.returncode == -signal.SIGKILL
            assert child.is_expected_to_end
            assert load_child_records(home.path) == []
            with pytest.raises(ChannelClosed):
                await child.channel.receive()

    asyncio.run(scenario())


def test_close_ends_grandchildren(tmp_path: Path) -> None:
    forking = (
        "import subprocess, sys; print(subprocess.Popen(['sleep', '600']).pid, flush=True)"
        + STUBBORN
    )

    async def scenario() -> int:
        async with opened(tmp_path) as (supervisor, _):
            child = await supervisor.spawn("a", python(forking), channel_flag="--channel-fd")
            await child.channel.receive()
            grandchild = int(child.last_lines())
            assert start_ticks_of(grandchild) is not None
        return grandchild

    wait_until_gone([asyncio.run(scenario())])


def test_what_a_killed_child_has_started_ends_before_its_successor_is_started(
    tmp_path: Path,
) -> None:
    forking = (
        "import subprocess, sys; print(subprocess.Popen(['sleep', '600']).pid, flush=True)"
        + STUBBORN
    )

    async def scenario() -> None:
        async with opened(tmp_path) as (supervisor, _):
            living = await supervisor.spawn("a", python(forking), channel_flag="--channel-fd")
            killed = await supervisor.spawn("b", python(forking), channel_flag="--channel-fd")
            for child in (living, killed):
                await child.channel.receive()
            kept, orphan = int(living.last_lines()), int(killed.last_lines())
            killed.process.kill()
            await supervisor.wait(killed)
            assert start_ticks_of(orphan) is None
            assert start_ticks_of(kept) is not None and living.is_alive

    asyncio.run(scenario())


def test_nothing_survives_a_killed_daemon(tmp_path: Path) -> None:
    daemon = subprocess.Popen(
        python(PARENT, str(tmp_path / "home")), stdout=subprocess.PIPE, text=True
    )
    assert daemon.stdout is not None and daemon.stdout.readline() == "ready\n"
    records = load_child_records(tmp_path / "home")
    assert [record.name for record in records] == ["swarm", "trainer"]
    daemon.kill()
    daemon.wait(10)
    daemon.stdout.close()
    wait_until_gone([record.pid for record in records])
    home = Home.open(tmp_path / "home")
    assert home.clean_leftovers() == []
    home.close()


def wait_until_gone(pids: list[int], *, deadline_seconds: float = 10.0) -> None:
    for pid in pids:
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        ended, _, _ = select.select([fd], [], [], deadline_seconds)
        os.close(fd)
        assert ended, f"process {pid} is still there"


def test_logs_rotate_and_the_oldest_goes(tmp_path: Path) -> None:
    path = tmp_path / "swarm.log"
    for number in range(KEPT_LOGS + 3):
        path.write_text(str(number))
        rotate_log(path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["swarm.log.1", "swarm.log.2"]
    assert (tmp_path / "swarm.log.1").read_text() == str(KEPT_LOGS + 2)
