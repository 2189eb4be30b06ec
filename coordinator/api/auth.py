"""Who calls: a member by its session key, the operator by the admin key, or nobody yet (Challenge,
Join).

Sessions are read from the store once and kept for a minute at most, so an eviction that bypassed
`forget` ends them soon; the operations check membership themselves. The nonces of Challenge live
here too: in memory, good for one Join each.
"""

import asyncio
import secrets
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass

from coordinator.operations.requests import FindSessionResponse
from protos.contract.channel import ADMIN_PEER, METADATA_PEER, UNAUTHENTICATED_METHODS, check_auth
from protos.contract.errors import ErrorCode, RefusedError, UnavailableError

ADMIN_SERVICE_PREFIX = "/muster.v1.Admin/"
SESSION_MEMORY_SECONDS = 60.0
NONCE_LIFE_SECONDS = 60.0
MAX_NONCES = 16_384
_NONCE_BYTES = 32
_MAX_SESSIONS = 16_384


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Authenticated origin of a call; both empty before Join, peer_id "admin" for the operator."""

    peer_id: str = ""
    run_id: str = ""


CALLER: ContextVar[Caller] = ContextVar("muster_caller")
"""Set by the interceptor for the time of a call."""


@dataclass(slots=True)
class _KeptSession:
    session: FindSessionResponse
    forget_unix_seconds: float


class Authenticator:
    """Checks every call's metadata; used on the server's event loop only."""

    def __init__(
        self,
        *,
        admin_key: bytes,
        find_session: Callable[[str], FindSessionResponse],
        clock: Callable[[], float],
    ) -> None:
        """`find_session` reads the store (in a worker thread) and raises RefusedError for a
        stranger.
        """
        self._admin_key = admin_key
        self._find_session = find_session
        self._clock = clock
        self._kept_by_peer: OrderedDict[str, _KeptSession] = OrderedDict()

    async def authenticate(self, method: str, metadata: Mapping[str, str]) -> Caller:
        """Return who calls. Raises RefusedError (SESSION_INVALID, CLOCK_SKEW, PEER_EVICTED,
        PROTOCOL_MISMATCH).
        """
        if method in UNAUTHENTICATED_METHODS:
            return Caller()
        peer_id = metadata.get(METADATA_PEER, "")
        now_unix_seconds = self._clock()
        if (peer_id == ADMIN_PEER) != method.startswith(ADMIN_SERVICE_PREFIX):
            raise RefusedError(
                f"{peer_id or 'a caller without name'} called {method}",
                allowed="members call the services of a run, the holder of admin.key calls Admin",
                remedy="join first, or run the command as the user that owns the data directory",
                code=ErrorCode.SESSION_INVALID,
            )
        if peer_id == ADMIN_PEER:
            check_auth(self._admin_key, metadata, method=method, now_unix_seconds=now_unix_seconds)
            return Caller(peer_id=ADMIN_PEER)
        session = await self._session(peer_id, now_unix_seconds)
        check_auth(session.session_key, metadata, method=method, now_unix_seconds=now_unix_seconds)
        return Caller(peer_id=peer_id, run_id=session.run_id)

    def knows(self, peer_id: str) -> bool:
        """True if a call in this name is answered without looking for an unknown session."""
        return peer_id == ADMIN_PEER or peer_id in self._kept_by_peer

    def forget(self, peer_id: str) -> None:
        """Read this peer's session anew at its next call."""
        self._kept_by_peer.pop(peer_id, None)

    def forget_all(self) -> None:
        """Read all sessions anew."""
        self._kept_by_peer.clear()

    async def _session(self, peer_id: str, now_unix_seconds: float) -> FindSessionResponse:
        kept = self._kept_by_peer.get(peer_id)
        if kept is None or kept.forget_unix_seconds <= now_unix_seconds:
            self.forget(peer_id)
            session = await asyncio.to_thread(self._find_session, peer_id)
            kept = _KeptSession(session, now_unix_seconds + SESSION_MEMORY_SECONDS)
            self._kept_by_peer[peer_id] = kept
            while len(self._kept_by_peer) > _MAX_SESSIONS:
                self._kept_by_peer.popitem(last=False)
        if kept.session.session_expire_unix_seconds <= now_unix_seconds:
            self.forget(peer_id)
            raise RefusedError(
                f"session of {peer_id} has ended",
                allowed="calls before the end that Join named",
                remedy="join again",
                code=ErrorCode.SESSION_INVALID,
            )
        return kept.session


class NonceBook:
    """Nonces that were issued and not used; oldest first, bounded."""

    def __init__(self, *, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._expire_by_nonce: OrderedDict[bytes, float] = OrderedDict()

    def issue(self) -> bytes:
        """Return a new nonce. Raises UnavailableError when too many are open."""
        now_unix_seconds = self._clock()
        while self._expire_by_nonce:
            nonce, expire_unix_seconds = next(iter(self._expire_by_nonce.items()))
            if expire_unix_seconds > now_unix_seconds:
                break
            del self._expire_by_nonce[nonce]
        if len(self._expire_by_nonce) >= MAX_NONCES:
            raise UnavailableError(
                f"{MAX_NONCES} joins are under way",
                allowed="that many at a time",
                remedy="try again in a minute",
                code=ErrorCode.RATE_LIMITED,
            )
        nonce = secrets.token_bytes(_NONCE_BYTES)
        self._expire_by_nonce[nonce] = now_unix_seconds + NONCE_LIFE_SECONDS
        return nonce

    def use(self, nonce: bytes) -> None:
        """Take a nonce off the list. Raises RefusedError if it is not on it."""
        expire_unix_seconds = self._expire_by_nonce.pop(nonce, 0.0)
        if expire_unix_seconds <= self._clock():
            raise RefusedError(
                "the nonce of this join is unknown, used or too old",
                allowed=f"a nonce from Challenge, once, within {NONCE_LIFE_SECONDS:.0f} s",
                remedy="ask for a new one",
                code=ErrorCode.SIGNATURE_INVALID,
            )
