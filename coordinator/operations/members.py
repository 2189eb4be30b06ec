"""Members between store and decisions: rows become what coordinator/domain decides on, and back.

A row without a session key belongs to a peer that is gone for sure (left, evicted, seen to exit):
there is no other column for it, because such a peer cannot authenticate any more.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, fields, replace
from functools import lru_cache

from coordinator.domain.directives import Contact
from coordinator.domain.membership import Member
from coordinator.operations.common import unix_ms
from coordinator.operations.requests import Capabilities, Claims
from coordinator.store.base import Transaction
from coordinator.store.rows_membership import PeerRow
from protos.contract.digest import canonical_json
from protos.contract.telemetry import PeerState

_CAPABILITY_FIELDS = frozenset(field.name for field in fields(Capabilities))
_CLAIM_FIELDS = frozenset(field.name for field in fields(Claims))
_KEPT_TEXTS = 8_192
"""Parsed texts kept in memory: every tick and lease request looks at them, they change once in ten
seconds or never.
"""


def member_from_row(row: PeerRow) -> Member:
    """The member as decisions see it."""
    return Member(
        peer_id=row.peer_id,
        state=PeerState(row.state),
        state_reason=row.state_reason,
        join_unix_seconds=row.join_unix_ms / 1000,
        last_heartbeat_unix_seconds=row.last_heartbeat_unix_ms / 1000,
        has_vote=row.has_vote,
        attested_incarnation=row.attested_incarnation,
        attested_outer_step=row.attested_outer_step,
        attested_digest=row.attested_digest,
        is_gone_for_sure=not row.session_key,
    )


def row_from_member(row: PeerRow, member: Member) -> PeerRow:
    """The row with everything that a Member carries; a member gone for sure loses its session."""
    return replace(
        row,
        state=member.state,
        state_reason=member.state_reason,
        join_unix_ms=unix_ms(member.join_unix_seconds),
        last_heartbeat_unix_ms=unix_ms(member.last_heartbeat_unix_seconds),
        has_vote=member.has_vote,
        attested_incarnation=member.attested_incarnation,
        attested_outer_step=member.attested_outer_step,
        attested_digest=member.attested_digest,
        session_key=b"" if member.is_gone_for_sure else row.session_key,
    )


def load_members(tx: Transaction, run_id: str) -> list[Member]:
    """All members of a run that ever were, by peer_id."""
    return [member_from_row(row) for row in tx.peers(run_id)]


def save_member(
    tx: Transaction, run_id: str, before: Member, after: Member, *, now_unix_seconds: float
) -> None:
    """Store what changed, and a change of state as an event."""
    if before == after:
        return
    row = tx.peer(run_id, after.peer_id)
    assert row is not None, "a member has a row"
    tx.put_peer(row_from_member(row, after))
    if before.state is not after.state:
        note_peer_state(tx, row, after, now_unix_seconds=now_unix_seconds)


def note_peer_state(
    tx: Transaction, row: PeerRow, member: Member, *, now_unix_seconds: float
) -> None:
    """Write a change of a member's state into the event log."""
    tx.insert_event(
        run_id=row.run_id,
        unix_ms=unix_ms(now_unix_seconds),
        kind="peer",
        peer_id=row.peer_id,
        text=f"{row.name} is {member.state}: {member.state_reason}",
    )


@lru_cache(maxsize=_KEPT_TEXTS)
def capabilities_from_json(text: str) -> Capabilities:
    """What a peer said of its machine; fields of other versions are left out."""
    plain = {k: v for k, v in json.loads(text or "{}").items() if k in _CAPABILITY_FIELDS}
    lists = {name: tuple(value) for name, value in plain.items() if isinstance(value, list)}
    return Capabilities(**(plain | lists))


def capabilities_to_json(capabilities: Capabilities) -> str:
    """The inverse of `capabilities_from_json`."""
    return canonical_json(asdict(capabilities)).decode()


@lru_cache(maxsize=_KEPT_TEXTS)
def claims_from_json(text: str) -> Claims:
    """What a peer claims; fields of other versions are left out."""
    return Claims(**{k: v for k, v in json.loads(text or "{}").items() if k in _CLAIM_FIELDS})


def claims_to_json(claims: Claims) -> str:
    """The inverse of `claims_from_json`."""
    return canonical_json({name: getattr(claims, name) for name in _CLAIM_FIELDS}).decode()


def contact_from_row(row: PeerRow) -> Contact:
    """What a roster says of a member beside its rights."""
    capabilities = capabilities_from_json(row.capabilities_json)
    return Contact(
        p2p_peer_id=row.p2p_peer_id,
        public_key=row.public_key,
        can_accept_connections=capabilities.can_accept_connections
        and not capabilities.reach_problem,
        addresses=capabilities.addresses,
        name=row.name,
    )


def speed_from_row(row: PeerRow) -> float:
    """Tokens per second that the peer claims: while training, else what it measured before; 0 if
    unknown.
    """
    claimed = claims_from_json(row.claims_json).tokens_per_second
    return claimed or capabilities_from_json(row.capabilities_json).tokens_per_second


def live_addresses(
    rows: Iterable[PeerRow], *, except_peer_id: str, num_addresses: int
) -> tuple[str, ...]:
    """Addresses of live peers that can be reached, for a peer that looks for its first
    neighbours.
    """
    found: list[str] = []
    for row in rows:
        if row.peer_id == except_peer_id or not member_from_row(row).is_live:
            continue
        contact = contact_from_row(row)
        if contact.can_accept_connections:
            found.extend(contact.addresses)
        if len(found) >= num_addresses:
            break
    return tuple(found[:num_addresses])
