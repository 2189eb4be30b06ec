"""No task beside a main loop fails unseen."""

import asyncio

from peer.background import BackgroundTasks


async def _raise() -> None:
    raise IndexError("nobody foresaw this")


def test_what_a_task_does_not_handle_is_told() -> None:
    async def run() -> list[BaseException]:
        found: list[BaseException] = []
        tasks = BackgroundTasks(found.append)
        waiting = tasks.start(asyncio.Event().wait())
        failing = tasks.start(_raise())
        await asyncio.wait({failing})
        await asyncio.sleep(0)
        await tasks.cancel_all()
        assert waiting.cancelled()
        return found

    assert [str(error) for error in asyncio.run(run())] == ["nobody foresaw this"]
