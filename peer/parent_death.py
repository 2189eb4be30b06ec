"""Die with the parent: the kernel signals this process when the thread that started it ends.

A child asks for itself, right after it starts; one whose parent was gone before that finds its
channel closed.
"""

import ctypes
import os
import signal

from protos.contract.errors import MachineError

_PR_SET_PDEATHSIG = 1


def die_with_parent(sent_signal: signal.Signals) -> None:
    """Have the kernel send `sent_signal` when the parent ends.

    Raises MachineError if it has ended already.
    """
    parent_pid = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, sent_signal)
    if os.getppid() != parent_pid:
        raise MachineError("the process that started this one has ended", remedy="start it again")
