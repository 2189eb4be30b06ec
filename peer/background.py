"""Tasks that run beside a process's main loop, none of which may fail unseen."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

_T = TypeVar("_T")


class BackgroundTasks:
    """Keeps tasks alive, tells of the first failure, cancels what is left."""

    def __init__(self, on_failure: Callable[[BaseException], None]) -> None:
        self._on_failure = on_failure
        self._tasks: set[asyncio.Task[Any]] = set()

    def start(self, work: Coroutine[Any, Any, _T], *, name: str = "") -> asyncio.Task[_T]:
        """Run `work` beside; an exception that it does not handle goes to `on_failure`."""
        task = asyncio.create_task(work, name=name or None)
        self._tasks.add(task)
        task.add_done_callback(self._on_done)
        return task

    async def cancel_all(self) -> None:
        """Cancel and wait for everything."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _on_done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._on_failure(error)


async def _end_of(task: asyncio.Future[Any]) -> None:
    """Wait for the end of a task, however often the caller is cancelled meanwhile; the cancellation
    follows then.
    """
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled


async def start_whole(
    starting: Coroutine[Any, Any, _T], *, undo: Callable[[_T], Awaitable[None]]
) -> _T:
    """Start something that only its starter can end: a caller that is cancelled meanwhile waits for
    the start, and undoes it.
    """
    task = asyncio.ensure_future(starting)
    try:
        await _end_of(task)
    except asyncio.CancelledError:
        if not task.cancelled() and task.exception() is None:
            undoing = asyncio.ensure_future(undo(task.result()))
            await _end_of(undoing)
            undoing.result()
        raise
    return task.result()


async def finish(work: Coroutine[Any, Any, None]) -> None:
    """Run `work`, which ends something, to its end even if the caller is cancelled meanwhile; the
    cancellation follows then.
    """
    task = asyncio.ensure_future(work)
    await _end_of(task)
    task.result()
