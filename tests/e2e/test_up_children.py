"""Peers that `up` starts: their join string is not for other users' eyes."""

import asyncio
from pathlib import Path

from coordinator.cli.up_children import PeerChild

SECRET = "muster1:not-a-join-string-but-a-secret"


async def command_line(process: asyncio.subprocess.Process) -> bytes:
    """Arguments of a live process. The kernel shows none for a moment after exec."""
    async with asyncio.timeout(10):
        while True:
            found = Path(f"/proc/{process.pid}/cmdline").read_bytes()
            if found:
                return found
            await asyncio.sleep(0)


def test_the_join_string_is_read_and_does_not_show_in_ps(tmp_path: Path) -> None:
    async def scenario() -> tuple[bytes, int | None, str]:
        home = tmp_path / "home"
        child = await PeerChild.start(
            name="ps", home=home, join_string=SECRET, num_threads=1, step_cache=home / "step"
        )
        arguments = await command_line(child.process)
        async with asyncio.timeout(60):
            await child.process.wait()
        return arguments, child.process.returncode, (home / "join.log").read_text()

    arguments, exit_code, log = asyncio.run(scenario())
    assert b"join\0-\0" in arguments and SECRET.encode() not in arguments
    assert exit_code == 2 and "join string" in log, log
