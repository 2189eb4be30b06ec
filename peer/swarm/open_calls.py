"""Calls that p2pd has not answered yet, for hivemind's control client.

hivemind sets the result of every call that it still remembers. One that was cancelled in the same
moment raises InvalidStateError, which ends the task that reads from p2pd: the process goes on, but
gets no answer and hears no call any more. From Python 3.12 on, where a time-out cancels what it
waits for without a detour, that happens to whoever was stopped for longer than a call's patience
and wakes up with the answer there.
"""

import asyncio
from uuid import UUID


class OpenCalls(dict[UUID, "asyncio.Future[bytes]"]):
    """Contains the calls that still wait for their answer."""

    def __contains__(self, call_id: object) -> bool:
        found = self.get(call_id)  # type: ignore[call-overload]
        return found is not None and not found.done()
