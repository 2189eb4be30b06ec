"""The live peers of a run as a pool to plan with: speeds, memory, availability, links. Reads only.

Speed is what a peer measured while it trained this run's model (tokens/s x FLOP per token), links
are what its rounds moved, availability is the share of its history in which it was live, from the
event log. What a peer has not measured is said, not guessed: without a speed it is left out.
"""

import ipaddress
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from coordinator.domain.membership import LIVE_STATES
from coordinator.operations.common import OperationContext
from coordinator.operations.members import (
    capabilities_from_json,
    claims_from_json,
    member_from_row,
    speed_from_row,
)
from coordinator.operations.requests_admin import PoolRequest
from coordinator.operations.runs import find_run
from coordinator.scaling.pool import (
    DAY_SECONDS,
    DEFAULT_DRIFT_PER_SQRT_DAY,
    Pool,
    PoolPeer,
    availability,
    drift_per_sqrt_day,
)
from coordinator.store.base import Transaction
from coordinator.store.rows_membership import PeerRow
from protos.contract.errors import ErrorCode, UnavailableError
from protos.contract.model_shape import ModelShape
from protos.contract.run_spec import RunSpec
from protos.contract.telemetry import PeerState

_EVENT_PAGE = 2_000
_STATE_NOTE = re.compile(r"[^:]* is (" + "|".join(state.value for state in PeerState) + r"): ")
"""What operations/members.py writes at a change of state; names have no colons."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolFound:
    """The pool and what is not known of it."""

    pool: Pool
    notes: tuple[str, ...]


def live_pool(
    tx: Transaction, request: PoolRequest, /, *, context: OperationContext, now_unix_seconds: float
) -> PoolFound:
    """The live peers with a measured speed.

    Raises RefusedError (UNKNOWN_RUN), UnavailableError (NOT_READY) while no live peer has a speed.
    """
    run = find_run(tx, request.run_id)
    shape = ModelShape.from_spec(RunSpec.from_wire(run.spec).model)
    up_by_peer = _up_by_peer(tx, run.run_id, now_unix_seconds=now_unix_seconds)
    peers: list[PoolPeer] = []
    notes: list[str] = []
    speeds: dict[str, float] = {}
    for row in tx.peers(run.run_id):
        speed = speed_from_row(row) * shape.flop_per_token()
        if speed > 0:
            speeds[row.peer_id] = speed
        if not member_from_row(row).is_live:
            continue
        if speed <= 0:
            notes.append(f"{row.name} is left out: it has not measured its speed yet")
            continue
        up = up_by_peer.get(row.peer_id, [])
        peer = _pool_peer(row, speed, up, now_unix_seconds=now_unix_seconds)
        if not peer.has_links:
            notes.append(f"{row.name} has not measured its links yet: it has averaged no round")
        peers.append(peer)
    if not peers:
        raise UnavailableError(
            f"no live peer of run {run.run_id!r} has measured its training speed",
            allowed="at least one peer that has trained for a moment",
            remedy="wait until `muster-coordinator peers` shows tokens/s, or pass a pool file",
            code=ErrorCode.NOT_READY,
        )
    drift = drift_per_sqrt_day(_daily_speeds(up_by_peer, speeds, now_unix_seconds))
    pool = Pool(
        peers=tuple(peers),
        drift_per_sqrt_day=DEFAULT_DRIFT_PER_SQRT_DAY if drift is None else drift,
        is_drift_measured=drift is not None,
    )
    return PoolFound(pool=pool, notes=tuple(notes))


def _pool_peer(
    row: PeerRow,
    speed_flop_per_second: float,
    up: Sequence[tuple[float, float]],
    *,
    now_unix_seconds: float,
) -> PoolPeer:
    capabilities, claims = (
        capabilities_from_json(row.capabilities_json),
        claims_from_json(row.claims_json),
    )
    return PoolPeer(
        name=f"{row.name}-{row.peer_id[:6]}",
        flop_per_second=speed_flop_per_second,
        availability_ratio=availability(
            up,
            begin_seconds=row.first_join_unix_ms / 1000,
            now_seconds=now_unix_seconds,
        ),
        memory_bytes=float(capabilities.memory_bytes),
        upload_bytes_per_second=claims.upload_bytes_per_second,
        download_bytes_per_second=claims.download_bytes_per_second,
        site=site_of(capabilities.addresses),
    )


def site_of(addresses: Iterable[str]) -> str:
    """What peers that are close to each other share: a machine's loopback, or one public address.

    "" if the multiaddresses show neither; private addresses look alike in every home.
    """
    found = []
    for text in addresses:
        parts = text.split("/")
        if len(parts) < 3 or parts[1] not in ("ip4", "ip6") or "p2p-circuit" in parts:
            continue
        try:
            found.append(ipaddress.ip_address(parts[2]))
        except ValueError:
            continue
    for address in found:
        if address.is_global:
            bits = 32 if address.version == 4 else 64
            return str(ipaddress.ip_network((address, bits), strict=False))
    return "loopback" if found and all(address.is_loopback for address in found) else ""


def _up_by_peer(
    tx: Transaction, run_id: str, *, now_unix_seconds: float
) -> dict[str, list[tuple[float, float]]]:
    """Intervals in which each peer was live, from the changes of state in the event log."""
    up: dict[str, list[tuple[float, float]]] = {}
    since: dict[str, float] = {}
    last_event_id = 0
    while events := tx.events(run_id, after_event_id=last_event_id, num_events=_EVENT_PAGE):
        for event in events:
            last_event_id = event.event_id
            note = _STATE_NOTE.match(event.text) if event.kind == "peer" else None
            if note is None:
                continue
            if PeerState(note[1]) in LIVE_STATES:
                since.setdefault(event.peer_id, event.unix_ms / 1000)
            elif event.peer_id in since:
                begin = since.pop(event.peer_id)
                up.setdefault(event.peer_id, []).append((begin, event.unix_ms / 1000))
    for peer_id, begin in since.items():
        up.setdefault(peer_id, []).append((begin, now_unix_seconds))
    return up


def _daily_speeds(
    up_by_peer: dict[str, list[tuple[float, float]]],
    speed_by_peer: dict[str, float],
    now_unix_seconds: float,
) -> list[float]:
    """Mean FLOP/s of each whole day before now, oldest first."""
    begins = [begin for intervals in up_by_peer.values() for begin, _ in intervals]
    if not begins:
        return []
    num_days = int((now_unix_seconds - min(begins)) / DAY_SECONDS)
    days = [0.0] * num_days
    for peer_id, intervals in up_by_peer.items():
        for begin, end in intervals:
            for index in range(num_days):
                day_end = now_unix_seconds - (num_days - 1 - index) * DAY_SECONDS
                seconds = min(end, day_end) - max(begin, day_end - DAY_SECONDS)
                days[index] += max(0.0, seconds) / DAY_SECONDS * speed_by_peer.get(peer_id, 0.0)
    return days
