"""Connecting to members that may be dialling us in the same moment.

Two hosts that dial each other at once meet in one TCP connection (libp2p dials from the port that
it listens on), each takes itself for the client, both handshakes fail and both back off for 5 s.
Seen at 100 ms RTT, and on loopback of a busy machine. So the lower identity dials, and the higher
looks first whether it has been dialled; if they collide all the same, both wait for the end of the
back-off instead of taking each other for dead. A refused connection is told at once.
"""

import asyncio
import time
from typing import Any

from hivemind.p2p import P2P, PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError
from hivemind.utils.multiaddr import Multiaddr

_LOOK_SECONDS = 0.1
"""Between looks for a connection that the other side may be making; longer than half an RTT."""
_FIRST_LOOKS_SECONDS = 0.6
_AGAIN_SECONDS = 0.5
_MEET_SECONDS = 9.0
"""libp2p's back-off after a failed dial, 5 s, and the handshakes on a busy machine."""
_COLLISION = "failed to negotiate security protocol"
_OTHER_IDENTITY = "mismatch"
_BACK_OFF = "dial backoff"


class DialError(Exception):
    """No connection."""


class Dialler:
    """Makes p2pd connect, at most once at a time to each identity."""

    def __init__(self, p2p: P2P) -> None:
        self._client: Any = p2p._client  # noqa: SLF001 (hivemind has no public door for this)
        self._own_identity = str(p2p.peer_id.to_base58())
        self._has_collided: dict[str, bool] = {}
        """Identity -> whether its last failed dial may have been a collision."""
        self._met: set[str] = set()
        self._meetings: dict[str, asyncio.Future[None]] = {}
        self._dials: set[asyncio.Future[None]] = set()
        """Not ended yet; asyncio itself would forget them."""

    def is_first(self, identity: PeerID) -> bool:
        """True if it is ours to dial."""
        return self._own_identity < str(identity.to_base58())

    async def connect(
        self, identity: PeerID, maddrs: list[Multiaddr], *, timeout_seconds: float
    ) -> None:
        """Connect once. Raises DialError.

        p2pd is heard to the end also when that takes too long for us: hivemind closes its
        connection to p2pd only then.
        """
        suffix = Multiaddr(f"/p2p/{identity.to_base58()}")
        plain = [m.decapsulate(suffix) if "p2p" in m else m for m in maddrs]
        dial = asyncio.ensure_future(self._client.connect(identity, plain))
        self._dials.add(dial)
        dial.add_done_callback(self._dials.discard)
        try:
            await asyncio.wait_for(asyncio.shield(dial), timeout_seconds)
        except TimeoutError as error:
            raise DialError(f"no connection within {timeout_seconds:.1f} s") from error
        except (P2PDaemonError, OSError, EOFError, ValueError) as error:
            self.note_failure(identity, str(error))
            raise DialError(f"cannot connect: {short_reason(error)}") from error
        self._met.add(str(identity.to_base58()))

    def note_failure(self, identity: PeerID, reason: str) -> None:
        """A dial failed, also one that p2pd made by itself for a call."""
        name = str(identity.to_base58())
        if _COLLISION in reason and _OTHER_IDENTITY not in reason:
            self._has_collided[name] = True
        elif _BACK_OFF not in reason:
            self._has_collided[name] = False
        else:  # of somebody never met we may not have seen the collision
            self._has_collided.setdefault(name, name not in self._met)

    async def meet(
        self,
        identity: PeerID,
        maddrs: list[Multiaddr],
        *,
        timeout_seconds: float,
        patience_seconds: float | None = None,
    ) -> None:
        """Have a connection to a member, whoever makes it; callers share one. Raises DialError.

        After `patience_seconds` this caller is told that there is none yet, and the dial goes on.
        """
        name = str(identity.to_base58())
        meeting = self._meetings.get(name)
        if meeting is None:
            work = self._meet(identity, maddrs, timeout_seconds=timeout_seconds)
            meeting = self._meetings[name] = asyncio.ensure_future(work)
            meeting.add_done_callback(lambda done: self._ended(name, done))
        try:
            await asyncio.wait_for(asyncio.shield(meeting), patience_seconds)
        except TimeoutError as error:
            raise DialError(f"no connection within {patience_seconds:.1f} s") from error

    def _ended(self, name: str, meeting: "asyncio.Future[None]") -> None:
        del self._meetings[name]
        if not meeting.cancelled():
            meeting.exception()  # whoever still waits gets it

    async def _meet(
        self, identity: PeerID, maddrs: list[Multiaddr], *, timeout_seconds: float
    ) -> None:
        name, is_first = str(identity.to_base58()), self.is_first(identity)
        deadline_seconds = time.monotonic() + _MEET_SECONDS
        if not is_first and await self._look(identity, _FIRST_LOOKS_SECONDS):
            return
        while True:
            try:
                return await self.connect(identity, maddrs, timeout_seconds=timeout_seconds)
            except DialError:
                is_late = time.monotonic() >= deadline_seconds
                if is_late or not self._has_collided.get(name, False):
                    raise
            # The first goes on asking, and so ends its back-off first; the other one is dialled.
            if await self._look(identity, _AGAIN_SECONDS if is_first else 4 * _AGAIN_SECONDS):
                return

    async def _look(self, identity: PeerID, seconds: float) -> bool:
        """True if there is a connection, at once or soon."""
        deadline_seconds = time.monotonic() + seconds
        while True:
            try:
                peers = await self._client.list_peers()
            except (P2PDaemonError, OSError, EOFError) as error:
                raise DialError(f"p2pd: {short_reason(error)}") from error
            if any(peer.peer_id == identity for peer in peers):
                self._met.add(str(identity.to_base58()))
                return True
            if time.monotonic() >= deadline_seconds:
                return False
            await asyncio.sleep(_LOOK_SECONDS)


def short_reason(error: BaseException) -> str:
    """First line of an error, at most 200 characters."""
    lines = (str(error) or repr(error)).splitlines()
    return " ".join(line.strip() for line in lines[:2])[:200]
