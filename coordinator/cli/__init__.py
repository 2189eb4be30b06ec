"""`muster-coordinator`: one file per command group; the only place in coordinator/ that prints."""

import contextlib
import os
import signal
import sys
from types import FrameType
from typing import NoReturn

from protos.contract.errors import INTERRUPTED_EXIT_CODE

_IS_PROGRAM = sys.argv[:1] == ["-m"] or os.path.basename(sys.argv[0]) == "muster-coordinator"


def end_at_once() -> NoReturn:
    """What a second Ctrl+C asks for: no farewell. What was acknowledged is on disk, and children
    die with this process.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception, SystemExit):  # nobody reads, or there is no room
            stream.flush()
    os._exit(INTERRUPTED_EXIT_CODE)


def _end_at_once(number: int, frame: FrameType | None) -> None:
    os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED_EXIT_CODE)


if _IS_PROGRAM:  # imports take half a second: an interrupt meanwhile is no error of ours
    signal.signal(signal.SIGINT, _end_at_once)


def begin_normal_interrupts() -> None:
    """From now on an interrupt is a KeyboardInterrupt again; main() calls it first."""
    if signal.getsignal(signal.SIGINT) is _end_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
