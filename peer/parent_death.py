"""How a process of the peer ends: with its parent, and at once.

The kernel signals a process when the thread that started it ends. A child asks for that itself,
right after it starts; one whose parent was gone before that finds its channel closed.
"""

import contextlib
import ctypes
import logging
import os
import signal
import sys
from typing import NoReturn

from protos.contract.errors import MachineError

_PR_SET_PDEATHSIG = 1


def die_with_parent(sent_signal: signal.Signals) -> None:
    """Have the kernel send `sent_signal` when the parent ends.

    Raises MachineError if it has ended already.
    """
    parent_pid = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, sent_signal)
    if os.getppid() != parent_pid:
        raise MachineError(
            "the process that started this one has ended",
            allowed="a parent that lives",
            remedy="start it again",
        )


def end_process(exit_code: int) -> NoReturn:
    """End without the interpreter's farewell, once everything is closed: taking torch and hivemind
    apart costs most of a second of an idle core and many on a busy one, in which whoever waits for
    an orderly end loses patience. The trainer's groups would even wait for other ends.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(exit_code)
