"""The bridge from the writer thread to the event loop: every result arrives, errors and
cancellations included.
"""

import asyncio
from collections.abc import Iterator

import pytest

from coordinator.api.calls import Calls
from coordinator.operations.common import OperationContext
from coordinator.operations.writer import Writer
from coordinator.store.base import Transaction
from coordinator.store.sqlite import SqliteStore
from protos.contract.errors import UsageError
from protos.contract.signing import SigningKey


@pytest.fixture()
def writer() -> Iterator[Writer]:
    """A writer over a store in memory."""
    store = SqliteStore.in_memory()
    started = Writer(
        store, context=OperationContext(signing_key=SigningKey.generate()), clock=lambda: 1.0
    ).start()
    yield started
    started.stop()
    store.close()


def note(
    tx: Transaction, request: int, /, *, context: OperationContext, now_unix_seconds: float
) -> int:
    """Keep a number; every seventh is refused."""
    if request % 7 == 0:
        raise UsageError(f"{request} is a multiple of 7")
    tx.set_meta(f"{request}", "noted")
    return request * 2


def test_many_results_and_errors_arrive(writer: Writer) -> None:
    async def run() -> list[int | BaseException]:
        calls = Calls(writer)
        works = (calls.change(note, number) for number in range(1, 300))
        return await asyncio.gather(*works, return_exceptions=True)

    answers = asyncio.run(run())
    for number, answer in enumerate(answers, 1):
        assert isinstance(answer, UsageError) if number % 7 == 0 else answer == 2 * number


def test_a_cancelled_wait_harms_nobody(writer: Writer) -> None:
    async def run() -> int:
        calls = Calls(writer)
        given_up = asyncio.create_task(calls.change(note, 1))
        await asyncio.sleep(0)
        given_up.cancel()
        with pytest.raises(asyncio.CancelledError):
            await given_up
        return await calls.change(note, 2)

    assert asyncio.run(run()) == 4
