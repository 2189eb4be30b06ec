"""What the swarm process writes into its log: every lost error, but no cancellation and not the
connection to a p2pd that has ended.
"""

import asyncio
import logging
import sys

import pytest

from peer.swarm.__main__ import _is_news


@pytest.mark.parametrize(
    ("error", "is_written"),
    [(asyncio.CancelledError(), False), (ConnectionResetError(), False), (OSError(), True)],
)
def test_only_what_is_told_elsewhere_is_left_out(error: BaseException, is_written: bool) -> None:
    try:
        raise error
    except (asyncio.CancelledError, OSError):
        record = logging.LogRecord(
            "asyncio", logging.ERROR, "", 0, "Exception in callback", (), sys.exc_info()
        )
    assert _is_news(record) == is_written
    assert _is_news(logging.makeLogRecord({"msg": "never retrieved"}))
