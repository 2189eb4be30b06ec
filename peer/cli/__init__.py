"""`muster-peer`: one file per command; commands import what they need when they run, so that --help
stays quick.
"""

import os
import signal
import sys
from types import FrameType

_IS_PROGRAM = sys.argv[:1] == ["-m"] or os.path.basename(sys.argv[0]) == "muster-peer"


def _end_at_once(number: int, frame: FrameType | None) -> None:
    os.write(2, b"interrupted\n")
    os._exit(130)


if _IS_PROGRAM:  # imports take half a second: an interrupt meanwhile is no error of ours
    signal.signal(signal.SIGINT, _end_at_once)


def begin_normal_interrupts() -> None:
    """From now on an interrupt is a KeyboardInterrupt again; main() calls it first."""
    if signal.getsignal(signal.SIGINT) is _end_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
