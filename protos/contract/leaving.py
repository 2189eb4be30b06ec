"""How long a peer may take to leave in good order, and so how long whoever started it waits.

Whoever presses a peer earlier (a second SIGTERM, SIGKILL) may lose the newest state of the run: a
peer that alone holds it first gives the coordinator a checkpoint of it.
"""

HAND_OVER_SECONDS = 60.0
"""The most that a peer takes to give the coordinator a checkpoint before it leaves."""
DRAIN_SECONDS = 15.0
"""The most that the rest takes: the micro-batch, certificates, Leave, the children and p2pd. About
five seconds on an idle machine.
"""
LEAVE_SECONDS = HAND_OVER_SECONDS + DRAIN_SECONDS
"""From the first SIGTERM to the end of the process."""
