"""Children are asked to end; those that cannot hear it yet are not waited for."""

import asyncio
import logging
import os
import signal
import time
from pathlib import Path

import pytest

from peer.background import BackgroundTasks
from peer.daemon import children
from peer.daemon.children import ChildName, Children
from peer.home import Home
from peer.ipc import Message
from peer.shared_vectors import SharedVectors
from peer.supervisor import Supervisor
from protos.contract.digest import STATE_LAYOUTS

IMPORTING = "import signal\nsignal.pause()\n"
MEASURING = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nsignal.pause()\n"
WORKING = """
import sys
from peer.ipc import Channel
channel = Channel.from_fd(int(sys.argv[sys.argv.index("--channel-fd") + 1]))
channel.send("ready")
while channel.receive()["kind"] != "stop":
    pass
"""


@pytest.mark.parametrize(
    ("name", "program", "code"),
    [
        (ChildName.SWARM, IMPORTING, -signal.SIGTERM),
        (ChildName.TRAINER, IMPORTING, -signal.SIGKILL),
        (ChildName.TRAINER, MEASURING, -signal.SIGKILL),
        (ChildName.SWARM, WORKING, 0),
        (ChildName.TRAINER, WORKING, 0),
    ],
)
def test_a_child_that_cannot_hear_yet_is_not_waited_for(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: ChildName,
    program: str,
    code: int,
) -> None:
    (tmp_path / "stand_in.py").write_text(program)
    monkeypatch.setitem(children._MODULE_BY_CHILD, name, "stand_in")
    home = Home.open(tmp_path / "home")
    path = os.pathsep.join([str(tmp_path), str(Path(children.__file__).parents[2])])
    ended: list[int | None] = []

    async def scenario() -> float:
        ready = asyncio.Event()

        def on_message(_: ChildName, message: Message) -> None:
            ready.set()

        supervisor = Supervisor(
            logs=home.logs,
            environment=dict(os.environ) | {"PYTHONPATH": path},
            record_children=home.record_children,
        )
        vectors = SharedVectors.create(4, STATE_LAYOUTS["sync"])
        tasks = BackgroundTasks(lambda error: None)
        both = Children(
            supervisor,
            vectors,
            tasks=tasks,
            on_message=on_message,
            on_death=lambda name, failure: pytest.fail(f"{name} failed: {failure}"),
        )
        try:
            await both.start(name)
            (child,) = supervisor.children
            if program is WORKING:
                async with asyncio.timeout(30):
                    await ready.wait()
            began_seconds = time.monotonic()
            await both.stop(name, grace_seconds=30.0)
            ended.append(child.process.returncode)
            return time.monotonic() - began_seconds
        finally:
            await tasks.cancel_all()
            await supervisor.close()
            vectors.close()

    with caplog.at_level(logging.WARNING):
        took_seconds = asyncio.run(scenario())
    home.close()
    assert ended == [code] and took_seconds < 15 and not caplog.records
