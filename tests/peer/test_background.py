"""No task beside a main loop fails unseen, and nothing half started is left."""

import asyncio

import pytest

from peer.background import BackgroundTasks, finish, start_whole


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


@pytest.mark.parametrize("num_cancellations", [1, 3])
@pytest.mark.parametrize("fails", [False, True])
def test_what_is_started_for_a_cancelled_caller_is_undone(
    fails: bool, num_cancellations: int
) -> None:
    async def run() -> list[str]:
        undone: list[str] = []
        go_on = asyncio.Event()

        async def start() -> str:
            await go_on.wait()
            if fails:
                raise OSError("did not start")
            return "child"

        async def undo(child: str) -> None:
            undone.append(child)

        caller = asyncio.create_task(start_whole(start(), undo=undo))
        await asyncio.sleep(0)
        for _ in range(num_cancellations):
            caller.cancel()
            await asyncio.sleep(0)
            assert not caller.done()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await caller
        return undone

    assert asyncio.run(run()) == ([] if fails else ["child"])


@pytest.mark.parametrize("num_cancellations", [1, 3])
def test_an_end_is_reached_although_the_caller_is_cancelled(num_cancellations: int) -> None:
    async def run() -> tuple[bool, bool]:
        may_end, has_ended = asyncio.Event(), []

        async def end() -> None:
            await may_end.wait()
            has_ended.append(True)

        task = asyncio.ensure_future(finish(end()))
        await asyncio.sleep(0)
        for _ in range(num_cancellations):
            task.cancel()
            await asyncio.sleep(0)
        was_waiting = not task.done()
        may_end.set()
        await asyncio.wait({task}, timeout=5)
        return was_waiting and task.cancelled(), has_ended == [True]

    assert asyncio.run(run()) == (True, True)
