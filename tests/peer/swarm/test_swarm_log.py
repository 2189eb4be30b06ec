"""What the swarm process writes into its log: every lost error, and no cancellation."""

import asyncio
import logging
import sys

import pytest

from peer.swarm.__main__ import _is_no_cancellation


@pytest.mark.parametrize(
    ("error", "is_written"), [(asyncio.CancelledError(), False), (OSError(), 1)]
)
def test_only_cancellation_is_left_out(error: BaseException, is_written: bool) -> None:
    try:
        raise error
    except (asyncio.CancelledError, OSError):
        record = logging.LogRecord(
            "asyncio", logging.ERROR, "", 0, "Exception in callback", (), sys.exc_info()
        )
    assert _is_no_cancellation(record) == is_written
    assert _is_no_cancellation(logging.makeLogRecord({"msg": "never retrieved"}))
